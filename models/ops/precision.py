"""Where low precision is not enough: the dtype in which norms, softmaxes and decays are computed."""

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float16 become float32; float32 and float64 (the oracle's dtype) stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
