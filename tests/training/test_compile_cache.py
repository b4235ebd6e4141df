"""Compiled kernels lie where they were asked to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.compile_cache import keep_compiled_in


def test_the_environment_comes_first_and_nothing_is_touched_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TILELANG_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    before = dict(os.environ)
    keep_compiled_in("")
    assert dict(os.environ) == before
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    keep_compiled_in("kept")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kept/inductor")
    assert os.environ["TILELANG_CACHE_DIR"] == str(tmp_path / "kept/tilelang")


@pytest.mark.parametrize("imported", ["torch", "train"])
def test_the_compiler_writes_there(imported: str, tmp_path: Path) -> None:
    """Also if it has been imported, which names another place in the environment, before it is told."""
    program = (
        f"import {imported}; import sys, torch; from training.compile_cache import keep_compiled_in; "
        "keep_compiled_in(sys.argv[1]); "
        "print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).sum().item())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    command = [sys.executable, "-c", program, str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "3.0"
    assert any(path.is_file() for path in (tmp_path / "kept/inductor").rglob("*"))
