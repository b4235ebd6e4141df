"""What options accept, at the edges of each type, and that the words for it say the same."""

import math
from typing import Any, get_args

import pytest

from config import accepted
from config.accepted import Accept

EDGES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    # type: (accepted, refused)
    "PositiveInt": ((1, 2**31 - 1), (0, -1, 2**31)),
    "Count": ((0, 2**31 - 1), (-1, 2**31)),
    "Rows": ((1, 2**20), (0, 2**20 + 1)),
    "Workers": ((0, 1024), (-1, 1025)),
    "Seed": ((0, 2**63 - 1), (-1, 2**63)),
    "Room": ((0, -1, 1, 1000), (0.5, -2, 1001, math.nan, math.inf)),
    "Degree": ((-1, 1, 512), (0, -2)),
    "Positive": ((1e-30,), (0, -1, math.inf, math.nan)),
    "PositiveOrInf": ((1e-30, math.inf), (0, -1, math.nan)),
    "NotNegative": ((0, 1e30), (-1e-30, math.inf, math.nan)),
    "Epochs": ((0.01, 1000), (0, 1000.5, math.inf, math.nan)),
    "Share": ((0, 0.999), (1, -0.1, math.nan)),
    "Ratio": ((0, 1), (1.001, -0.001, math.nan)),
    "Beta": ((0, 0.999), (1, -0.1, math.nan)),
    "Folder": (("outputs",), ("",)),
    "Parts": (((), ("vision", "router")), (("vision", "wheels"),)),
    "Targets": ((("attention",),), ((), ("attention", "attention"), ("vision",), ("wheels",))),
}


def test_every_type_is_here() -> None:
    assert set(EDGES) == {name for name, kind in vars(accepted).items() if hasattr(kind, "__metadata__")}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    _, accept = get_args(getattr(accepted, name))
    assert isinstance(accept, Accept)
    good, bad = EDGES[name]
    assert [value for value in good if not accept.test(value)] == []
    assert [value for value in bad if accept.test(value)] == []
    assert accept.text
