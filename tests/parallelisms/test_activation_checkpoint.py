"""Checkpointed blocks are compiled: under torch.compile each kind of block is one graph, in every mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.ops.kernels import Kernels
from models.qwen35_moe import attention, gated_delta_net
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.activation_checkpoint import apply_activation_checkpointing
from tests.models.qwen35_moe.shapes import random_stream, tiny_config


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_checkpointed_block_is_one_graph(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU's forms of these two break graphs; GPUs' do not. What they compute does not matter here.
    monkeypatch.setattr(attention, "attention", lambda q, k, v, documents, backend: q * v.mean())
    monkeypatch.setattr(gated_delta_net, "gated_delta_rule", lambda q, k, v, g, *_, backend: v * g.mean().to(v.dtype))
    config = tiny_config()
    model = Qwen35Moe(config, Kernels())
    init_weights(model, 0)
    float32 = {id(parameter) for parameter in model.float32_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in float32:
            parameter.data = parameter.data.bfloat16()  # grouped products compile in bfloat16 alone
    apply_activation_checkpointing(model.blocks, mode)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter)
    tokens, positions, documents, labels = random_stream(config, [40, 24])
    loss, _ = model(tokens, positions, documents, labels)
    loss.backward()
    assert counter.frame_count == len(set(config.layer_types)) == 2
