"""What of a run on a GPU goes by a path many times slower than it could, and what would have to change."""

import torch

from models.ops.grouped_experts import is_aligned
from models.ops.kernels import CHOICES, Kernels, hindrances
from models.qwen35_moe.config import ModelConfig


def slow_paths(
    kernels: Kernels, shape: ModelConfig, device_type: str, dtype: torch.dtype, compiles: bool = True
) -> list[str]:
    """A line each; none on a CPU, where every path is plain PyTorch. compiles: whether blocks are."""
    if device_type != "cuda":
        return []
    hinders = hindrances(device_type, dtype, *shape.kernel_sizes)
    found = [] if compiles else ["compile.enable = false: the host launches each operation of a block by itself"]
    for operation, (plain, *faster) in CHOICES.items():
        if getattr(kernels, operation) == plain:
            needs = [f"{choice!r} needs {hinders[choice]}" for choice in faster if hinders[choice]]
            found.append(f"kernels.{operation} = {plain!r}: {'; '.join(needs) or 'asked for'}")
    if shape.vision and kernels.attention != "sdpa" and kernels.vision_attention(shape.vision.head_dim) == "sdpa":
        found.append(
            f"attention of the vision tower: kernels need a head dim of 8, 16, ... 256, not {shape.vision.head_dim}"
        )
    for key in ("hidden_size", "moe_intermediate_size"):
        if not is_aligned(width := getattr(shape, key), dtype):
            found.append(
                f"the experts' products, one expert at a time: grouped_mm needs a multiple of 8, not {key} = {width}"
            )
    return found
