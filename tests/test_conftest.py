"""The list of slow tests."""

import re
from pathlib import Path

import pytest

from tests.conftest import SLOW

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", SLOW)
def test_it_names_tests_that_there_are(file: str) -> None:
    there = re.findall(r"^def (test_\w+)\(", (HERE / file).read_text(), flags=re.MULTILINE)
    assert set(SLOW[file]) <= set(there)
