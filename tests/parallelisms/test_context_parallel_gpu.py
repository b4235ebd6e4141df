"""One long document over two GPUs in bfloat16, compiled and checkpointed, against the same document on each of them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.ops.kernels import select_kernels
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.context_parallel import own_share
from parallelisms.degrees import Degrees
from parallelisms.mesh import Meshes, build_meshes
from parallelisms.parallelize import parallelize_fn, reduce_replicated_gradients
from tests.distributed import needs_gpus, run_ranks
from tests.models.qwen35_moe.test_gpu import DECAYS, Run, gradient_errors, pin_routing
from tests.parallelisms.layouts import full, materialise, rows_as_micro_batch
from tests.parallelisms.test_gpu import CONFIG, forward_backward, this_device
from train import build_on_meta

pytestmark = needs_gpus(2)


def build(context: int, device: torch.device) -> tuple[Qwen35Moe, Meshes]:
    torch.compiler.reset()
    kernels = select_kernels({}, device.type, torch.bfloat16, *CONFIG.kernel_sizes)
    meshes = build_meshes(device.type, Degrees(1, dist.get_world_size(), 1, context))
    model = build_on_meta(CONFIG, kernels, torch.float32)
    options: dict[str, Any] = {"activation_checkpoint": "selective", "compile_blocks": True}
    parallelize_fn(model, meshes, compute_dtype=torch.bfloat16, **options)
    materialise(model, device, seed=0)
    return model, meshes


def train_on_a_document(length: int) -> dict[int, Run]:
    """Loss and gradients with context degree 1, where both ranks have the document and count half of it, and 2."""
    device = this_device()
    whole = rows_as_micro_batch(CONFIG, [[length]], seed=0)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(CONFIG.num_hidden_layers, length, CONFIG.num_experts, generator=generator)
    experts = scores.topk(CONFIG.num_experts_per_tok, dim=-1)[1]
    of_degrees: dict[int, Run] = {}
    for context in (1, 2):
        model, meshes = build(context, device)
        batch, part = whole, slice(None)
        if context > 1:
            size = length // context
            part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
            batch = own_share(whole, meshes.context_parallel, None)
        pin_routing(model, [of_layer[part].to(device) for of_layer in experts])
        loss = forward_backward(model, batch, device, whole.num_trained * 2 // context)
        (loss,) = reduce_replicated_gradients(model.float32_parameters(), loss.view(1), meshes.data_parallel)
        gradients = {name: full(parameter.grad).cpu() for name, parameter in model.named_parameters()}
        of_degrees[context] = Run(torch.empty(0), loss.cpu(), gradients)
        del model
        torch.cuda.empty_cache()
    return of_degrees


@pytest.mark.parametrize("length", [32_768, 131_072])
def test_two_gpus_compute_what_one_does(length: int) -> None:
    for runs in run_ranks(train_on_a_document, 2, length, seconds=600, device_type="cuda"):
        errors = gradient_errors(runs[2], runs[1])
        others = max(error for name, error in errors.items() if name not in DECAYS)
        of_decays = max(errors[name] for name in DECAYS)
        print(f"\n{length} tokens: loss {runs[2].loss:.6f}, one GPU {runs[1].loss:.6f}; gradients {others:.2%}")
        print(f"  decays {of_decays:.2%}")
        # The same kernels on the same numbers, in tiles of other heads and rows: as ep 2 and ep 1 in test_gpu.py.
        assert runs[2].loss.item() == pytest.approx(runs[1].loss.item(), rel=1e-4)
        assert others < 0.02
        assert of_decays < 0.05
