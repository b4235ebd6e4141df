"""Start-up self-test: the chosen kernels' values and gradients on this device against plain PyTorch's, on small inputs.

A compiler can be wrong without a word: Triton 3.4 to 3.7 on Hopper gave wrong gradients of the delta rule (issue 640 of
flash-linear-attention). Heads and widths are the model's own, since libraries compile and tune their kernels for those:
what is compiled here is what training runs.
"""

import functools
import hashlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import models.ops
import models.qwen35_moe.moe
from models.ops.attention import attention
from models.ops.causal_conv1d import causal_conv1d as parts_of_convolution
from models.ops.documents import Documents
from models.ops.gated_delta_rule import gated_delta_rule
from models.ops.grouped_experts import Projection
from models.ops.kernels import CHOICES, Kernels
from models.ops.labels import IGNORED
from models.ops.linear_cross_entropy import linear_cross_entropy
from models.ops.permute import ExpertOrder, sort_by_expert
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.moe import routed_experts as experts_of_projections

logger = logging.getLogger("train")

# Documents of one token, of less than a delta rule's chunk of 64, of one, of one and a token, and of several.
_LENGTHS = (1, 7, 150, 64, 1, 65)
_ONE_LENGTH = (144, 144)
_TUNING_LENGTHS = (2048,) * 4

# The largest |kernel - reference| / |reference|, in the 2-norm of a whole tensor. bfloat16: the delta rule, the longest
# chain, with all its intermediates rounded to bfloat16 is off by 0.5 %; four times that. float32: TensorFloat32, which
# matrix products may be allowed to use, rounds by up to 0.05 %; four times that.
_BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 2e-3}


class _Case(NamedTuple):
    operation: str
    backend: str
    """As in [kernels]; empty for an operation that chooses by itself, and is plain PyTorch for float64."""
    function: Callable[..., torch.Tensor]
    inputs: dict[str, torch.Tensor]
    """What it is differentiated by, in training's dtypes."""
    rest: tuple[Any, ...]
    """Its other arguments, after `inputs`."""


def check_kernels(
    kernels: Kernels, shape: ModelConfig, device: torch.device, dtype: torch.dtype, folder: Path | None = None
) -> list[str]:
    """Runs each operation whose kernel is not the reference, and the experts', in the compute dtype
    (bfloat16 or float32), and the reference in float64 on the same values.

    Returns what is wrong, a line an operation: which tensors, by how much, and the way out. Logs the largest error if
    nothing is. Random numbers come from generators of its own, and the memory is given back.

    folder: where a comparison without a fault is noted; one that was noted is not made again, until the kind of GPU, a
    version, the shape or the source of an operation is another.
    """
    note = None if folder is None else folder / _what_was_compared(kernels, shape, device, dtype)
    if note is not None and note.exists():
        logger.info(f"kernels agreed with plain PyTorch before, all being the same as now: noted in {note}")
        return []
    start, bound = time.perf_counter(), _BOUNDS[dtype]
    logger.info(
        "comparing kernels with plain PyTorch: seconds where they have been compiled before, two minutes on a bare "
        "machine (compile.cache_dir: where they are kept)"
    )
    wrong: list[str] = []
    errors: list[tuple[float, str]] = []
    for case in _cases(kernels, shape, device, dtype):
        if found := _compare(case, bound, errors):
            wrong.append(found)
    if kernels.cross_entropy == "compiled":
        torch.compiler.reset()  # having seen the shapes here, it would compile training's for shapes of any size
    del case  # and its memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the peak that a run reports is its training's
    if not wrong:
        error, where = max(errors)
        seconds = time.perf_counter() - start
        found = f"kernels agree with plain PyTorch: off by {error:.1e} at most ({where})"
        logger.info(f"{found}; {seconds:.1f} s")
        if note is not None:
            try:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{kernels}\n{found}\n", encoding="utf-8")
            except OSError as failure:  # a folder to read from alone, a full disk: they are compared again next time
                logger.warning(f"cannot note in {note} that kernels agree: {failure.strerror}")
    return wrong


_COMPILED_WITH = [
    *("flash-qla", "flash-linear-attention", "fla-core", "flash-attn-4"),
    *("triton", "tilelang", "apache-tvm-ffi", "nvidia-cutlass-dsl"),
]
"""Packages."""


