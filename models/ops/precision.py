"""The dtype of most arithmetic, and where that is not enough: norms, softmaxes and decays."""

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float16 become float32; float32 and float64 (the oracle's dtype) stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def compute_dtype(name: str, device_type: str) -> torch.dtype:
    """`training.dtype`, of activations and of weights in matrix products: "auto" is bfloat16 on a GPU, else float32."""
    if name == "auto":
        name = "bfloat16" if device_type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
