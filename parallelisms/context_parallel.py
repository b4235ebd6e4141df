"""Context parallelism (Ulysses): the ranks of the `cp` axis share a micro-batch, some of its tokens each.

All of the model but the mixers' `mix` works token by token and does not notice. Around `mix` the ranks trade: some of
the tokens with all heads for all of the tokens with some heads, and back. Documents are the whole micro-batch's, and
may cross the borders between ranks anywhere.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from data.batch import MicroBatch
from models.ops.documents import Documents
from models.qwen35_moe.attention import GatedAttention
from models.qwen35_moe.block import Block
from models.qwen35_moe.config import FULL
from models.qwen35_moe.gated_delta_net import GatedDeltaNet
from models.qwen35_moe.mtp import MultiTokenPrediction
from models.qwen35_moe.patches import Patches
from models.qwen35_moe.vision import VisionTower
from models.qwen35_moe.vision_config import VisionConfig
from torch_private import all_to_all_single_autograd

# Shapes: T tokens of the micro-batch, P ranks of the cp axis, t = T / P tokens of each, F frames of images and videos;
# heads, channels and widths as in the mixers' files.


# The mixers


def exchange_around_mix(block: Block, mesh: DeviceMesh) -> None:
    """Puts the trade around the `mix` of the block's mixer; `mesh`: the cp axis."""
    if block.layer_type == FULL:
        setattr(block.self_attn, "mix", _attention_mix(block.self_attn, mesh))  # noqa: B010 (of a method)
    else:
        setattr(block.linear_attn, "mix", _delta_net_mix(block.linear_attn, mesh))  # noqa: B010


def products_that_travel(block: Block) -> list[torch.Size]:
    """Shapes [in, out] of the matrix products that nothing needs once they have been sent."""
    if block.layer_type == FULL:
        return []
    layer = block.linear_attn.in_proj_qkv  # with an adapter it is the sum of two products
    return [weight.T.shape for weight in layer.parameters() if len(weight) == layer.out_features]


