"""One graph however many rows there are."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from models.ops.any_number_of_rows import compile_for_any_number_of_rows


def test_one_graph_for_all_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = compile_for_any_number_of_rows(torch.mul, num_others=1)
    torch.compiler.reset()
    counters.clear()
    factor = torch.randn(1, 3)  # an expert of its own, which is no reason not to compile
    for num_rows in (5, 0, 1, 7, 2):
        x = torch.randn(num_rows, 3)
        assert torch.equal(compiled(x, factor), x * factor)
    assert counters["stats"]["unique_graphs"] == 1
