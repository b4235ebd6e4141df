"""Tokens a second of the fastest stack around transformers that we know, on the work of throughput.py, to compare with.

    python -m benchmarks.transformers_stack --config benchmarks/one_gpu_35b.toml [--section.key value ...]

One GPU. transformers' model with grouped_mm for the experts, flash-linear-attention's delta rule (by flash-qla, where
that is installed) and convolution, Liger's fused cross-entropy, activation checkpointing, and weights and fused AdamW
in pure bfloat16. With `lora.rank` peft's adapters on the same parts, in bfloat16 too. Needs the packages
flash-linear-attention and liger-kernel (and peft). `--steps N` as in throughput.py.
"""

import argparse
import importlib.util
import sys
import time
from typing import Any

import torch
import transformers
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from benchmarks.images import NONE, with_images
from benchmarks.throughput import NUM_WARMUP_STEPS, random_micro_batch, report
from checkpoint.adapters import Adapter, peft_config
from config.options import Config, Lora
from config.reading import load_config, model_config
from errors import OneLineParser, exit_on_error
from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.lora import add_adapters, is_adapter
from models.qwen35_moe.vision_config import VisionConfig
from train import build_on_meta
from training.flops import flops_per_token, peak_flops, vision_flops
from training.plan import Images, parse_images


def use_fast_convolution() -> None:
    """transformers looks for a package that few have; flash-linear-attention's convolution takes its place."""
    from fla.modules.conv import causal_conv1d

    def convolution(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, activation: Any = None, **_: Any) -> Any:
        tokens_first = x.transpose(1, 2).contiguous()
        return causal_conv1d(x=tokens_first, weight=weight, bias=bias, activation=activation)[0].transpose(1, 2)

    modeling_qwen3_5_moe.causal_conv1d_fn = convolution


def images_for_transformers(
    config: Config, vision: VisionConfig, images: Images, number: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The tokens [rows, S] of throughput.py's micro-batch of this number, and what transformers takes beside them."""
    batch = random_micro_batch(config, [], model_config(config).vocab_size, number)
    batch = with_images(batch, vision, images, number).to(torch.device("cuda"))
    assert batch.patches is not None
    tokens = batch.tokens.view(config.training.local_batch_size, -1)
    frames = batch.patches.frames.lengths()
    if not len(batch.patches.places):
        return tokens, {}
    height, width = batch.patches.grid[2:, 0].tolist()
    return tokens, {
        "pixel_values": (batch.patches.pixels.float() / 127.5 - 1).bfloat16(),
        "image_grid_thw": torch.tensor([(1, height, width)] * len(frames), device="cuda"),
        "mm_token_type_ids": (tokens == vision.image_token_id).int(),
    }


def with_adapters(model: transformers.PreTrainedModel, shape: ModelConfig, lora: Lora) -> torch.nn.Module:
    """The model wrapped by peft, with adapters on what ours has them on."""
    import peft

    ours = build_on_meta(shape, Kernels(), torch.bfloat16)
    add_adapters(ours, lora.rank, lora.alpha, lora.targets)
    adapter = Adapter(lora.rank, lora.alpha, lora.targets, base="", files={})
    values = peft_config(adapter, [name for name, _ in ours.named_parameters() if is_adapter(name)])
    chosen = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters")
    peft_options = peft.LoraConfig(**{key: values[key] for key in chosen})
    return peft.get_peft_model(model, peft_options, autocast_adapter_dtype=False)


def measure(config: Config, num_steps: int, images: Images | None = None) -> dict[str, Any]:
    """Times optimizer steps on rows of one random document each, waiting for the GPU after each. The parts that
    `model.freeze` names are "vision" and "merger" together, or none."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    training, shape = config.training, model_config(config)
    use_fast_convolution()
    if shape.vision:
        hf_config = transformers.Qwen3_5MoeConfig(**shape.to_dict())
        hf_config.text_config._experts_implementation = "grouped_mm"
        cls = transformers.Qwen3_5MoeForConditionalGeneration
    else:
        hf_config = transformers.Qwen3_5MoeTextConfig(**shape.to_dict())
        cls = transformers.Qwen3_5MoeForCausalLM
    hf_config._attn_implementation, hf_config._experts_implementation = "sdpa", "grouped_mm"
    torch.manual_seed(config.job.seed)
    started = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = cls(hf_config).train()
    if shape.vision:
        model.model.visual.requires_grad_(not config.model.freeze)
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora.rank:
        with_adapters(model, shape, config.lora)  # it puts them into the model
    built = time.perf_counter()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr, fused=True)
    cross_entropy = LigerFusedLinearCrossEntropyLoss()
    size = (training.local_batch_size, training.sequence_length)

    def step(number: int) -> torch.Tensor:
        tokens, extra = torch.randint(shape.vocab_size, size, device="cuda"), {}
        if shape.vision:
            tokens, extra = images_for_transformers(config, shape.vision, images or NONE, number)
        hidden = model.model(input_ids=tokens, use_cache=False, **extra).last_hidden_state
        loss = cross_entropy(model.lm_head.weight, hidden.flatten(0, 1), tokens.roll(-1, dims=1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return loss

    seconds = []
    for number in range(NUM_WARMUP_STEPS + num_steps):
        start = time.perf_counter()
        loss = step(number)
        print(f"step {number}: {time.perf_counter() - start:.3f} s", flush=True)
        if number >= NUM_WARMUP_STEPS:
            seconds.append(time.perf_counter() - start)
    # With images, steps have more and fewer of them in turn: then the mean is the work's.
    typical = sum(seconds) / len(seconds) if shape.vision else sorted(seconds)[len(seconds) // 2]
    rate = size[0] * size[1] / typical
    flops = flops_per_token(shape, training.sequence_length, config.lora)
    if shape.vision and images:
        trains = not config.model.freeze
        height, width = images.grid(shape.vision)
        tower = vision_flops(shape.vision, [height * width], trains, trains)
        flops += tower / (height * width // shape.vision.patches_per_token) * images.share
    peak = peak_flops(torch.cuda.get_device_name())
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "build_seconds": round(built - started, 1),
        "step_seconds": round(typical, 4),
        "tokens_per_second_per_device": round(rate),
        "tflops_per_device": round(flops * rate / 1e12, 1),
        "mfu": round(flops * rate / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss": round(loss.item(), 4),
    }


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", default="", metavar="HEIGHTxWIDTH:SHARE", help="as in throughput.py")
    parser.add_argument("--json", default="", metavar="FILE", help="also add a JSON line to FILE")
    options, rest = parser.parse_known_args(arguments)
    missing = [name for name in ("fla", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing or not torch.cuda.is_available():
        parser.error(f"expected a CUDA GPU and the packages fla and liger_kernel; not here: {missing or 'the GPU'}")
    report(measure(load_config(rest), options.steps, parse_images(options.images)), options.json)


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
