"""Chooses, once at start-up, which implementation computes which operation."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion

from errors import UserError
from models.ops.causal_conv1d import MAX_TRITON_WIDTH


class Kernels(NamedTuple):
    """The chosen implementation of each operation that has more than one; the defaults run anywhere."""

    attention: str = "sdpa"
    """"sdpa", "varlen", "cudnn" or "fa4": see attention.py."""
    gated_delta_rule: str = "torch"
    """"torch", "fla" or "flash_qla": see gated_delta_rule.py."""
    causal_conv1d: str = "torch"
    """"torch" or "triton": see causal_conv1d.py."""
    cross_entropy: str = "torch"
    """"torch" or "compiled": see linear_cross_entropy.py."""

    def vision_attention(self, head_dim: int) -> str:
        """Of the vision tower, whose heads (72 wide) are not for FlashAttention 4."""
        if self.attention == "sdpa" or head_dim % 8 or head_dim > 256:
            return "sdpa"
        return "varlen" if self.attention == "varlen" else "cudnn"


CHOICES = {
    "attention": ("sdpa", "varlen", "cudnn", "fa4"),
    "gated_delta_rule": ("torch", "fla", "flash_qla"),
    "causal_conv1d": ("torch", "triton"),
    "cross_entropy": ("torch", "compiled"),
}
"""The reference first; then, as far as measured, each faster than the one before."""

MEASURED_ON = {"fa4": ((9, 0),)}
"""What "auto" takes on GPUs of these compute capabilities alone: elsewhere it was not measured against the others."""

# Of the earlier ones, 4.0.0b11 gives wrong gradients with these very heads on Blackwell: for real activations, not for
# random ones, so that no self-test would see it (TransformerEngine's issue 3216).
_FIRST_FA4 = "4.0.0b36"


def select_kernels(
    requested: Mapping[str, str],
    device_type: str,
    dtype: torch.dtype,
    delta_rule_head_dims: tuple[int, int],
    conv_width: int,
    attention_head_dim: int,
) -> Kernels:
    """Resolves `[kernels]` for a device, a compute dtype, and a model's `kernel_sizes`: the delta rule's (K, Kv), the
    convolution's taps and attention's K. "auto": the fastest that works.

    Raises UserError for a choice that cannot run here.
    """
    hinders = hindrances(device_type, dtype, delta_rule_head_dims, conv_width, attention_head_dim)

    def choose(operation: str, choice: str) -> str:
        choices = CHOICES[operation]
        if choice == "auto":
            choice = next(c for c in reversed(choices) if not hinders.get(c) and _is_measured(c))
        assert choice in choices, choice  # the options name the same: a test compares them
        if hinders.get(choice):
            possible = " or ".join(repr(c) for c in ("auto", *choices) if not hinders.get(c))
            raise UserError(f"kernels.{operation} = {choice!r} needs {hinders[choice]}: expected {possible}")
        return choice

    return Kernels(
        attention=choose("attention", requested.get("attention", "auto")),
        gated_delta_rule=choose("gated_delta_rule", requested.get("gated_delta_rule", "auto")),
        causal_conv1d=choose("causal_conv1d", requested.get("causal_conv1d", "auto")),
        cross_entropy=choose("cross_entropy", requested.get("cross_entropy", "auto")),
    )


def _is_measured(choice: str) -> bool:
    return choice not in MEASURED_ON or torch.cuda.get_device_capability() in MEASURED_ON[choice]


_LIBRARIES = {
    "compiled": ("torch._inductor.compile_fx",),
    "fa4": ("flash_attn.cute.interface",),
    "fla": ("fla.ops.gated_delta_rule.chunk",),
    "flash_qla": ("flash_qla.ops.gated_delta_rule.chunk",),
}


def import_ahead(kernels: Kernels, device: torch.device) -> threading.Thread:
    """Imports the kernels' libraries, which takes seconds, beside something else; to be joined before they are used.
    One that cannot be imported says so where it is used."""

    def run() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: libraries may look at it
        for library in (library for choice in kernels for library in _LIBRARIES.get(choice, ())):
            with contextlib.suppress(Exception):
                importlib.import_module(library)

    thread = threading.Thread(target=run, name="kernels", daemon=True)
    thread.start()
    return thread


def hindrances(
    device_type: str,
    dtype: torch.dtype,
    delta_rule_head_dims: tuple[int, int],
    conv_width: int,
    attention_head_dim: int,
) -> dict[str, str]:
    """Of each implementation that does not run anywhere, what it needs and lacks here; empty: nothing."""
    return {
        "varlen": _needs_half_precision(device_type, dtype),
        "cudnn": _needs_half_precision(device_type, dtype),
        "fa4": _needs_half_precision(device_type, dtype) or _fa4_hindrance(attention_head_dim),
        "fla": _needs_half_precision(device_type, dtype) or _fla_hindrance(),
        "flash_qla": _needs_half_precision(device_type, dtype) or _flash_qla_hindrance(delta_rule_head_dims),
        "triton": _triton_hindrance(device_type, conv_width),
        "compiled": "" if device_type == "cuda" else "a CUDA GPU",
    }


def _needs_half_precision(device_type: str, dtype: torch.dtype) -> str:
    works = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "" if works else f"a CUDA GPU and bfloat16, not {device_type} and {dtype}"


def _fa4_hindrance(head_dim: int) -> str:
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn-4"
    if TorchVersion(version) < _FIRST_FA4:
        return f"flash-attn-4 from {_FIRST_FA4} on, not {version}"
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0), (10, 3)):
        return "a GPU with compute capability 9.0, 10.0 or 10.3"
    # Of others it takes some, on Hopper with wrong gradients where they are no multiples of 32 (its pull request 2896).
    return "" if head_dim in (32, 64, 96, 128, 256) else f"a head dim of 32, 64, 96, 128 or 256, not {head_dim}"


def _triton_hindrance(device_type: str, conv_width: int) -> str:
    if device_type != "cuda":
        return "a CUDA GPU"
    return (
        "" if conv_width <= MAX_TRITON_WIDTH else f"a convolution of {MAX_TRITON_WIDTH} taps at most, not {conv_width}"
    )


def _fla_hindrance() -> str:
    """What keeps flash-linear-attention's Triton kernels from running here; empty if nothing does. It is not imported
    to ask it: it imports transformers and more, for seconds."""
    if importlib.util.find_spec("fla") is None:
        return "the package flash-linear-attention (requirements-gpu.txt)"
    import triton

    # Hopper as its own utils/hardware.py has it.
    if torch.cuda.get_device_capability()[0] == 9 and "3.4" <= TorchVersion(triton.__version__) < "3.7.1":
        return "on Hopper, Triton below 3.4 or from 3.7.1 on (between them gradients are wrong: its issue 640)"
    return ""


def _flash_qla_hindrance(head_dims: tuple[int, int]) -> str:
    if importlib.util.find_spec("flash_qla") is None:
        return "the package flash-qla (requirements-gpu.txt)"
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0), (10, 3)):
        return "a GPU with compute capability 9.0, 10.0 or 10.3"
    return "" if head_dims == (128, 128) else f"linear attention's head dims of 128, not {head_dims}"