def _attention_mix(mixer: GatedAttention, mesh: DeviceMesh) -> Callable[..., torch.Tensor]:
    mix, group = mixer.mix, mesh.get_group()
    num_ranks = group.size()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
        """q [t, N, K]; k, v [t, Nkv, K] -> [t, N, K]."""
        if k.shape[1] < num_ranks:  # a head goes to each rank that has queries of its group
            k, v = (x.repeat_interleave(num_ranks // x.shape[1], dim=1) for x in (k, v))
        num_heads = [x.shape[1] // num_ranks for x in (q, k, v)]
        q, k, v = _to_heads([q, k, v], group).split(num_heads, dim=1)
        return _to_tokens(mix(q, k, v, documents), group)

    return run


def _delta_net_mix(mixer: GatedDeltaNet, mesh: DeviceMesh) -> Callable[..., torch.Tensor]:
    mix, group = mixer.mix, mesh.get_group()
    num_ranks, rank = group.size(), group.rank()

    def run(
        qkv: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, documents: Documents, weight: torch.Tensor
    ) -> torch.Tensor:
        """qkv [t, C], g and beta [t, Nv], weight [C, 1, W] -> [t, Nv, Kv]."""
        value_width = g.shape[1] * mixer.value_head_dim
        key_width = (qkv.shape[1] - value_width) // 2
        widths = [key_width, key_width, value_width]
        # Of the convolution's gradient each rank has its channels', and zeros elsewhere: FSDP's sum is the whole.
        own_weight = torch.cat([part.chunk(num_ranks)[rank] for part in weight.split(widths)])
        qkv = _to_heads(qkv.split(widths, dim=1), group)
        g, wide_beta = _to_heads([g, beta.to(g.dtype)], group).chunk(2, dim=1)
        return _to_tokens(mix(qkv, g, wide_beta.to(beta.dtype), documents, own_weight), group)

    return run


def _to_heads(parts: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Each [t, N_i, ...], heads or channels of heads -> this rank's of each, side by side, of all tokens: [T, n, ...],
    n the sum of N_i / P. One all-to-all; the ranks' order is that of the tokens."""
    num_ranks = group.size()
    by_rank = torch.cat([part.unflatten(1, (num_ranks, -1)).transpose(0, 1) for part in parts], dim=2)  # [P, t, n, ...]
    return _exchange(by_rank.flatten(0, 1), group)


def _to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, n, ...] -> [t, P * n, ...]: all heads of this rank's tokens."""
    return _exchange(x, group).unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def _exchange(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """An even all-to-all of rows [T, ...]. With splits that are known it breaks no graph of the compiler."""
    even = [len(rows) // group.size()] * group.size()
    return all_to_all_single_autograd(rows.contiguous(), even, even, group)


# Multi-token prediction


def exchange_next(mtp: MultiTokenPrediction, mesh: DeviceMesh) -> None:
    """Has a rank's last token read the next rank's first; that of the last rank the first's, as in a whole stream."""
    group = mesh.get_group()
    num_ranks, rank = group.size(), group.rank()
    sent, received = ([int((rank + step) % num_ranks == each) for each in range(num_ranks)] for step in (-1, 1))

    def run(values: torch.Tensor) -> torch.Tensor:
        """[t, ...] -> [t, ...]."""
        following = all_to_all_single_autograd(values[:1].contiguous(), received, sent, group)
        return torch.cat([values[1:], following])

    setattr(mtp, "take_next", run)  # noqa: B010 (of a method)


# The micro-batch


def own_share(batch: MicroBatch, mesh: DeviceMesh | None, vision: VisionConfig | None) -> MicroBatch:
    """This rank's part of a micro-batch that all ranks of the cp axis have read, on the host; `vision`: the tower's.

    Labels stay right, as each stands at its token already.
    """
    return batch if mesh is None else share_of(batch, mesh.get_local_rank(), mesh.size(), vision)


def share_of(batch: MicroBatch, rank: int, num_ranks: int, vision: VisionConfig | None) -> MicroBatch:
    """The part of one of so many ranks."""
    size, rest = divmod(len(batch.tokens), num_ranks)
    assert rest == 0, (len(batch.tokens), num_ranks)
    own = slice(rank * size, (rank + 1) * size)
    patches = batch.patches
    if patches is not None:
        assert vision is not None
        patches = _share_of_frames(patches, rank, num_ranks, size, vision)
    return replace(
        batch,
        tokens=batch.tokens[own],
        labels=batch.labels[own],
        positions=batch.positions[..., own],
        mtp_labels=None if batch.mtp_labels is None else batch.mtp_labels[own],
        is_real=None if batch.is_real is None else batch.is_real[own],
        patches=patches,
    )


# The vision tower


@dataclass(frozen=True, eq=False)
class SharedPatches(Patches):
    """Those of the micro-batch's frames, whole ones, that this rank's tower looks at. Features go to the ranks that
    have their tokens; `places` are those of the features that come, among this rank's tokens."""

    sent: list[int]
    """How many features go to each rank."""
    received: list[int]
    """How many come from each."""

    @property
    def num_shown(self) -> int:
        return sum(self.sent)


def exchange_behind_tower(tower: VisionTower, mesh: DeviceMesh) -> None:
    """Has the tower return the features of this rank's tokens, whoever has made them. Every rank takes part, whether it
    has frames or tokens of frames or neither."""
    forward, group = tower.forward, mesh.get_group()

    def run(patches: Patches) -> torch.Tensor:
        """[features received, H]."""
        assert isinstance(patches, SharedPatches)
        features = forward(patches)[: patches.num_shown]
        return all_to_all_single_autograd(features.contiguous(), patches.received, patches.sent, group)

    setattr(tower, "forward", run)  # noqa: B010 (of a method)


def _share_of_frames(patches: Patches, rank: int, num_ranks: int, size: int, vision: VisionConfig) -> SharedPatches:
    """`size`: how many tokens a rank has.

    Frames are dealt in their order: so features leave and arrive in the order of their tokens, and most stay where they
    are made.
    """
    places, merged = patches.places, vision.patches_per_token
    ends = [end for end in patches.frames.cu_seqlens_cpu.tolist() if end <= len(places) * merged]  # without a grey one
    lengths = [end - start for start, end in pairwise(ends)]
    cuts = deal([_cost(length, vision) for length in lengths], num_ranks)
    owners = places // size
    assert (owners.diff() >= 0).all(), places
    makers = [owners[ends[first] // merged : ends[last] // merged] for first, last in pairwise(cuts)]
    travels = torch.stack([owned.bincount(minlength=num_ranks) for owned in makers])  # [from, to]
    first, last = cuts[rank], cuts[rank + 1]
    own = Patches.grey(vision.patch_values, vision.spatial_merge_size, patches.frames.max_seqlen)
    if first < last:
        of_own = slice(ends[first], ends[last])
        frames = Documents.from_lengths(lengths[first:last], max_seqlen=patches.frames.max_seqlen)
        own = Patches(patches.pixels[of_own], frames, patches.grid[:, of_own], places)
    return SharedPatches(
        own.pixels,
        own.frames,
        own.grid,
        places[owners == rank] - rank * size,
        sent=travels[rank].tolist(),
        received=travels[:, rank].tolist(),
    )


def deal(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Cuts a sequence into runs of about equal cost, one a rank: where each begins, and where the last ends.

    What a rank has more than its share is at most one element.
    """
    total = sum(costs)
    middles = [num_ranks * (2 * end - cost) for end, cost in zip(accumulate(costs), costs)]
    return [bisect_left(middles, 2 * total * rank) for rank in range(num_ranks + 1)]


def _cost(num_patches: int, vision: VisionConfig) -> int:
    """Of a frame in a block of the tower, in a unit that is the same for all: its products and its attention."""
    return num_patches * (2 * vision.hidden_size + vision.intermediate_size + num_patches)
