"""Private names of torch are taken in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_private
from config.reading import ROOT

FOLDERS = ("benchmarks", "checkpoint", "config", "data", "models", "parallelisms", "scripts", "training")
FILES = [ROOT / "train.py", ROOT / "errors.py", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


def private_names(tree: ast.AST) -> Iterator[str]:
    """What of torch is imported by, or from, a name with an underscore."""
    for node in ast.walk(tree):
        names = list[str]()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *others = name.split(".")
            if first == "torch" and any(part.startswith("_") for part in others):
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_imports_any(path: Path) -> None:
    assert list(private_names(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_all_that_is_listed_is_there() -> None:
    found = list(private_names(ast.parse(Path(torch_private.__file__).read_text(encoding="utf-8"))))
    assert len(found) > 3
    assert all(hasattr(torch_private, name) for name in torch_private.__all__)
