"""Chooses, once at start-up, which implementation computes which operation."""

from typing import NamedTuple

import torch


class Kernels(NamedTuple):
    """The chosen implementation of each operation that has more than one."""

    attention: str
    """"sdpa" or "varlen": see attention.py."""


def select_kernels(requested: dict[str, str], device_type: str, dtype: torch.dtype) -> Kernels:
    """Resolves `[kernels]` for a device and a compute dtype; "auto" is the fastest that works there.

    Raises ValueError for an unknown choice, and for one that cannot run on this device or dtype.
    """
    attention = requested.get("attention", "auto")
    varlen_works = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if attention not in ("auto", "sdpa", "varlen"):
        raise ValueError(f"kernels.attention = {attention!r}: expected 'auto', 'sdpa' or 'varlen'")
    if attention == "varlen" and not varlen_works:
        raise ValueError(f"kernels.attention = 'varlen' needs a CUDA GPU and bfloat16, not {device_type} and {dtype}")
    if attention == "auto":
        attention = "varlen" if varlen_works else "sdpa"
    return Kernels(attention=attention)
