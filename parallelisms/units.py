"""Which blocks FSDP gathers, frees and reduces together."""

from functools import lru_cache
from math import prod

from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parameters import parameters

_SMALL = 50_000_000
"""Parameters of a block without experts. The host pays by the unit, and memory has two units and the last one, and a
unit's gradients in float32: two blocks of the 35B are 150 MB in bfloat16. Those of the 122B would be two and a half
times that, of the 397B three and a half times, and the host is not what they wait for."""


@lru_cache(maxsize=8)
def dense_units(shape: ModelConfig, expert_degree: int) -> tuple[range, ...]:
    """The blocks of each unit of dense weights. At ep 1 a block is a unit, with its experts; at ep > 1, where experts
    are units of their own, two small ones are one. Those of multi-token prediction are units by themselves, as the
    trunk may run without them, and without a graph."""
    num_trunk, num_mtp = len(shape.layer_types), shape.mtp_num_hidden_layers
    size = 2 if expert_degree > 1 and _largest_block(shape) <= _SMALL else 1
    trunk = (range(first, min(first + size, num_trunk)) for first in range(0, num_trunk, size))
    return *trunk, *(range(index, index + 1) for index in range(num_trunk, num_trunk + num_mtp))


def _largest_block(shape: ModelConfig) -> int:
    sizes = [0] * len(shape.layer_types)
    for name, parameter in parameters(shape).items():
        part, *rest = name.split(".")
        if part == "layers" and parameter.expert_dim is None:
            sizes[int(rest[0])] += prod(parameter.shape)
    return max(sizes)
