"""Linear attention as a whole against the plain recurrence: convolution, gates, decay, norm, heads that are shared."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.gated_delta_net import GatedDeltaNet
from tests.models.ops.recurrence import recurrence
from tests.models.qwen35_moe.shapes import tiny_config

LENGTHS = [5, 1, 70]


def by_definition(module: GatedDeltaNet, x: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Token by token, document by document, in x's dtype."""
    weight, outs = module.conv1d.weight[:, 0], []
    for document in module.in_proj_qkv(x).split(LENGTHS):
        padded = F.pad(document, (0, 0, weight.shape[1] - 1, 0))
        taps = padded.unfold(0, weight.shape[1], 1)  # [T, C, W]
        outs.append(F.silu((taps * weight).sum(-1)))
    q, k, v = torch.cat(outs).split([num_keys * 16, num_keys * 16, len(module.A_log) * 16], dim=-1)
    q, k, v = q.unflatten(-1, (num_keys, -1)), k.unflatten(-1, (num_keys, -1)), v.unflatten(-1, (-1, 16))
    g = -module.A_log.exp() * torch.log1p((module.in_proj_a(x) + module.dt_bias).exp())
    out = recurrence(q, k, v, g, module.in_proj_b(x).sigmoid(), LENGTHS)
    z = module.in_proj_z(x).view_as(out)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight * z * z.sigmoid()
    return module.out_proj(out.flatten(1))


@pytest.mark.parametrize(("num_keys", "num_values"), [(2, 4), (1, 5), (3, 3)])
def test_equals_the_definition(num_keys: int, num_values: int) -> None:
    config = tiny_config(linear_num_key_heads=num_keys, linear_num_value_heads=num_values)
    module = GatedDeltaNet(config, Kernels())
    for number, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    module = module.double()
    x = torch.randn(sum(LENGTHS), 48, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    inputs = [x.requires_grad_(), *module.parameters()]
    out, expected = module(x, Documents.from_lengths(LENGTHS)), by_definition(module, x, num_keys)
    assert (out - expected).abs().max() < 1e-11 * expected.abs().max()
    gradients, wanted = (torch.autograd.grad(each.sin().sum(), inputs) for each in (out, expected))
    for actual, exact in zip(gradients, wanted):
        assert (actual - exact).abs().max() < 1e-9 * exact.abs().max()