def _what_was_compared(kernels: Kernels, shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """A name that is another one as soon as anything is that the comparison's result may hang on."""
    versions = [torch.__version__, torch.backends.cudnn.version(), torch.are_deterministic_algorithms_enabled()]
    for package in _COMPILED_WITH:
        found = list(importlib.metadata.distributions(name=package))
        versions.append(found[0].version if found else None)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    of_gpu = (gpu.name, gpu.major, gpu.minor, torch.version.cuda) if gpu else None
    # Of the blocks' number and order only which kinds there are: the same kernels run in every block of a kind.
    widths = vars(shape) | {"num_hidden_layers": 0, "layer_types": sorted(set(shape.layer_types))}
    digest = hashlib.sha256(repr((versions, of_gpu, kernels, widths, dtype)).encode())
    for file in (
        Path(__file__),
        Path(models.qwen35_moe.moe.__file__),
        *sorted(Path(models.ops.__path__[0]).glob("*.py")),
    ):
        digest.update(file.read_bytes())
    return f"kernels-agree-{digest.hexdigest()[:16]}"


def _cases(kernels: Kernels, shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[_Case]:
    # Shapes: those of each operation's file.
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    documents, num_tokens = Documents.from_lengths(_LENGTHS, device), sum(_LENGTHS)

    if kernels.attention != CHOICES["attention"][0]:
        for lengths in (_LENGTHS, _ONE_LENGTH) if kernels.attention != "varlen" else (_LENGTHS,):
            heads = {"q": shape.num_attention_heads, "k": shape.num_key_value_heads, "v": shape.num_key_value_heads}
            inputs = {name: random(sum(lengths), number, shape.head_dim) for name, number in heads.items()}
            yield _Case("attention", kernels.attention, attention, inputs, (Documents.from_lengths(lengths, device),))

    if shape.vision and (backend := kernels.vision_attention(shape.vision.head_dim)) != CHOICES["attention"][0]:
        size = (num_tokens, shape.vision.num_heads, shape.vision.head_dim)
        inputs = {name: random(*size) for name in "qkv"}
        yield _Case("attention", backend, functools.partial(attention, causal=False), inputs, (documents,))

    if kernels.gated_delta_rule != CHOICES["gated_delta_rule"][0]:

        def delta_rule(lengths: tuple[int, ...]) -> _Case:
            size = (sum(lengths), shape.linear_num_value_heads)
            q, k = (random(size[0], shape.linear_num_key_heads, shape.linear_key_head_dim) for _ in range(2))
            v = random(*size, shape.linear_value_head_dim)
            # From states that outlive a chunk to such that are gone with the next token.
            g = -(1.5 * random(*size).float() - 3).exp()
            inputs = {"q": q, "k": k, "v": v, "g": g, "beta": random(*size).sigmoid()}
            backend = kernels.gated_delta_rule
            return _Case(
                "gated_delta_rule", backend, gated_delta_rule, inputs, (Documents.from_lengths(lengths, device),)
            )

        if kernels.gated_delta_rule == "fla":
            # Triton tunes its kernels for these heads once and for all lengths: so the first call is a long one.
            _results(delta_rule(_TUNING_LENGTHS), "fla")
        yield delta_rule(_LENGTHS)

    if kernels.causal_conv1d != CHOICES["causal_conv1d"][0]:
        widths = (shape.key_dim, shape.key_dim, shape.value_dim)
        channels = sum(widths)
        inputs = {"x": random(num_tokens, channels), "weight": random(channels, 1, shape.linear_conv_kernel_dim)}
        yield _Case("causal_conv1d", kernels.causal_conv1d, causal_conv1d, inputs, (widths, documents))

    if kernels.cross_entropy != CHOICES["cross_entropy"][0]:
        weight = random(shape.vocab_size, 64, scale=1 / 8)
        own, labels = torch.randint(shape.vocab_size, (2, 64), generator=generator, device=device)
        # A token's `own` row takes about half its probability: else the softmax would be lost beside the label's 1.
        hidden = weight[own] * math.log(shape.vocab_size)
        labels[::3] = IGNORED
        inputs, chunk_size = {"hidden": hidden, "weight": weight}, 32
        yield _Case("cross_entropy", kernels.cross_entropy, linear_cross_entropy, inputs, (labels, chunk_size))

    # Many rows, none, few; and some choices of no expert here, whose rows are in the buffers and read by nobody.
    num_experts, top_k = 4, 3
    likely = torch.tensor([100.0, 0, 187, 10, 60]).expand(num_tokens, -1)
    # Drawn on a CPU: on a GPU that sums in an order of its own, which a deterministic run may refuse.
    chosen = torch.multinomial(likely, top_k, replacement=True, generator=torch.Generator().manual_seed(0)).to(device)
    hidden_size, inner = shape.hidden_size, shape.moe_intermediate_size
    inputs = {
        "x": random(num_tokens, hidden_size),
        "weights": random(num_tokens, top_k).float().sigmoid(),
        "gate_up_proj": random(num_experts, 2 * inner, hidden_size, scale=hidden_size**-0.5),
        "down_proj": random(num_experts, hidden_size, inner, scale=inner**-0.5),
    }
    yield _Case("routed_experts", "", routed_experts, inputs, (sort_by_expert(chosen, num_experts),))


def _compare(case: _Case, bound: float, errors: list[tuple[float, str]]) -> str:
    """What is wrong, in a line; empty if nothing is. Adds each tensor's relative error to `errors`."""
    expected = _reference(case)
    try:
        actual = _results(case, case.backend)
    except Exception as failure:  # whatever a library raises that does not import, or does not compile, here
        logger.debug(f"{case.operation} failed", exc_info=True)
        return _message(case, "does not run", _first_line(failure))
    of_case = {name: ((actual[name].double() - x).norm() / x.norm()).item() for name, x in expected.items()}
    errors += ((error, f"{case.operation}'s {name}") for name, error in of_case.items())
    bad = [f"{name} off by {error:.2g}" for name, error in of_case.items() if not error <= bound]  # NaN is bad
    if not bad:
        return ""
    found = f"{', '.join(bad)}, relative to plain PyTorch's (allowed: {bound:g})"
    return _message(case, "computes wrong numbers", found)


def causal_conv1d(*inputs: Any, backend: str) -> torch.Tensor:
    """The convolution's parts side by side."""
    return torch.cat(parts_of_convolution(*inputs, backend=backend), dim=-1)


def routed_experts(
    x: torch.Tensor, weights: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, order: ExpertOrder
) -> torch.Tensor:
    """All that experts do, of matrices without adapters."""
    return experts_of_projections(x, weights, order, Projection(gate_up_proj), Projection(down_proj))


def _results(case: _Case, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The output and each input's gradient, under a random cotangent that is the same in all calls."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in case.inputs.values()]
    out = case.function(*inputs, *case.rest, **({"backend": backend} if backend else {}))
    generator = torch.Generator(out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device).bfloat16()  # exact in all dtypes
    gradients = torch.autograd.grad(out, inputs, cotangent.to(out.dtype))
    return {"output": out.detach(), **{f"gradient of {name}": x for name, x in zip(case.inputs, gradients)}}


def _reference(case: _Case) -> dict[str, torch.Tensor]:
    """The results of plain PyTorch in float64; its cumsum has no deterministic form on CUDA."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return _results(case, CHOICES[case.operation][0] if case.backend else "", torch.float64)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _first_line(failure: Exception) -> str:
    """One that says something, cut where it is long."""
    line = next((line for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {line.strip()[:200]}"


def _message(case: _Case, what: str, found: str) -> str:
    """`what` it does instead of what it should."""
    anyway = "[kernels] self_test = false to go on anyway"
    if not case.backend:
        subject = f"{case.operation} (grouped_mm, or kernels around it)"
        return f"{subject} {what} here: {found}; another PyTorch, or {anyway}"
    choices = CHOICES[case.operation]
    slower = " or ".join(repr(c) for c in reversed(choices[: choices.index(case.backend)]))
    key = f"kernels.{case.operation} = {case.backend!r}"
    return f"{key} {what} here: {found}; use [kernels] {case.operation} = {slower}, or {anyway}"
