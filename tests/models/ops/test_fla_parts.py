"""More documents than flash-linear-attention's kernels can be launched for; plain PyTorch in the library's place."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import models.ops.gated_delta_rule as module
from models.ops.documents import Documents
from models.ops.gated_delta_rule import gated_delta_rule
from tests.models.ops.compare import relative_error
from tests.models.ops.test_gated_delta_rule import make_inputs

NUM_HEADS, MAX_GRID = 4, 11  # two documents a call, not three
LENGTHS = [1, 70, 3, 128, 64, 9, 2]


def rule(tensors: dict[str, torch.Tensor], cu_seqlens: torch.Tensor) -> torch.Tensor:
    documents = Documents.from_lengths(cu_seqlens.diff().tolist())
    names = ("q", "k", "v", "g", "beta")
    return gated_delta_rule(*(tensors[name].squeeze(0) for name in names), documents).unsqueeze(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each call of the library had; it fails for more than can be launched."""
    found: list[int] = []

    def check(cu_seqlens: torch.Tensor, chunk_indices: torch.Tensor, num_tokens: int) -> None:
        found.append(len(cu_seqlens) - 1)
        assert found[-1] * NUM_HEADS <= MAX_GRID, "invalid configuration argument"
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == num_tokens
        assert torch.equal(chunk_indices, indices(cu_seqlens, 64))

    def indices(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
        counts = [-(-length // size) for length in cu_seqlens.diff().tolist()]
        return torch.tensor([(document, place) for document, n in enumerate(counts) for place in range(n)])

    def forward(*inputs: torch.Tensor, cu_seqlens: torch.Tensor, chunk_indices: torch.Tensor, **_: Any) -> tuple:
        check(cu_seqlens, chunk_indices, inputs[0].shape[1])
        # The library's sums are of each chunk; here they only have to come back to the same tokens.
        out = rule(dict(zip(("q", "k", "v", "g", "beta"), inputs)), cu_seqlens)
        return inputs[3].clone(), out, inputs[3].unsqueeze(-1).repeat(1, 1, 1, 64)

    def backward(**inputs: Any) -> tuple:
        check(inputs["cu_seqlens"], inputs["chunk_indices"], inputs["q"].shape[1])
        assert torch.equal(inputs["A"], inputs["g"].unsqueeze(-1).expand_as(inputs["A"]))
        wanted = ("q", "k", "v", "beta", "g")
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}

        def differentiate() -> tuple[torch.Tensor, ...]:
            out = rule(leaves, inputs["cu_seqlens"])
            return torch.autograd.grad(out, list(leaves.values()), inputs["do"])

        with ThreadPoolExecutor(1) as elsewhere:  # inside an operation of its own torch has autograd switched off
            return elsewhere.submit(differentiate).result()

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    chunk, index = types.ModuleType("chunk"), types.ModuleType("index")
    vars(chunk).update(chunk_gated_delta_rule_fwd=forward, chunk_gated_delta_rule_bwd=backward)
    vars(index).update(prepare_chunk_indices=indices)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule.chunk", chunk)
    monkeypatch.setitem(sys.modules, "fla.ops.utils.index", index)
    monkeypatch.setattr(module, "_MAX_GRID", MAX_GRID)
    return found


@pytest.mark.parametrize("num_documents", [1, 2, 3, len(LENGTHS)])
def test_any_number_of_documents_in_calls_that_can_be_launched(num_documents: int, calls: list[int]) -> None:
    lengths = LENGTHS[:num_documents]
    results = {}
    for backend in ("torch", "fla"):
        inputs = [x.detach().requires_grad_() for x in make_inputs(sum(lengths), heads=(2, NUM_HEADS))]
        out = gated_delta_rule(*inputs, Documents.from_lengths(lengths), backend=backend)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results[backend] = [out.detach(), *(x.grad for x in inputs)]
    num_calls = -(-num_documents // 2)
    assert len(calls) == 2 * num_calls
    assert sum(calls) == 2 * num_documents
    for found, expected in zip(results["fla"], results["torch"]):
        # The library is handed float32 sums; what it is handed is normalised a second time here, by 1 + 1e-6.
        assert relative_error(found, expected) < 1e-5
