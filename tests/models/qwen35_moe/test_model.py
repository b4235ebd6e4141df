"""The model by itself: tied embeddings, and what stays float32."""

import torch

from models.ops.kernels import Kernels
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from tests.models.qwen35_moe.shapes import initial_weights, random_stream, run_model, tiny_config


def test_tied_embeddings_have_no_head() -> None:
    tied = initial_weights(tiny_config(tie_word_embeddings=True), seed=0)
    assert "lm_head.weight" not in tied
    assert "lm_head.weight" in initial_weights(tiny_config(), seed=0)


def test_decays_and_router_stay_float32_in_a_bfloat16_model() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen35Moe(tiny_config(), Kernels(attention="sdpa"))
    finally:
        torch.set_default_dtype(torch.float32)
    float32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert float32 == {n for n, _ in model.named_parameters() if n.endswith(("A_log", "dt_bias", "mlp.gate.weight"))}
    assert {id(p) for p in model.float32_parameters()} == {id(p) for n, p in model.named_parameters() if n in float32}
    init_weights(model, 0)
    tokens, positions, documents, labels = random_stream(model.config, [7, 70])
    loss, _ = run_model(model, tokens, positions, documents, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
