"""The working directory of these tests: a configuration that is right, and what it names."""

from pathlib import Path

import pytest

from tests.config.runs import write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path)
    return tmp_path
