"""Every field is documented, and read by the code that it is for."""

import ast
import dataclasses
import inspect

import pytest

from config.reading import ROOT, SECTIONS, load_config, model_config
from config.schema import field_docs


def test_help_lists_every_key_with_type_default_and_docstring(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--config", "none", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, cls in SECTIONS.items():
        assert f"[{section}] {inspect.getdoc(cls)}" in text
        for field in dataclasses.fields(cls):
            doc = " ".join(field_docs(cls)[field.name].split())
            assert doc.endswith((".", "?")), f"{section}.{field.name}"
            start = text.index(f"--{section}.{field.name.rstrip('_')}: ")
            assert doc in text[start : start + len(doc) + 250]
    assert "--optimizer.betas: a list of 2, each a number from 0 to below 1; default [0.9, 0.95]" in text
    assert "--optimizer.lr: a positive number; required" in text
    assert "--data.end_of_document: true or false; default true" in text


# A field that nothing reads is a lie to the user


def read_fields(sources: dict[str, str], sections: dict[str, type]) -> set[tuple[str, str]]:
    """The (section, key) pairs that the sources read from a configuration.

    Understood: `<anything>.section.key`; a variable or attribute assigned from `<anything>.section`, also by unpacking;
    a parameter annotated with a section's class that is imported from config.options; and
    `asdict(<anything>.section)`, for those keys that some source takes by name, as in `d["key"]` or `d.get("key")`.
    """
    names_of_class = {cls.__name__: name for name, cls in sections.items()}
    found: set[tuple[str, str]] = set()
    in_bulk: set[str] = set()  # sections turned into a dict
    by_name: set[str] = set()
    for source in sources.values():
        tree = ast.parse(source)
        imported = {
            alias.asname or alias.name: names_of_class[alias.name]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "config.options"
            for alias in node.names
            if alias.name in names_of_class
        }
        holders: dict[str, set[str]] = {}  # source text of a variable or attribute -> sections it may hold

        def sections_of(node: ast.expr, holders: dict[str, set[str]] = holders) -> set[str]:
            direct = {node.attr} if isinstance(node, ast.Attribute) and node.attr in sections else set()
            return direct | holders.get(ast.unparse(node), set())

        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation is not None:
                annotation = node.annotation
                name = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
                if name in imported:
                    holders.setdefault(node.arg, set()).add(imported[name])
        for _ in range(3):  # holders assigned from holders
            for node in ast.walk(tree):
                for target, value in assignments(node):
                    holders.setdefault(ast.unparse(target), set()).update(sections_of(value))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found |= {(section, node.attr) for section in sections_of(node.value)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "asdict":
                in_bulk |= set().union(*map(sections_of, node.args))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                by_name |= {str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)}
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                by_name.add(str(node.slice.value))
    return found | {(section, key) for section in in_bulk for key in by_name}


def assignments(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, with tuples taken apart."""
    if isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        return [(node.target, node.value)]
    pairs = []
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += list(zip(target.elts, node.value.elts))
        else:
            pairs.append((target, node.value))
    return pairs


def dead_fields(sources: dict[str, str], sections: dict[str, type]) -> set[str]:
    declared = {(section, field.name) for section, cls in sections.items() for field in dataclasses.fields(cls)}
    return {f"{section}.{key}" for section, key in declared - read_fields(sources, sections)}


def test_every_field_is_read() -> None:
    """config/ itself checks most fields, which is no use of them: only what it offers to the others counts."""
    folders = [ROOT / name for name in ("models", "parallelisms", "checkpoint", "data", "training")]
    paths = [ROOT / "train.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    sources = {str(path): path.read_text() for path in paths if path.exists()}
    sources["model_config"] = inspect.getsource(model_config)
    dead = dead_fields(sources, SECTIONS)
    assert not dead, f"nothing reads {sorted(dead)}: remove the keys, or put them to work"


def test_a_dead_field_is_found() -> None:
    @dataclasses.dataclass
    class Training:
        direct: int = 0
        local: int = 0
        unpacked: int = 0
        annotated: int = 0
        attribute: int = 0
        dead: int = 0
        written: int = 0
        other_section: int = 0
        other_class: int = 0

    @dataclasses.dataclass
    class Kernels:
        attention: str = ""
        conv: str = ""
        dead: str = ""

    source = """
from config.options import Config, Training as Settings
def main(config: Config, optimizer: torch.optim.Training):
    config.training.direct
    training = config.training
    again = training
    again.local
    seed, (a) = 3, config.training
    a.unpacked
    config.training.written = 3
    config.other.other_section
    optimizer.other_class
    select(dataclasses.asdict(config.kernels), requested["attention"], requested.get("conv", "auto"))
    "config.training.dead"  # config.training.dead
    dead = other.dead
class Loader:
    def __init__(self, settings: "Settings"):
        self.settings = settings
        settings.annotated
    def get(self):
        return self.settings.attribute
"""
    dead = dead_fields({"source": source}, {"training": Training, "kernels": Kernels})
    assert dead == {
        "training.dead",
        "training.written",
        "training.other_section",
        "training.other_class",
        "kernels.dead",
    }
