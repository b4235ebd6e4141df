"""Multi-token prediction by an independent loop: one document, token by token, plain tensors, nothing packed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from models.qwen35_moe.config import ModelConfig

# Shapes: n tokens of the document, H hidden, N query heads, Nkv key and value heads, K head dim.

Weights = Mapping[str, torch.Tensor]
"""The model's parameters by their names."""


class Drafts(NamedTuple):
    """Of one document."""

    logits: list[torch.Tensor]
    """At each token but the last, [V]: of the token after the next."""
    chosen: list[list[int]]
    """The experts that each of these tokens went to."""


def drafts(
    config: ModelConfig,
    weights: Weights,
    hidden: torch.Tensor,
    embedded: torch.Tensor,
    positions: Sequence[Sequence[int]],
) -> Drafts:
    """hidden [n, H] after the trunk's final norm; embedded [n, H], each token's own; each token's three positions."""
    eps = config.rms_norm_eps

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[f"mtp.{name}.weight"]
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + weight)

    def of_layer(name: str) -> torch.Tensor:
        return weights[f"mtp.layers.0.{name}"]

    head = weights["embed_tokens.weight"] if config.tie_word_embeddings else weights["lm_head.weight"]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    logits, chosen = [], []
    for i in range(len(hidden) - 1):
        both = torch.cat([norm(embedded[i + 1], "pre_fc_norm_embedding"), norm(hidden[i], "pre_fc_norm_hidden")])
        x = weights["mtp.fc.weight"] @ both

        y = norm(x, "layers.0.input_layernorm")
        queries_and_gates = (of_layer("self_attn.q_proj.weight") @ y).view(config.num_attention_heads, 2, -1)
        query = turn(config, norm(queries_and_gates[:, 0], "layers.0.self_attn.q_norm"), positions[i])
        key = (of_layer("self_attn.k_proj.weight") @ y).view(config.num_key_value_heads, -1)
        keys.append(turn(config, norm(key, "layers.0.self_attn.k_norm"), positions[i]))
        values.append((of_layer("self_attn.v_proj.weight") @ y).view(config.num_key_value_heads, -1))
        heads = []
        for n in range(config.num_attention_heads):
            group = n * config.num_key_value_heads // config.num_attention_heads
            scores = torch.stack([query[n] @ k[group] for k in keys]) / math.sqrt(config.head_dim)
            attended = sum(p * v[group] for p, v in zip(torch.softmax(scores, 0), values))
            heads.append(attended * torch.sigmoid(queries_and_gates[n, 1]))
        x = x + of_layer("self_attn.o_proj.weight") @ torch.cat(heads)

        y = norm(x, "layers.0.post_attention_layernorm")
        probabilities = torch.softmax(of_layer("mlp.gate.weight") @ y, 0)
        best = sorted(range(config.num_experts), key=lambda e: -probabilities[e].item())[: config.num_experts_per_tok]
        total = sum(probabilities[e] for e in best)
        routed = torch.zeros_like(x)
        for e in best:
            gate, up = (of_layer("mlp.experts.gate_up_proj")[e] @ y).chunk(2)
            down = of_layer("mlp.experts.down_proj")[e]
            routed = routed + probabilities[e] / total * (down @ (gate * torch.sigmoid(gate) * up))
        gate = of_layer("mlp.shared_expert.gate_proj.weight") @ y
        up = of_layer("mlp.shared_expert.up_proj.weight") @ y
        shared = of_layer("mlp.shared_expert.down_proj.weight") @ (gate * torch.sigmoid(gate) * up)
        x = x + routed + torch.sigmoid(of_layer("mlp.shared_expert_gate.weight") @ y) * shared

        logits.append(head @ norm(x, "norm"))
        chosen.append(best)
    return Drafts(logits, chosen)


def turn(config: ModelConfig, x: torch.Tensor, position: Sequence[int]) -> torch.Tensor:
    """x [heads, K] turned by a token's three positions: of pair p by its height for p = 1, 4, ..., its width for p = 2,
    5, ..., as far as mrope_section says, else by its time."""
    pairs = config.rotary_dim // 2
    turned = list(x.unbind(-1))
    for p in range(pairs):
        axis = p % 3 if p < 3 * config.mrope_section[p % 3] else 0
        angle = position[axis] / config.rope_theta ** (2 * p / config.rotary_dim)
        first, second = x[:, p], x[:, p + pairs]
        turned[p] = first * math.cos(angle) - second * math.sin(angle)
        turned[p + pairs] = second * math.cos(angle) + first * math.sin(angle)
    return torch.stack(turned, dim=-1)
