"""Checks of single values: what counts as an integer, as the same, and how a message shows a value of any size."""

import pytest

from errors import UserError
from models.qwen35_moe.config_values import integer, listed, same, short


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, 11])
def test_what_is_no_integer_in_range(value: object) -> None:
    with pytest.raises(UserError, match=r"num = .* must be a positive integer, at most 10"):
        integer("num", value, 10)
    assert integer("num", 10, 10) == 10


def test_one_is_not_true() -> None:
    assert same(1, 1.0)
    assert not same(1, True)
    assert not same(0, False)
    assert same([], [])


def test_values_are_shown_in_one_short_line() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert short(deep) == "a list"
    assert short("x" * 1000) == "'" + "x" * 79 + "..."
    assert short((1, 2)) == "[1, 2]"
    assert listed((None, "a")) == "None or 'a'"
