"""Trains the same tiny model in any layout, for tests that compare layouts with one process on the whole batch."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from config.options import Lora, MoE, Mtp, Optimizer, Training
from data.batch import Frame, MicroBatch, Row
from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.ops.precision import at_least_float32
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.init import init_weights, initial_value
from models.qwen35_moe.lora import add_adapters
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Router
from models.qwen35_moe.parts import part_of
from models.qwen35_moe.vision_config import VisionConfig
from parallelisms.context_parallel import share_of
from parallelisms.degrees import Degrees
from parallelisms.mesh import Meshes, build_meshes
from parallelisms.parallelize import local_region, parallelize_fn
from tests.models.qwen35_moe.shapes import Stream, random_stream
from tests.models.qwen35_moe.vision_shapes import random_pixels
from train import build_on_meta
from training.optimizer import NamedAdamW, build_optimizer
from training.step import Stepper, StepResult

TRAINING = Training(steps=5, sequence_length=64, global_batch_size=4)
OFF = MoE()
MTP = Mtp(train="joint", loss_weight=0.3)  # for models that have it
NO_LORA = Lora()


@dataclass(frozen=True)
class Layout:
    """How the ranks of a test share the work; micro-batches a rank and step: `accumulation`."""

    world: int = 1
    ep: int = 1
    cp: int = 1
    replicate: int = 1
    accumulation: int = 1
    activation_checkpoint: str = "none"
    compile: bool | str = False
    """True: as train.py does it. A string: by that backend. "aot_eager" runs graphs as they were traced, forward and
    backward, and "eager" only the forward's: to make kernels takes most of the time, and test_layouts.py,
    test_context_parallel.py and one layout of each feature that changes graphs do it."""
    room: float = 0.0
    reshard: str = "auto"
    hosts: int = 1
    """Over which torchrun would have told the ranks that they are spread."""
    masters: torch.dtype = torch.float32
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
    mtp_losses: list[float]
    smallest_gap: float  # between a token's k-th and next logit, over all tokens, layers and steps: how far from a tie


def materialise(model: Qwen35Moe, device: torch.device, seed: int) -> None:
    """Gives a parallelised meta-device model its memory and its initial weights, this rank's part alone. The adapters'
    B, which begins at zero and would hide errors in A, is drawn too."""
    model.to_empty(device=device)
    init_weights(model, seed, local_region)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "lora_B.weight")):
            local, box = local_region(parameter)
            drawn = initial_value(f"{name} drawn", parameter.shape, 0.1, seed)
            local.detach().copy_(drawn[tuple(slice(*edges) for edges in box)])


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor on the CPU, gathered if it is sharded (a collective)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().to("cpu", copy=True)


def rows_as_micro_batch(
    config: ModelConfig, rows: list[list[int]], seed: int, frames: Sequence[Sequence[Frame]] = ()
) -> MicroBatch:
    """Rows of documents with these lengths, laid end to end; a row's content depends on its own lengths and seed.

    `frames`: of a model with a tower, what each row shows.
    """
    parts = [random_stream(config, lengths, seed + index) for index, lengths in enumerate(rows)]
    if config.vision is not None:
        streams = zip(parts, rows, frames, strict=True)
        shown = [_row(config.vision, *stream, seed + index) for index, stream in enumerate(streams)]
        return MicroBatch.of(shown, may_fill=False, vision=config.vision)
    tokens, positions, _, labels = (list(column) for column in zip(*parts))
    return MicroBatch(
        tokens=torch.cat(tokens),
        labels=torch.cat(labels),
        positions=torch.cat(positions),
        documents=Documents.from_lengths(
            [length for lengths in rows for length in lengths],
            max_seqlen=max(TRAINING.sequence_length, *map(sum, rows)),
        ),
    )


def _row(vision: VisionConfig, stream: Stream, lengths: list[int], frames: Sequence[Frame], seed: int) -> Row:
    """Frames of noise in a stream of text: their tokens stand for text there, and nothing learns to predict them."""
    for place, height, width in frames:
        end = place + height * width // vision.patches_per_token
        stream.tokens[place:end] = vision.image_token_id
        stream.labels[max(place - 1, 0) : end - 1] = -100
    pixels = random_pixels(vision, [(height, width) for _, height, width in frames], seed).numpy() if frames else None
    return Row(stream.tokens.int().numpy(), stream.labels.int().numpy(), lengths, 0, (), [], frames, pixels)


@contextmanager
def forced_routing(experts: tuple[int, ...], by_token: bool = False) -> Iterator[None]:
    """Sends every token to these experts, whatever the router prefers; with none, leaves the router alone.

    by_token: to those so many further on as its number in the vocabulary says, so that every expert has work and none
    of it depends on rounding.
    """
    tokens_of_batch: list[torch.Tensor] = []

    def keep_tokens(self: Qwen35Moe, batch: MicroBatch, *others: Any) -> Any:
        tokens_of_batch[:] = [batch.tokens]
        return original_model(self, batch, *others)

    def forward(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(experts, device=x.device).expand(len(x), -1)
        if by_token:
            chosen = (chosen + tokens_of_batch[0].unsqueeze(-1)) % len(self.weight)
        logits = torch.nn.functional.linear(at_least_float32(x), self.weight)
        probabilities = logits.softmax(dim=-1)
        weights = probabilities.gather(1, chosen)
        return weights / weights.sum(dim=-1, keepdim=True), chosen, logits, probabilities

    original, original_model = Router.forward, Qwen35Moe.forward
    if experts:
        Router.forward, Qwen35Moe.forward = forward, keep_tokens  # type: ignore[method-assign]
    try:
        yield
    finally:
        Router.forward, Qwen35Moe.forward = original, original_model  # type: ignore[method-assign]


@contextmanager
def compiling_by(backend: str | Callable) -> Iterator[None]:
    """What is given to torch.compile in here is compiled by this backend."""
    compile_by_default = torch.compile
    torch.compile = functools.partial(compile_by_default, backend=backend)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_by_default


def build(
    config: ModelConfig,
    layout: Layout,
    compute_dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    is_trained: Callable[[str], bool] = lambda name: True,
    lora: Lora = NO_LORA,
) -> tuple[Qwen35Moe, Meshes, NamedAdamW]:
    """The parallelised model with its initial weights, as train.py builds it; `is_trained`: by a parameter's name."""
    assert dist.get_world_size() == layout.world
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % (layout.world // layout.hosts))
    torch.compiler.reset()
    degrees = Degrees(layout.replicate, layout.world // layout.replicate, layout.ep, layout.cp)
    meshes = build_meshes(device_type, degrees, layout.room)
    model = build_on_meta(config, Kernels(attention="sdpa"), layout.masters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    if lora.rank:
        add_adapters(model, lora.rank, lora.alpha, lora.targets)
    with compiling_by(layout.compile if isinstance(layout.compile, str) else "inductor"):
        parallelize_fn(
            model,
            meshes,
            compute_dtype=compute_dtype,
            activation_checkpoint=layout.activation_checkpoint,
            compile_blocks=bool(layout.compile),
            reshard_after_forward=layout.reshard,
        )
    # A seed whose gradients of A_log and dt_bias are not sums that nearly cancel: inductor's exp differs from eager's
    # in the last bit, and with seed 3 those sums make 2e-5 of it.
    materialise(model, torch.device(device_type), seed=4)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3, eps=layout.adam_eps, weight_decay=0.1))
    return model, meshes, optimizer


def own_batches(
    config: ModelConfig, layout: Layout, rows: list[list[int]], seed: int, frames: Sequence[Sequence[Frame]] = ()
) -> list[MicroBatch]:
    """This rank's micro-batches of a step; `rows` as in `train`, `frames` of each row."""
    reader, rank_of_group = divmod(dist.get_rank(), layout.cp)
    num_readers = layout.world // layout.cp
    per_micro_batch = len(rows) // (num_readers * layout.accumulation)
    starts = range(reader * per_micro_batch, len(rows), num_readers * per_micro_batch)
    parts = [slice(start, start + per_micro_batch) for start in starts]
    batches = [rows_as_micro_batch(config, rows[part], seed + part.start, frames[part]) for part in parts]
    batches = [batch.with_mtp_labels() for batch in batches] if config.mtp_num_hidden_layers else batches
    return [share_of(batch, rank_of_group, layout.cp, config.vision) if layout.cp > 1 else batch for batch in batches]


def count_tokens(batches: list[MicroBatch]) -> list[int]:
    """How many tokens the global batch trains, and how many multi-token prediction does; `batches` are this rank's."""
    numbers = torch.tensor([[batch.num_trained, batch.num_drafted] for batch in batches]).sum(dim=0)
    dist.all_reduce(numbers)
    return numbers.tolist()


def step(
    model: Qwen35Moe,
    meshes: Meshes,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    moe: MoE = OFF,
    of_all_ranks: bool = False,
) -> StepResult:
    """One optimizer step, as train.py makes it; the result is this rank's, or that of all ranks together."""
    device = torch.device(meshes.data_parallel.device_type)
    stepper = Stepper(model, optimizer, meshes, device, TRAINING, moe, MTP)
    return stepper.launch(batches, *count_tokens(batches), of_all_ranks=of_all_ranks).result()


def train(
    config: ModelConfig,
    layout: Layout,
    rows: list[list[int]],
    num_steps: int,
    moe: MoE = OFF,
    compute_dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    frames: Sequence[Sequence[Sequence[Frame]]] = (),
    frozen: Sequence[str] = (),
    lora: Lora = NO_LORA,
) -> Run:
    """Runs on every rank of an initialised process group of `layout.world` ranks.

    `rows`: the global batch as document lengths a row, cut into as many parts as there are micro-steps; of each, data
    rank r takes the r-th part. So layouts with the same accumulation have the same tokens in each micro-step. `frames`:
    of each step, and then again from the first, what each row shows. `frozen`: parts that are not trained.
    """
    model, meshes, optimizer = build(
        config, layout, compute_dtype, device_type, lambda n: part_of(n) not in frozen, lora
    )
    run = Run({n: full(p) for n, p in model.named_parameters()}, {}, {}, [], [], [], [], torch.empty(0), [], math.inf)

    def keep_gradients(*_) -> None:
        if not run.first_gradients and not optimizer.found_inf:  # not of a step that is made anew
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            run.first_gradients.update({n: full(p.grad) for n, p in trained})

    def keep_smallest_gap(router: Router, inputs: tuple[torch.Tensor, ...], _) -> None:
        largest = torch.nn.functional.linear(at_least_float32(inputs[0]), router.weight).topk(
            config.num_experts_per_tok + 1
        )[0]
        run.smallest_gap = min(run.smallest_gap, (largest[:, -2] - largest[:, -1]).min().item())

    optimizer.register_step_pre_hook(keep_gradients)
    if layout.world == 1 and not layout.compile and config.num_experts_per_tok < config.num_experts:
        for block in model.blocks:
            block.mlp.gate.register_forward_hook(keep_smallest_gap)
    for number in range(num_steps):
        shown = frames[number % len(frames)] if frames else ()
        batches = own_batches(config, layout, rows, 1000 * number, shown)
        result = step(model, meshes, optimizer, batches, moe, of_all_ranks=True)
        run.losses.append(result.losses["loss"].item())
        run.mtp_losses.append(result.losses["mtp"].item())
        run.grad_norms.append(result.grad_norm.item())
        run.aux_losses.append(result.losses["aux_loss"].item())
        run.z_losses.append(result.losses["z_loss"].item())
        if number == 0:
            run.expert_counts = result.expert_counts
    run.weights = {n: full(p) for n, p in model.named_parameters()}
    return run


def train_layouts(
    config: ModelConfig,
    layouts: list[Layout],
    rows: list[list[int]],
    num_steps: int,
    experts: tuple[int, ...] = (),
    by_token: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    frames: Sequence[Sequence[Sequence[Frame]]] = (),
    frozen: Sequence[str] = (),
    lora: Lora = NO_LORA,
) -> list[Run]:
    """What one spawn of a world size does: all its layouts, one after the other; `experts` as in `forced_routing`."""
    with forced_routing(experts, by_token):
        return [
            train(config, layout, rows, num_steps, OFF, compute_dtype, device_type, frames, frozen, lora)
            for layout in layouts
        ]
