"""The tower beside the text: what of it keeps a graph, which collectives it adds, what it is compiled to."""

import functools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from data.batch import Frame
from models.ops.kernels import Kernels
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parts import part_of
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.collectives import Collective, recorded
from tests.parallelisms.layouts import Layout, build, full, own_batches, rows_as_micro_batch, step

VISION = tiny_vision()
CONFIG = tiny_config(vision=VISION)
ROWS = [[64]] * 4
FRAMES = [[Frame(3, 4, 6), Frame(20, 2, 2)], [], [Frame(0, 8, 8)], []]
FROZEN = {"nothing": (), "blocks": ("vision",), "tower": ("vision", "merger")}
MODES = ["none", "selective", "full"]


class Kept(NamedTuple):
    """What a step did with the tower."""

    requires_grad: list[bool]
    """Of what comes out of each block, and of the features."""
    num_saved: int
    """Tensors that the tower's forward kept for the backward pass."""
    num_recomputed: int
    """How often blocks ran in the backward pass."""
    gradients: set[str]
    state: set[str]
    moved: set[str]
    outside: dict[str, torch.dtype]
    """Parameters of the tower that are plain tensors."""


def look(layouts: list[Layout], frozen: tuple[str, ...], text: bool) -> list[Kept]:
    return [look_at(layout, frozen, text) for layout in layouts]


def look_at(layout: Layout, frozen: tuple[str, ...], text: bool) -> Kept:
    """A step under bfloat16."""

    def is_trained(name: str) -> bool:
        return part_of(name) not in frozen and (text or name.startswith("visual."))

    model, meshes, optimizer = build(CONFIG, layout, torch.bfloat16, is_trained=is_trained)
    assert model.visual is not None
    requires_grad: list[bool] = []
    num_saved, num_recomputed, is_in_tower = 0, 0, False
    gradients: set[str] = set()

    def enter(*_: object) -> None:
        nonlocal is_in_tower
        is_in_tower = True

    def leave(_: object, __: object, features: torch.Tensor) -> None:
        nonlocal is_in_tower
        is_in_tower = False
        requires_grad.append(features.requires_grad)

    def save(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal num_saved
        num_saved += is_in_tower
        return tensor

    def count(*_: object) -> None:
        nonlocal num_recomputed
        num_recomputed += not is_in_tower

    model.visual.register_forward_pre_hook(enter)
    model.visual.register_forward_hook(leave)
    for block in model.visual.vision_blocks:
        block.register_forward_hook(lambda _, __, out: requires_grad.append(out.requires_grad))
        block.attn.register_forward_hook(count)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(n for n, p in model.named_parameters() if p.grad is not None)
    )
    before = {name: full(parameter) for name, parameter in model.named_parameters()}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS[: layout.world], 0, FRAMES))
    parameters = dict(model.named_parameters())
    return Kept(
        requires_grad,
        num_saved,
        num_recomputed,
        gradients,
        {name.rpartition(".")[0] for name in optimizer.named_state()},
        {name for name, parameter in parameters.items() if not torch.equal(full(parameter), before[name])},
        {n: p.dtype for n, p in parameters.items() if "visual" in n and not isinstance(p, DTensor)},
    )


@pytest.mark.parametrize("text", [True, False], ids=["text trained", "text frozen"])
@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_has_no_graph_no_gradient_no_state(name: str, text: bool) -> None:
    frozen = FROZEN[name]
    if name == "tower" and not text:
        return  # nothing is left
    names = set(dict(build_on_meta().named_parameters()))
    trained = {n for n in names if part_of(n) not in frozen and (text or n.startswith("visual."))}
    layouts = [Layout(activation_checkpoint=mode) for mode in MODES] + [Layout(world=2)]
    (one,), (_, second) = run_ranks(look, 1, layouts[:3], frozen, text), run_ranks(look, 2, layouts[3:], frozen, text)
    saved: dict[str, int] = {}
    for layout, kept in zip(layouts, [*one, *second]):
        assert kept.requires_grad == [name == "nothing"] * VISION.depth + [name != "tower"], layout
        # A trained parameter that no gradient reaches, as the second rank's that shows nothing, has one of zeros.
        assert kept.gradients == kept.state == trained, layout
        assert kept.moved <= trained, layout
        assert {part_of(n) for n in kept.moved} == {part_of(n) for n in trained}, layout
        assert kept.outside == dict.fromkeys((n for n in names if part_of(n) in frozen), torch.bfloat16), layout
        saved.setdefault(layout.activation_checkpoint, kept.num_saved)
        again = VISION.depth if name == "nothing" and layout.activation_checkpoint != "none" else 0
        assert kept.num_recomputed == again, layout
    if name == "tower":
        assert set(saved.values()) == {0}
    elif name == "blocks":
        assert 0 < saved["none"] == saved["selective"] == saved["full"] < 20
    else:
        assert saved["none"] > 20 * VISION.depth
        assert saved["full"] < saved["none"] / 2


