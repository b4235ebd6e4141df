"""Which blocks FSDP gathers, frees and reduces together, and what it keeps from forward to backward."""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parameters import parameters
from parallelisms.degrees import Degrees

_SMALL = 50_000_000
"""Parameters of a block without experts, of which several are a unit. The host pays by the unit, and memory has a
unit's gradients as computed and as reduced, and, where weights are freed, two units' weights and the last one's: two
blocks of the 35B are 150 MB in bfloat16. Those of the 122B would be two and a half times that, of the 397B three and a
half times, and the host is not what they wait for."""
_FEW = 2_000_000_000
"""Parameters of all blocks without experts. The 35B's 1.4 billion are 2.6 GiB in bfloat16, for which 19 gathers and the
host's work for them are spared; the 122B's are twice as many."""


class Kept(NamedTuple):
    """What stays gathered from the forward pass to the backward pass."""

    dense: bool
    """At ep 1 with the experts."""
    experts: bool
    """As units of their own, at ep > 1."""


FREED = Kept(False, False)


def kept_gathered(shape: ModelConfig, degrees: Degrees, reshard_after_forward: str, activation_checkpoint: str) -> Kept:
    """What `parallelism.reshard_after_forward` comes to. Where nothing is sharded everything is kept: there would be
    nothing to free but a cast. "auto" frees with "full" recomputation: who asks for that is short of memory."""
    if degrees.shard == 1 or reshard_after_forward == "never":
        return Kept(True, True)
    is_small = degrees.expert > 1 and sum(_dense_of_blocks(shape)) <= _FEW
    return Kept(is_small and reshard_after_forward == "auto" and activation_checkpoint != "full", False)


def head_is_unit(shape: ModelConfig, shard: int) -> bool:
    """Whether the head is a unit by itself, which is gathered and reduced beside blocks: with the embedding it would be
    before the first and after the last of them, where nothing hides that. Not if it is the embedding, nor if
    multi-token prediction reads it too: a unit is run once."""
    return shard > 1 and not shape.tie_word_embeddings and not shape.mtp_num_hidden_layers


@lru_cache(maxsize=8)
def dense_units(shape: ModelConfig, expert_degree: int, is_kept: bool) -> tuple[range, ...]:
    """The blocks of each unit of dense weights. At ep 1 a block is a unit, with its experts; at ep > 1, where experts
    are units of their own, two small ones are one, or four where weights are kept from forward to backward. Those of
    multi-token prediction are units by themselves, as the trunk may run without them, and without a graph."""
    num_trunk, num_mtp = len(shape.layer_types), shape.mtp_num_hidden_layers
    are_small = expert_degree > 1 and max(_dense_of_blocks(shape)) <= _SMALL
    size = (4 if is_kept else 2) if are_small else 1
    trunk = (range(first, min(first + size, num_trunk)) for first in range(0, num_trunk, size))
    return *trunk, *(range(index, index + 1) for index in range(num_trunk, num_trunk + num_mtp))


@lru_cache(maxsize=8)
def _dense_of_blocks(shape: ModelConfig) -> tuple[int, ...]:
    """Of each block of the trunk, how many parameters it has without experts."""
    sizes = [0] * len(shape.layer_types)
    for name, parameter in parameters(shape).items():
        part, *rest = name.split(".")
        if part == "layers" and parameter.expert_dim is None:
            sizes[int(rest[0])] += prod(parameter.shape)
    return tuple(sizes)
