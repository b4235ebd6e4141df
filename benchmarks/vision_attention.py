"""Attention of the vision tower, at the width of its heads, on a GPU: each backend against what the GPU could do.

    python -m benchmarks.vision_attention [--grids 68x120,68x120,68x120] [--json FILE]

35B-A3B's tower: 16 heads of 72. Frames are given in patches; those of one size let cuDNN run.
"""

import argparse
import json
import sys

import torch
from torch.utils.benchmark import Timer

from errors import OneLineParser, exit_on_error
from models.ops.attention import attention
from models.ops.documents import Documents
from models.qwen35_moe.vision_config import VisionConfig
from training.flops import peak_flops


def measure(grids: list[tuple[int, int]]) -> list[dict[str, object]]:
    """Milliseconds forward and backward, and the share of the peak, of each backend; and of heads padded to 128."""
    config, lengths = VisionConfig(), [height * width for height, width in grids]
    documents = Documents.from_lengths(lengths, torch.device("cuda"))
    flops = 4 * config.hidden_size * sum(length**2 for length in lengths)
    peak, found = peak_flops(torch.cuda.get_device_name()), []
    for backend in ("varlen", "cudnn", "sdpa"):
        for head_dim in (config.head_dim, 64, 128):
            size = (sum(lengths), config.num_heads, head_dim)
            q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            names = {"f": attention, "q": q, "k": k, "v": v, "d": documents, "b": backend}
            forward = Timer("f(q, k, v, d, backend=b, causal=False)", globals=names).blocked_autorange(min_run_time=1)
            out = attention(q, k, v, documents, backend=backend, causal=False)
            names |= {"out": out, "g": torch.randn_like(out), "torch": torch}
            backward = Timer("torch.autograd.grad(out, (q, k, v), g, retain_graph=True)", globals=names)
            seconds = (forward.median, backward.blocked_autorange(min_run_time=1).median)
            of_head = flops * head_dim / config.head_dim
            found.append(
                {
                    "device": torch.cuda.get_device_name(),
                    "backend": backend,
                    "head_dim": head_dim,
                    "patches": lengths,
                    "forward_ms": round(seconds[0] * 1e3, 3),
                    "backward_ms": round(seconds[1] * 1e3, 3),
                    "forward_share_of_peak": peak and round(of_head / seconds[0] / peak, 3),
                    "backward_share_of_peak": peak and round(2.5 * of_head / seconds[1] / peak, 3),
                }
            )
    return found


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="68x120,68x120,68x120")
    parser.add_argument("--json", default="", metavar="FILE", help="also add JSON lines to FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU")
    grids = [(int(height), int(width)) for height, width in (grid.split("x") for grid in options.grids.split(","))]
    for line in measure(grids):
        print(line)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
