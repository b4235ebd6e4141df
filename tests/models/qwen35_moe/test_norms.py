"""The norms as modules: which initial weight leaves a normalised vector as it is."""

import torch

from models.qwen35_moe.norms import GatedRMSNorm, RMSNorm


def test_a_weight_of_zero_is_the_plain_norm() -> None:
    norm = RMSNorm(6, 1e-6)
    torch.nn.init.zeros_(norm.weight)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x).square().mean(-1), torch.ones(4), atol=1e-5)


def test_a_weight_of_one_is_the_plain_norm_times_the_gate() -> None:
    norm = GatedRMSNorm(6, 1e-6)
    torch.nn.init.ones_(norm.weight)
    x, gate = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * gate * gate.sigmoid()
    assert torch.allclose(norm(x, gate), expected, atol=1e-5)


def test_eps_bounds_what_is_small() -> None:
    norm = RMSNorm(6, 1.0)
    torch.nn.init.zeros_(norm.weight)
    assert torch.allclose(norm(torch.full((6,), 1e-4)), torch.full((6,), 1e-4))
