"""How many floating-point operations a token costs, and what the hardware could do."""

import torch

from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.parameters import matmul_parameters_per_token

# Dense bf16 peak of one device in FLOP/s, from the vendor's datasheets.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12}


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs a trained token needs; recomputation is not counted.

    6 for each parameter of a matrix product that the token passes (its k experts, the shared expert, the router, the
    head; not the embedding look-up), 6 * S * heads * head_dim for each full-attention layer (causal: half of S on
    average, forward and backward), and 18 * value_heads * K * Kv for each gated-delta-rule layer.
    """
    num_full = config.layer_types.count(FULL)
    attention = num_full * 6 * sequence_length * config.num_attention_heads * config.head_dim
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    delta_rule = (config.num_hidden_layers - num_full) * 18 * state
    return 6 * matmul_parameters_per_token(config) + attention + delta_rule


def peak_flops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU by its name, FLOP/s; None for one that is not in the table."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


def mfu_of_one_token_a_second(
    config: ModelConfig, sequence_length: int, num_devices: int, device: torch.device
) -> float | None:
    """Model FLOPs utilisation at one token a second over all devices; None on CPUs and unknown GPUs."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else flops_per_token(config, sequence_length) / (peak * num_devices)
