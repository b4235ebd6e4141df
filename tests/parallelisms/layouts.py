"""Trains the same tiny model in any layout, for tests that compare layouts with one process on the whole batch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from config import MoE, Optimizer, Training
from data.loader import MicroBatch
from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Router
from parallelisms.mesh import Meshes, build_meshes
from parallelisms.parallelize import materialise, parallelize_fn
from tests.models.qwen35_moe.shapes import random_stream
from train import StepResult, reduce_result, train_step
from training.optimizer import build_optimizer

TRAINING = Training(steps=5, sequence_length=64, global_batch_size=4)
OFF = MoE()


@dataclass(frozen=True)
class Layout:
    """How the ranks of a test share the work; micro-batches a rank and step: `accumulation`."""

    world: int = 1
    ep: int = 1
    replicate: int = 1
    accumulation: int = 1
    activation_checkpoint: str = "none"
    compile: bool = False
    adam_eps: float = 1e-4
    """With Adam's default of 1e-8 weights drift by noise divided by noise: then only the update's norm compares."""

    def __str__(self) -> str:
        changed = {key: value for key, value in vars(self).items() if value != getattr(Layout, key)}
        return " ".join(f"{key}={value}" for key, value in changed.items()) or "world=1"


@dataclass
class Run:
    """What a layout did. Tensors are full (gathered), float32, on the CPU."""

    initial_weights: dict[str, torch.Tensor]
    first_gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    losses: list[float]
    grad_norms: list[float]
    aux_losses: list[float]
    z_losses: list[float]
    expert_counts: torch.Tensor  # of the first step, over all ranks [L, E]
    smallest_gap: float  # between a token's k-th and next logit, over all tokens, layers and steps: how far from a tie


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A detached copy of the whole tensor, gathered if it is sharded (a collective)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def rows_as_micro_batch(config: ModelConfig, rows: list[list[int]], seed: int) -> MicroBatch:
    """Rows of documents with these lengths, laid end to end; a row's content depends on its own lengths and seed."""
    parts = [random_stream(config, lengths, seed + index) for index, lengths in enumerate(rows)]
    tokens, positions, _, labels = (list(column) for column in zip(*parts))
    return MicroBatch(
        tokens=torch.cat(tokens),
        labels=torch.cat(labels),
        positions=torch.cat(positions),
        lengths=[length for lengths in rows for length in lengths],
    )


@contextmanager
def forced_routing(experts: tuple[int, ...]) -> Iterator[None]:
    """Sends every token to these experts, whatever the router prefers; with none, leaves the router alone."""

    def forward(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(experts).expand(len(x), -1)
        logits = torch.nn.functional.linear(x, self.weight)
        probabilities = logits.softmax(dim=-1)
        weights = probabilities.gather(1, chosen)
        return weights / weights.sum(dim=-1, keepdim=True), chosen, logits, probabilities

    original = Router.forward
    if experts:
        Router.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Router.forward = original  # type: ignore[method-assign]


def build(
    config: ModelConfig, layout: Layout, compute_dtype: torch.dtype = torch.float32
) -> tuple[Qwen35Moe, Meshes, torch.optim.Optimizer]:
    """The parallelised model with its initial weights, as train.py builds it."""
    assert dist.get_world_size() == layout.world
    torch.compiler.reset()
    meshes = build_meshes("cpu", layout.replicate, layout.world // layout.replicate, layout.ep)
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels(attention="sdpa"))
    parallelize_fn(
        model,
        meshes,
        compute_dtype=compute_dtype,
        activation_checkpoint=layout.activation_checkpoint,
        compile_blocks=layout.compile,
    )
    # A seed whose gradients of A_log and dt_bias are not sums that nearly cancel: inductor's exp differs from eager's
    # in the last bit, and with seed 3 those sums make 2e-5 of it.
    materialise(model, torch.device("cpu"), seed=4)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3, eps=layout.adam_eps, weight_decay=0.1))
    return model, meshes, optimizer


def own_batches(config: ModelConfig, layout: Layout, rows: list[list[int]], seed: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step; `rows` as in `train`."""
    per_micro_batch = len(rows) // (layout.world * layout.accumulation)
    starts = range(dist.get_rank() * per_micro_batch, len(rows), layout.world * per_micro_batch)
    return [rows_as_micro_batch(config, rows[start : start + per_micro_batch], seed + start) for start in starts]


def step(
    model: Qwen35Moe,
    meshes: Meshes,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    moe: MoE = OFF,
) -> StepResult:
    """One optimizer step, as train.py makes it; the result is this rank's."""
    trained = torch.tensor(sum(int((batch.labels != -100).sum()) for batch in batches))
    dist.all_reduce(trained)
    return train_step(model, optimizer, batches, int(trained), meshes, torch.device("cpu"), TRAINING, moe)


def train(config: ModelConfig, layout: Layout, rows: list[list[int]], num_steps: int, moe: MoE = OFF) -> Run:
    """Runs on every rank of an initialised process group of `layout.world` ranks.

    `rows`: the global batch as document lengths a row, cut into as many parts as there are micro-steps; of each, rank r
    takes the r-th part. So layouts with the same accumulation have the same tokens in each micro-step.
    """
    model, meshes, optimizer = build(config, layout)
    run = Run({n: full(p) for n, p in model.named_parameters()}, {}, {}, [], [], [], [], torch.empty(0), math.inf)

    def keep_gradients(*_) -> None:
        if not run.first_gradients:
            run.first_gradients.update({n: full(p.grad) for n, p in model.named_parameters()})

    def keep_smallest_gap(router: Router, inputs: tuple[torch.Tensor, ...], _) -> None:
        largest = torch.nn.functional.linear(inputs[0], router.weight).topk(config.num_experts_per_tok + 1)[0]
        run.smallest_gap = min(run.smallest_gap, (largest[:, -2] - largest[:, -1]).min().item())

    optimizer.register_step_pre_hook(keep_gradients)
    if layout.world == 1 and not layout.compile and config.num_experts_per_tok < config.num_experts:
        for block in model.blocks:
            block.mlp.gate.register_forward_hook(keep_smallest_gap)
    for number in range(num_steps):
        batches = own_batches(config, layout, rows, 1000 * number)
        result = reduce_result(step(model, meshes, optimizer, batches, moe))
        run.losses.append(result.loss.item())
        run.grad_norms.append(result.grad_norm.item())
        run.aux_losses.append(result.aux_loss.item())
        run.z_losses.append(result.z_loss.item())
        if number == 0:
            run.expert_counts = result.expert_counts
    run.weights = {n: full(p) for n, p in model.named_parameters()}
    return run


def train_layouts(
    config: ModelConfig, layouts: list[Layout], rows: list[list[int]], num_steps: int, experts: tuple[int, ...] = ()
) -> list[Run]:
    """What one spawn of a world size does: all its layouts, one after the other."""
    with forced_routing(experts):
        return [train(config, layout, rows, num_steps) for layout in layouts]