def build_on_meta() -> Qwen35Moe:
    with torch.device("meta"):
        return Qwen35Moe(CONFIG, Kernels())


def collectives(layouts: list[Layout], frozen: tuple[str, ...] | None) -> list[list[Collective]]:
    """Of a second step under bfloat16; `frozen` None: of the text model alone."""
    config = CONFIG if frozen is not None else replace(CONFIG, vision=None)
    found = []
    for layout in layouts:
        is_trained = functools.partial(_trains, frozen or ())
        model, meshes, optimizer = build(config, layout, torch.bfloat16, is_trained=is_trained)
        batches = own_batches(config, layout, ROWS, 0, FRAMES if frozen is not None else ())
        step(model, meshes, optimizer, batches)
        with recorded(meshes) as calls:
            step(model, meshes, optimizer, batches)
        found.append(calls)
    return found


def _trains(frozen: tuple[str, ...], name: str) -> bool:
    return part_of(name) not in frozen


def test_a_frozen_tower_adds_no_collective_and_a_trained_one_its_units() -> None:
    """Beside the text's: each unit is gathered for the forward and for the backward pass of each micro-batch, and its
    gradients are reduced once, on every rank, whatever it shows."""
    layouts = [Layout(world=2), Layout(world=2, accumulation=2), Layout(world=2, ep=2, activation_checkpoint="full")]
    without = run_ranks(collectives, 2, layouts, None)
    for frozen in FROZEN.values():
        units: dict[str, int] = {}  # each with its numbers of parameters, dimension 0 rounded up to two ranks
        for name, parameter in build_on_meta().named_parameters():
            if name.startswith("visual.") and part_of(name) not in frozen:
                unit = ".".join(name.split(".")[:3]) if ".blocks." in name else "rest"
                units[unit] = units.get(unit, 0) + -(-len(parameter) // 2) * 2 * parameter[0].numel()
        expected = {
            "all-gather": sorted(2 * [2 * size for size in units.values()]),
            "reduce-scatter": sorted(2 * size for size in units.values()),  # within a host
        }
        for rank, runs in enumerate(run_ranks(collectives, 2, layouts, frozen)):
            for index, layout in enumerate(layouts):
                base = [call for call in without[rank][index] if call.kind != "all-to-all"]
                calls = [call for call in runs[index] if call.kind != "all-to-all"]
                for call in base:
                    calls.remove(call)
                for kind, sizes in expected.items():
                    more = sorted(call.num_bytes for call in calls if call.kind == kind)
                    assert more == sorted(layout.accumulation * sizes), (frozen, layout, kind)
                assert {call.kind for call in calls} <= set(expected), (frozen, layout)


# Compilation


# Numbers of patches that are also those of channels (32), of angles (8) and of a head's values (16), and frames of any
# number: none may be taken for another when the first graph is made.
SHOWN: list[list[Frame]] = [
    [Frame(0, 4, 8)],
    [Frame(0, 2, 4)],
    [Frame(0, 4, 4)],
    [],
    [Frame(2 * n, 2, 4) for n in range(8)],
    [Frame(1, 6, 10), Frame(40, 4, 4)],
    [Frame(0, 12, 14)],
    [Frame(n, 2, 2) for n in range(1, 32)],
]


def graphs(modes: list[str], first: int, frozen: tuple[str, ...]) -> list[list[int]]:
    """Of each mode, the number of graphs after a micro-batch of each of SHOWN, from `first` on; then without gradients
    again."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        found = []
        for mode in modes:
            layout = Layout(compile="eager", activation_checkpoint=mode)
            model, _, _ = build(CONFIG, layout, torch.bfloat16, is_trained=functools.partial(_trains, frozen))
            counters.clear()
            numbers = []
            batches = [rows_as_micro_batch(CONFIG, [[64]], 0, [shown]) for shown in SHOWN[first:] + SHOWN[:first]]
            for batch in batches:
                model(batch)[0].backward()
                numbers.append(counters["stats"]["unique_graphs"])
            with torch.no_grad():
                for batch in batches:
                    model(batch)
                    numbers.append(counters["stats"]["unique_graphs"])
            found.append(numbers)
        return found


@pytest.mark.parametrize(
    ("name", "modes", "first"),
    [("nothing", MODES, 0), ("nothing", ["none"], 1), ("nothing", ["none"], 2), ("tower", ["full"], 0)],
)
def test_a_block_of_the_tower_is_one_graph_however_many_patches_and_frames(
    name: str, modes: list[str], first: int
) -> None:
    # Two kinds of block of the text, and the tower's; the same without gradients.
    for numbers in run_ranks(graphs, 1, modes, first, FROZEN[name])[0]:
        assert numbers == [3] * len(SHOWN) + [6] * len(SHOWN)
