"""Tokens a second of the fastest stack around transformers that we know, on the work of throughput.py, to compare with.

    python -m benchmarks.transformers_stack --config benchmarks/one_gpu_35b.toml [--section.key value ...]

One GPU. transformers' model with grouped_mm for the experts, flash-linear-attention's delta rule (by flash-qla, where
that is installed) and convolution, Liger's fused cross-entropy, activation checkpointing, and weights and fused AdamW
in pure bfloat16. Needs the packages flash-linear-attention and liger-kernel. `--steps N` as in throughput.py.
"""

import argparse
import importlib.util
import sys
import time
from typing import Any

import torch
import transformers
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from benchmarks.throughput import NUM_WARMUP_STEPS, report
from config.options import Config
from config.reading import load_config, model_config
from errors import OneLineParser, exit_on_error
from training.flops import flops_per_token, peak_flops


def use_fast_convolution() -> None:
    """transformers looks for a package that few have; flash-linear-attention's convolution takes its place."""
    from fla.modules.conv import causal_conv1d

    def convolution(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, activation: Any = None, **_: Any) -> Any:
        tokens_first = x.transpose(1, 2).contiguous()
        return causal_conv1d(x=tokens_first, weight=weight, bias=bias, activation=activation)[0].transpose(1, 2)

    modeling_qwen3_5_moe.causal_conv1d_fn = convolution


def measure(config: Config, num_steps: int) -> dict[str, Any]:
    """Times optimizer steps on rows of one random document each, waiting for the GPU after each."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    training, shape = config.training, model_config(config)
    use_fast_convolution()
    hf_config = transformers.Qwen3_5MoeTextConfig(**shape.to_dict())
    hf_config._attn_implementation, hf_config._experts_implementation = "sdpa", "grouped_mm"
    torch.manual_seed(config.job.seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Qwen3_5MoeForCausalLM(hf_config).train()
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
    cross_entropy = LigerFusedLinearCrossEntropyLoss()
    size = (training.local_batch_size, training.sequence_length)

    def step() -> torch.Tensor:
        tokens = torch.randint(shape.vocab_size, size, device="cuda")
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        loss = cross_entropy(model.lm_head.weight, hidden.flatten(0, 1), tokens.roll(-1, dims=1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return loss

    seconds = []
    for number in range(NUM_WARMUP_STEPS + num_steps):
        start = time.perf_counter()
        loss = step()
        if number >= NUM_WARMUP_STEPS:
            seconds.append(time.perf_counter() - start)
    median = sorted(seconds)[len(seconds) // 2]
    rate = size[0] * size[1] / median
    flops = flops_per_token(shape, training.sequence_length)
    peak = peak_flops(torch.cuda.get_device_name())
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "step_seconds": round(median, 4),
        "tokens_per_second_per_device": round(rate),
        "tflops_per_device": round(flops * rate / 1e12, 1),
        "mfu": round(flops * rate / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss": round(loss.item(), 4),
    }


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", default="", metavar="FILE", help="also add a JSON line to FILE")
    options, rest = parser.parse_known_args(arguments)
    missing = [name for name in ("fla", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing or not torch.cuda.is_available():
        parser.error(f"expected a CUDA GPU and the packages fla and liger_kernel; not here: {missing or 'the GPU'}")
    report(measure(load_config(rest), options.steps), options.json)


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
