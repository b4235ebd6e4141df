"""Routing is decided once: recomputation that sees other numbers still takes each token to the forward's experts."""

import pytest
import torch

from models.qwen35_moe import moe
from models.qwen35_moe.moe import Router
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, build, full, own_batches, step

CONFIG = tiny_config(initializer_range=0.05, num_experts=16)
ROWS = [[5, 7], [8, 4]]
NUM_STEPS = 3


def perturbed_training(layout: Layout) -> dict[str, object]:
    """Trains while between each forward pass and its backward pass every router's weight is another one."""
    model, meshes, optimizer = build(CONFIG, layout)
    routers = [block.mlp.gate for block in model.blocks]
    kept: list[torch.Tensor] = []
    chosen: dict[Router, list[torch.Tensor]] = {router: [] for router in routers}
    inputs_of: dict[Router, torch.Tensor] = {}
    ends: list[torch.Tensor] = []
    would_move: list[float] = []
    gradients: list[dict[str, torch.Tensor]] = []

    def keep_choice(router: Router, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        chosen[router].append(output[1])
        inputs_of.setdefault(router, inputs[0].detach())

    @torch.no_grad()
    def perturb(*_: object) -> None:
        kept[:] = [router.weight.clone() for router in routers]
        for router in routers:
            router.weight.copy_(router.weight.flip(0))  # every token would choose mirrored experts
            now = torch.nn.functional.linear(inputs_of.pop(router), router.weight).topk(CONFIG.num_experts_per_tok)[1]
            would_move.append((now != chosen[router][-1]).double().mean().item())

    @torch.no_grad()
    def restore(*_: object) -> None:
        gradients.append({name: full(parameter.grad) for name, parameter in model.named_parameters()})
        for router, weight in zip(routers, kept):
            router.weight.copy_(weight)

    original = moe.grouped_experts

    def keep_ends(*args: torch.Tensor) -> torch.Tensor:
        ends.append(args[4])
        return original(*args)

    for router in routers:
        router.register_forward_hook(keep_choice)
    model.register_forward_hook(perturb)
    optimizer.register_step_pre_hook(restore)
    moe.grouped_experts = keep_ends
    try:
        results = [step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS, 0)) for _ in range(NUM_STEPS)]
    finally:
        moe.grouped_experts = original
    num_layers = len(routers)
    counts = results[0].expert_counts
    torch.distributed.all_reduce(counts)
    return {
        "moved": min(would_move),
        "choices": [[experts.tolist() for experts in calls] for calls in chosen.values()],
        # Blocks are recomputed from the last to the first.
        "forward ends": [e.tolist() for s in range(NUM_STEPS) for e in ends[2 * s * num_layers :][:num_layers]],
        "recomputed ends": [
            e.tolist() for s in range(NUM_STEPS) for e in ends[2 * s * num_layers :][num_layers : 2 * num_layers][::-1]
        ],
        "nonfinite": [result.nonfinite for result in results],
        "losses": [result.losses["loss"].item() for result in results],
        "used": (counts > 0).tolist(),
        "trained": [
            gradients[0][f"layers.{layer}.mlp.experts.down_proj"].flatten(1).abs().sum(dim=1).gt(0).tolist()
            for layer in range(num_layers)
        ],
    }


def train_all(layouts: list[Layout]) -> list[dict[str, object]]:
    return [perturbed_training(layout) for layout in layouts]


@pytest.mark.parametrize("world", [1, 2])
def test_perturbed_recomputation_keeps_the_experts(world: int) -> None:
    ep = world
    layouts = [Layout(world=world, ep=ep, activation_checkpoint=mode) for mode in ("selective", "full")]
    results = run_ranks(train_all, world, layouts)
    for layout, runs in zip(layouts, zip(*results)):
        for run in runs:
            assert run["moved"] > 0.8, layout  # routed anew, nearly all choices would be others
            for calls in run["choices"]:
                if ep == 1:
                    assert len(calls) == 2 * NUM_STEPS
                    assert calls[0::2] == calls[1::2], layout
                else:  # recomputation ends inside the router, with the last number that the backward pass needs of it
                    assert len(calls) == NUM_STEPS
            assert run["recomputed ends"] == run["forward ends"], layout
            assert run["nonfinite"] == [""] * NUM_STEPS
            # None but the experts that the forward pass chose have gradients (of those, not one that only documents'
            # last tokens chose, which predict nothing).
            for trained, used in zip(run["trained"], run["used"]):
                assert all(u or not t for t, u in zip(trained, used)), layout
                assert sum(trained) > 8
            assert not all(map(all, run["used"]))
        losses = [sum(losses) for losses in zip(*(run["losses"] for run in runs))]
        assert losses[2] < losses[1] < losses[0], layout
