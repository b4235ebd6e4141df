"""How many floating-point operations tokens and images cost, and what the hardware could do."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from config.options import Lora
from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.parameters import adapter_parameters_per_token, matmul_parameters_per_token
from models.qwen35_moe.vision_config import VisionConfig

WITHOUT = Lora()

# Dense bf16 peak of one device in FLOP/s, from the vendor's datasheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12}


def flops_per_token(
    config: ModelConfig, sequence_length: int, lora: Lora = WITHOUT, trains_trunk: bool = True
) -> float:
    """Forward and backward FLOPs a trained token needs; recomputation is not counted.

    6 for each parameter of a matrix product that the token passes (its k experts, the shared expert, the router, the
    head; not the embedding look-up), 6 * S * heads * head_dim for each full-attention layer (causal: half of S on
    average, forward and backward), and 18 * value_heads * K * Kv for each gated-delta-rule layer. With adapters the
    weights are frozen and have no gradient: 4 for each of their parameters, 6 for each of the adapters'. Of multi-token
    prediction the same as without adapters, and the head once more. Without `trains_trunk` the trunk runs forward
    alone, a third of that, and the head's weights take no gradient.
    """
    num_full = config.layer_types.count(FULL)
    of_full_layer = 6 * sequence_length * config.num_attention_heads * config.head_dim
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    delta_rule = (config.num_hidden_layers - num_full) * 18 * state
    in_trunk = matmul_parameters_per_token(replace(config, mtp_num_hidden_layers=0))
    products = 6 * in_trunk
    if lora.rank:
        products = 4 * in_trunk + 6 * adapter_parameters_per_token(config, lora.rank, lora.targets)
    trunk = products + num_full * of_full_layer + delta_rule
    if not config.mtp_num_hidden_layers:
        return trunk
    of_head = (6 if trains_trunk else 4) * config.vocab_size * config.hidden_size
    in_mtp = matmul_parameters_per_token(config) - in_trunk
    of_mtp = 6 * in_mtp + config.mtp_num_hidden_layers * of_full_layer + of_head
    return (trunk if trains_trunk else trunk / 3) + of_mtp


def peak_flops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU by its name, FLOP/s; None for one that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def peak_flops_of_all(num_devices: int, device: torch.device) -> float | None:
    """The dense bf16 peak of all devices together, FLOP/s; None on CPUs and unknown GPUs."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else peak * num_devices


def vision_flops(config: VisionConfig, frames: Sequence[int], trains_blocks: bool, trains_merger: bool) -> int:
    """FLOPs that the tower needs for frames of so many patches each; recomputation is not counted.

    Forward: 2 for each parameter of a matrix product that a patch passes (its embedding, the blocks) or a token (the
    merger), and 4 * hidden * patches^2 for a frame's attention in each block. The backward pass is twice that, of what
    it reaches: nothing of a frozen tower, the merger alone where nothing before it is trained.
    """
    width, merged = config.hidden_size, config.patches_per_token * config.hidden_size
    of_block = 4 * width**2 + 2 * width * config.intermediate_size
    of_merger = merged**2 + merged * config.out_hidden_size
    num_patches = sum(frames)
    blocks = 2 * num_patches * (config.patch_values * width + config.depth * of_block)
    blocks += config.depth * 4 * width * sum(length**2 for length in frames)
    merger = 2 * (num_patches // config.patches_per_token) * of_merger
    return blocks * (3 if trains_blocks else 1) + merger * (3 if trains_blocks or trains_merger else 1)
