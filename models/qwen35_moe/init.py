"""Initial weights that depend on (seed, parameter name, expert index) alone, never on the mesh.

parameter                                            initial value
-----------------------------------------------------------------------------------------------------------------
input_layernorm, post_attention_layernorm,           0       (the norm multiplies by 1 + weight)
  norm, self_attn.q_norm, self_attn.k_norm,
  mtp: its norms
linear_attn.norm                                     1       (the gated norm multiplies by weight)
linear_attn.A_log                                    log u, u ~ uniform(0.01, 16)   (never log 0)
linear_attn.dt_bias                                  1
embeddings, projections, convolution, router,        normal(0, initializer_range)
  experts (each expert's matrix drawn by itself)
lora_A (each expert's drawn by itself)               uniform(-1, 1) / sqrt(width of what it reads), as in peft
lora_B                                               0
visual: norm1, norm2, merger.norm                    1       (LayerNorms, which multiply by weight)
visual: every bias                                   0
visual: embeddings, projections                      normal(0, vision_config's initializer_range)
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parameters import Box, full_box

LocalPart = tuple[torch.Tensor, Box]
"""A tensor, and the box of the full parameter that it holds."""


def whole(parameter: torch.Tensor) -> LocalPart:
    """A parameter that is not sharded."""
    return parameter, full_box((), tuple(parameter.shape))


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)  # 63 bits: what manual_seed takes


def initial_value(
    name: str, shape: torch.Size, initializer_range: float, seed: int, expert: int | None = None
) -> torch.Tensor:
    """One full parameter (of a stacked one: the matrix of one `expert`) in float32 on the CPU; the table is above."""
    if name.endswith(("lora_B", "lora_B.weight")):
        return torch.zeros(shape)
    is_visual = name.startswith("visual.")
    if is_visual and name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith(("linear_attn.norm.weight", "dt_bias")) or (is_visual and len(shape) == 1):
        return torch.ones(shape)
    if name.endswith("norm.weight") or "pre_fc_norm" in name:
        return torch.zeros(shape)
    generator = _generator(seed, name, expert)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0.01, 16, generator=generator).log()
    if name.endswith(("lora_A", "lora_A.weight")):
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0.0, initializer_range, generator=generator)


def init_weights(
    model: Qwen35Moe,
    seed: int,
    local_part: Callable[[nn.Parameter], LocalPart] = whole,
    *,
    which: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fills every parameter of the model, or the part of it that `local_part` says lies in this process.

    which: by their names, none but these.

    Matrices are drawn whole, then cut. A generator draws on one core, so several threads draw a matrix each (of an
    expert, where they are stacked), no more than which are in memory.
    """
    config = model.config
    num_threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(num_threads) as pool:
        draws = list[Future[None]]()
        for name, parameter in model.named_parameters():
            if not which(name):
                continue
            of = config.vision if config.vision and name.startswith("visual.") else config
            std = of.initializer_range
            local, box = local_part(parameter)
            index = tuple(slice(*edges) for edges in box)
            if ".experts." in name:
                for part, expert in zip(local.detach(), range(*box[0]), strict=True):
                    draws.append(pool.submit(_draw, part, index[1:], name, parameter.shape[1:], std, seed, expert))
            else:
                draws.append(pool.submit(_draw, local.detach(), index, name, parameter.shape, std, seed))
        for draw in draws:
            draw.result()


def _draw(
    local: torch.Tensor,
    index: tuple[slice, ...],
    name: str,
    shape: torch.Size,
    std: float,
    seed: int,
    expert: int | None = None,
) -> None:
    """Fills `local` with this part of a parameter."""
    local.copy_(initial_value(name, shape, std, seed, expert)[index].to(local.dtype))
