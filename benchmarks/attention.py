"""Attention at the model's heads on a GPU: each backend against what the GPU could do, and against float32.

    python -m benchmarks.attention [--streams 4096x2,512x16,1000+3000+192] [--backends varlen,cudnn] [--json FILE]
    python -m benchmarks.attention --vision [--streams 8160x3] [--head-dim 128]

35B-A3B's heads: 16 of 256 with 2 of keys and values, causal; of the vision tower 16 of 72, to all patches. A stream is
of documents' lengths: `4096x2` are two of 4,096, `+` joins. Documents of one length let "cudnn" take cuDNN's kernel.
"""

import argparse
import json
import re
import sys

import torch
from torch.utils.benchmark import Timer

from errors import OneLineParser, UserError, exit_on_error
from models.ops.attention import attention
from models.ops.documents import Documents
from models.ops.kernels import CHOICES, hindrances
from training.flops import peak_flops

TEXT, VISION = (16, 2, 256), (16, 16, 72)
"""Heads of queries, heads of keys and values, and their size."""

_DOCUMENTS = r"[1-9]\d{0,7}(x[1-9]\d{0,5})?"
_STREAMS = {
    TEXT: "4096x2,512x16,64x128,4000+96+2048+2000+48,32768,20000+8000+4768",
    VISION: "8160x3,8160+4000+2040",
}


def lengths_of(stream: str) -> list[int]:
    """`4096x2+100` -> [4096, 4096, 100]. Raises UserError."""
    if not re.fullmatch(rf"{_DOCUMENTS}(\+{_DOCUMENTS})*", stream, re.ASCII):
        raise UserError(f"--streams: expected lengths like 4096x2+100, got {stream!r}")
    lengths: list[int] = []
    for part in stream.split("+"):
        length, _, times = part.partition("x")
        lengths += [int(length)] * int(times or 1)
    return lengths


def backends_of(asked: str, hinders: dict[str, str]) -> list[str]:
    """`varlen,cudnn` -> both; "": all kernels that nothing hinders. Raises UserError."""
    reference, *kernels = CHOICES["attention"]
    if not asked:
        return [backend for backend in kernels if not hinders[backend]]
    for backend in asked.split(","):
        if backend not in (reference, *kernels):
            raise UserError(f"--backends: expected some of {', '.join((reference, *kernels))}, got {backend!r}")
        if hinders.get(backend):
            raise UserError(f"--backends: {backend!r} needs {hinders[backend]}")
    return asked.split(",")


def measure(lengths: list[int], backend: str, heads: tuple[int, int, int], causal: bool) -> dict[str, object]:
    """Milliseconds forward and backward, the share of the peak by the FLOPs that attention needs, and the relative
    error of results and gradients against one document after the other in float32 (of streams up to 16,384 tokens)."""
    num_heads, num_kv, head_dim = heads
    documents, num_tokens = Documents.from_lengths(lengths, torch.device("cuda")), sum(lengths)
    sizes = [(num_tokens, n, head_dim) for n in (num_heads, num_kv, num_kv)]
    inputs = [torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    gradient = torch.randn(sizes[0], device="cuda", dtype=torch.bfloat16)

    def both(inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        out = attention(*inputs, documents, backend=backend, causal=causal)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]

    errors: list[float] = []
    if num_tokens <= 2**14:
        exact = both([x.detach().float().requires_grad_() for x in inputs], "sdpa")
        errors = [float((a - e).norm() / e.norm()) for a, e in zip(both(inputs, backend), exact)]
    names = {"f": attention, "x": inputs, "d": documents, "b": backend, "c": causal, "g": gradient, "torch": torch}
    forward = Timer("f(*x, d, backend=b, causal=c)", globals=names).blocked_autorange(min_run_time=0.5).median
    names["out"] = attention(*inputs, documents, backend=backend, causal=causal)
    backward = Timer("torch.autograd.grad(out, x, g, retain_graph=True)", globals=names)
    seconds = forward, backward.blocked_autorange(min_run_time=0.5).median
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    flops, peak = 4 * num_heads * head_dim * pairs, peak_flops(torch.cuda.get_device_name())
    return {
        "device": torch.cuda.get_device_name(),
        "backend": backend,
        "heads": heads,
        "documents": len(lengths),
        "longest": max(lengths),
        "tokens": num_tokens,
        "forward_ms": round(seconds[0] * 1e3, 3),
        "backward_ms": round(seconds[1] * 1e3, 3),
        "forward_share_of_peak": peak and round(flops / seconds[0] / peak, 3),
        "backward_share_of_peak": peak and round(2.5 * flops / seconds[1] / peak, 3),
        "errors": [float(f"{error:.2e}") for error in errors],
    }


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", action="store_true", help="the vision tower's heads")
    parser.add_argument("--head-dim", type=int, default=0, help="another size of heads, for comparison")
    parser.add_argument("--streams", default="", help="separated by commas")
    parser.add_argument("--backends", default="", help="separated by commas; default: all that run here")
    parser.add_argument("--json", default="", metavar="FILE", help="also add JSON lines to FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU")
    if options.head_dim < 0:
        parser.error(f"--head-dim = {options.head_dim}: expected a positive integer")
    own = VISION if options.vision else TEXT
    heads = (*own[:2], options.head_dim or own[2])
    backends = backends_of(options.backends, hindrances("cuda", torch.bfloat16, (128, 128), 4, heads[2]))
    for lengths in [lengths_of(stream) for stream in (options.streams or _STREAMS[own]).split(",")]:
        for backend in backends:
            line = measure(lengths, backend, heads, causal=not options.vision)
            print(line, flush=True)
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
