"""The collectives of one step are those of docs/communication.md, and gathers are issued before they are needed."""

import functools
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batch import Frame
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.parts import PARTS, frozen_parts, part_of
from parallelisms.degrees import Degrees
from parallelisms.room import Room
from parallelisms.units import Kept, dense_units, kept_gathered
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.collectives import Collective, recorded
from tests.parallelisms.layouts import Layout, build, own_batches, step
from training.formulas import Traffic, layer_types, sizes, traffic

# Blocks enough for two units of several, whether dense weights are kept or freed.
TYPES = (LINEAR,) * 4 + (FULL,)
HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
CONFIG = tiny_config(vocab_size=96, num_hidden_layers=len(TYPES), layer_types=TYPES, **HEADS)
ROWS = [[64]] * 8
LAYOUTS = [
    Layout(world=4),
    Layout(world=4, accumulation=2, activation_checkpoint="full"),
    Layout(world=4, ep=2),
    Layout(world=4, ep=2, accumulation=2, activation_checkpoint="selective"),
    Layout(world=4, ep=4),
    Layout(world=4, ep=4, room=8.0, accumulation=2),
    Layout(world=4, ep=2, room=8.0, activation_checkpoint="full"),
    Layout(world=4, ep=2, activation_checkpoint="full"),
    Layout(world=4, ep=2, reshard="always"),
    Layout(world=4, ep=2, accumulation=2, reshard="never"),
    Layout(world=4, reshard="never"),
    Layout(world=4, replicate=2, accumulation=2),
    Layout(world=4, cp=2),
    Layout(world=4, cp=4, accumulation=2, activation_checkpoint="selective"),
    Layout(world=4, cp=2, ep=2, activation_checkpoint="selective"),
    Layout(world=4, cp=2, ep=4),
    Layout(world=4, cp=4, activation_checkpoint="full"),
    Layout(world=4, cp=4, replicate=2),
    Layout(world=4, hosts=2),
    Layout(world=4, ep=2, hosts=2, accumulation=2),
    Layout(world=4, replicate=2, hosts=2),
    Layout(world=4, ep=2, masters=torch.bfloat16),
]
Totals = dict[tuple[str, str], tuple[int, int | Fraction]]


class Record(NamedTuple):
    """What a rank did in a step."""

    calls: list[Collective]
    num_copies: int
    """Of the tokens that it sends to experts."""


def record_steps(layouts: list[Layout]) -> list[Record]:
    """Each layout's second step, under bfloat16."""
    records = []
    for layout in layouts:
        model, meshes, optimizer = build(CONFIG, layout, torch.bfloat16)
        batches = own_batches(CONFIG, layout, ROWS, 0)
        step(model, meshes, optimizer, batches)
        num_copies = 0

        def count(_: object, inputs: object, output: tuple[torch.Tensor, ...], ep: int = layout.ep) -> None:
            nonlocal num_copies
            ranks = output[1] // (CONFIG.num_experts // ep)
            num_copies += sum(len(set(of_token)) for of_token in ranks.tolist())

        for block in model.blocks:
            block.mlp.gate.register_forward_hook(count)
        with recorded(meshes) as calls:
            step(model, meshes, optimizer, batches)
        records.append(Record(calls[1:], num_copies))  # the first is the test's own: the number of trained tokens
    return records


@pytest.fixture(scope="module")
def records() -> dict[Layout, list[Record]]:
    """Of each layout, what each rank did."""
    return dict(zip(LAYOUTS, zip(*run_ranks(record_steps, 4, LAYOUTS))))


def degrees_of(layout: Layout) -> Degrees:
    return Degrees(layout.replicate, layout.world // layout.replicate, layout.ep, layout.cp)


def kept_of(layout: Layout) -> Kept:
    return kept_gathered(CONFIG, degrees_of(layout), layout.reshard, layout.activation_checkpoint)


def tokens_of(layout: Layout) -> int:
    """Of a rank in a micro-batch."""
    return sum(map(sum, ROWS)) // (layout.world * layout.accumulation)


def bytes_of_gradient(layout: Layout) -> int:
    """On its way: the ranks that shard are on one host or not."""
    return 2 if layout.world // layout.replicate <= layout.world // layout.hosts else 4


def symbols(layout: Layout, num_copies: Fraction) -> dict[str, int | Fraction]:
    """What the documentation's letters stand for; see there."""
    of, num_full = sizes(CONFIG, layout.world // layout.replicate, layout.ep), CONFIG.layer_types.count(FULL)
    of_units, kept = of.units(CONFIG, layout.ep, kept_of(layout).dense), kept_of(layout)
    return {
        "A": layout.accumulation,
        "L": CONFIG.num_hidden_layers,
        "D": of.dense,
        "U": len(of_units),
        "D_last": of_units[-1] - (of.by_block[-1][1] if layout.ep == 1 else 0),
        "X": of.experts,
        "X_last": of.by_block[-1][1],
        "R": of.root,
        "Y": of.head,
        "heads": int(of.head > 0),
        "g": bytes_of_gradient(layout),
        "F": of.outside,
        "c": 2,
        "k": CONFIG.num_experts_per_tok,
        "H": CONFIG.hidden_size,
        "C": num_copies,
        "ep": layout.ep,
        "asks": int(not layout.room),
        "again": int(not kept.dense),
        "again_x": int(not kept.experts),
        "t": tokens_of(layout),
        "P": layout.cp,
        "Ll": CONFIG.num_hidden_layers - num_full,
        "Nk": CONFIG.linear_num_key_heads,
        "Kk": CONFIG.linear_key_head_dim,
        "Nv": CONFIG.linear_num_value_heads,
        "Kv": CONFIG.linear_value_head_dim,
        "Lf": num_full,
        "N": CONFIG.num_attention_heads,
        "Nkv": CONFIG.num_key_value_heads,
        "K": CONFIG.head_dim,
    }


def documented(layout: Layout, num_copies: Fraction) -> Totals:
    """(kind, axis) -> (count, bytes) of a step, from the tables of docs/communication.md."""
    text = (Path(__file__).resolve().parents[2] / "docs/communication.md").read_text()
    headings = "FSDP alone|FSDP and expert|Context parallelism"
    _, alone, experts, context = re.split(rf"^## (?:{headings}).*$", text, flags=re.MULTILINE)
    table = (alone if layout.ep == 1 else experts) + (context if layout.cp > 1 else "")
    rows = re.findall(r"^\| (\S+) \| (\w+) \| .* \| `(.*)` \| `(.*)` \|$", table, flags=re.MULTILINE)
    values = symbols(layout, num_copies)
    return {(kind, axis): (eval(count, {}, values), eval(size, {}, values)) for kind, axis, count, size in rows}


def measured(calls: list[list[Collective]]) -> Totals:
    """The same from what the ranks did: the mean over ranks, without the gradient norm's small all-reduces."""
    totals: dict[tuple[str, str], list[int]] = {}
    for rank in calls:
        for kind, axis, size in rank:
            if kind != "all-reduce" or size > 300:
                total = totals.setdefault((kind, axis), [0, 0])
                total[0] += 1
                total[1] += size
    assert all(count % len(calls) == 0 for count, _ in totals.values())
    return {key: (count // len(calls), Fraction(size, len(calls))) for key, (count, size) in totals.items()}


def all_ranks(layout: Layout) -> str:
    """The name of the axis of all ranks."""
    return "fsdp" if layout.replicate == 1 else "data_parallel"


def by_formula(layout: Layout, num_copies: Fraction) -> list[Traffic]:
    mode, of = layout.activation_checkpoint, sizes(CONFIG, layout.world // layout.replicate, layout.ep)
    where = degrees_of(layout), tokens_of(layout), layout.accumulation, mode
    kept = kept_of(layout)
    options = {"asks": not layout.room, "kept": kept, "g": bytes_of_gradient(layout)}
    return traffic(CONFIG, *where, num_copies, of, of, **options)


def expected(layout: Layout, num_copies: Fraction) -> Totals:
    """What the formulas say; axes with the same ranks have one name."""
    names = {1: "", layout.ep: "ep", layout.world // layout.replicate: "fsdp", layout.world: all_ranks(layout)}
    totals: Totals = {}
    for kind, axis, calls, size in by_formula(layout, num_copies):
        if kind == "all-to-all":
            axis = names.get(layout.ep if axis == "ep" else layout.cp, axis)
        before = totals.get((kind, axis), (0, 0))
        totals[kind, axis] = (before[0] + calls, before[1] + size)
    return totals


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_documentation_has_the_formulas(layout: Layout) -> None:
    num_copies, layout = Fraction(1234), replace(layout, activation_checkpoint="none")
    with_other_name = {("all-reduce", "data_parallel"): ("all-reduce", "fsdp")}
    formulas = {
        with_other_name.get(row[:2], row[:2]): row[2:]
        for row in by_formula(layout, num_copies)
        if row.axis != "replicate"  # described in words
    }
    written = documented(layout, num_copies)
    if layout.ep == layout.world // layout.replicate:
        written = {key: value for key, value in written.items() if key[1] != "efsdp"}
    assert formulas == written


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_communicates_as_documented(records: dict[Layout, list[Record]], layout: Layout) -> None:
    of_ranks = records[layout]
    num_copies = Fraction(sum(rank.num_copies for rank in of_ranks), len(of_ranks))
    if layout.room:
        num_tokens, top_k = tokens_of(layout), CONFIG.num_experts_per_tok
        copies, _ = Room(layout.room).sizes(num_tokens, top_k, layout.ep, CONFIG.num_experts // layout.ep)
        num_copies = Fraction(layout.accumulation * CONFIG.num_hidden_layers * layout.ep * copies)
    assert measured([rank.calls for rank in of_ranks]) == expected(layout, num_copies)


def exchanges_of_features(layouts: list[Layout], frozen: tuple[str, ...] | None) -> list[list[Collective]]:
    """The all-to-alls of a step of a model with a tower that is frozen so far; None: of the text model alone."""
    config = replace(CONFIG, vision=None if frozen is None else tiny_vision())
    found = []
    for layout in layouts:
        is_trained = functools.partial(_trains, frozen or ())
        model, meshes, optimizer = build(config, layout, torch.bfloat16, is_trained=is_trained)
        frames = [[Frame(3, 4, 6), Frame(20, 2, 2)], [], [Frame(0, 8, 8), Frame(30, 4, 4)], []] * 2
        batches = own_batches(config, layout, ROWS, 0, frames if frozen is not None else ())
        with recorded(meshes) as calls:
            step(model, meshes, optimizer, batches)
        found.append([call for call in calls if call.kind == "all-to-all"])
    return found


def gathers(cases: list[tuple[ModelConfig, Layout]], frozen: tuple[str, ...]) -> list[Totals]:
    """The all-gathers and all-to-alls of this rank's step."""
    found = []
    for config, layout in cases:
        model, meshes, optimizer = build(config, layout, torch.bfloat16, is_trained=functools.partial(_trains, frozen))
        batches = own_batches(config, layout, ROWS, 0)
        step(model, meshes, optimizer, batches)
        with recorded(meshes) as calls:
            step(model, meshes, optimizer, batches)
        found.append(measured([[call for call in calls if call.kind in ("all-gather", "all-to-all")]]))
    return found


def test_what_has_no_backward_pass_is_gathered_and_sent_once() -> None:
    layouts = [Layout(world=4), Layout(world=4, ep=2, accumulation=2), Layout(world=4, ep=2, room=4.0)]
    with_mtp = replace(CONFIG, mtp_num_hidden_layers=1)
    for config, frozen in ((with_mtp, frozen_parts((), "head")), (CONFIG, set(PARTS) - {"attention"})):
        # The one block with something to train comes last, and is kept.
        for found in run_ranks(gathers, 4, [(config, layout) for layout in layouts], tuple(frozen)):
            for layout, totals in zip(layouts, found):
                of, A, L = sizes(config, layout.world, layout.ep), layout.accumulation, len([*layer_types(config)])
                U = len(of.units(config, layout.ep, kept_of(layout).dense)) + bool(of.head)
                dense = of.root + of.head + of.dense + (of.experts if layout.ep == 1 else 0)
                expected = {("all-gather", "fsdp"): (A * (U + 1), A * 2 * dense)}
                if layout.ep > 1:
                    expected["all-gather", "efsdp"] = (A * L, A * 2 * of.experts // layout.ep)
                sent = totals.pop(("all-to-all", "ep"), None)
                assert totals == expected, (layout, sorted(frozen))
                # With so much room each rank sends a copy of each token to each.
                num_copies = Fraction(A * L * layout.ep * tokens_of(layout))
                where = degrees_of(layout), tokens_of(layout), A, "none", num_copies
                kept = kept_of(layout)
                rows = traffic(config, *where, of, of, trunk_has_graph=False, asks=not layout.room, kept=kept)
                if config is with_mtp:
                    planned = {row[:2]: row[2:] for row in rows if row.kind.startswith("all-")}
                    planned_to_send = planned.pop(("all-to-all", "ep"), None)
                    del planned["all-reduce", "fsdp"]
                    assert planned == expected, layout
                    if layout.room:
                        assert sent == planned_to_send, layout
                    elif layout.ep > 1:
                        assert sent is not None
                        assert planned_to_send is not None
                        assert sent[0] == planned_to_send[0], layout


def test_below_a_head_that_alone_trains_nothing_is_gathered_again() -> None:
    layouts = [Layout(world=4), Layout(world=4, ep=2)]
    frozen = tuple(set(PARTS) - {"head"})
    for found in run_ranks(gathers, 4, [(CONFIG, layout) for layout in layouts], frozen):
        for layout, totals in zip(layouts, found):
            of = sizes(CONFIG, layout.world, layout.ep)
            dense = of.root + of.head + of.dense + (of.experts if layout.ep == 1 else 0)
            num_units = len(of.units(CONFIG, layout.ep, kept_of(layout).dense))
            assert totals["all-gather", "fsdp"] == (2 + num_units, 2 * dense), layout


def _trains(frozen: tuple[str, ...], name: str) -> bool:
    return part_of(name) not in frozen


def test_features_travel_once_each_way() -> None:
    layouts = [Layout(world=2, cp=2), Layout(world=2, cp=2, accumulation=2)]
    without = run_ranks(exchanges_of_features, 2, layouts, None)
    num_bytes = 2 * CONFIG.hidden_size * 2 * (6 + 1 + 16 + 4) // 2  # bfloat16, over the number of ranks
    for frozen, num_ways in (((), 2), (("vision",), 2), (("vision", "merger"), 1)):
        found = run_ranks(exchanges_of_features, 2, layouts, frozen)
        for index, layout in enumerate(layouts):
            more = [calls[index] for calls in found]
            for calls, base in zip(more, without):
                for call in base[index]:
                    calls.remove(call)
                assert len(calls) == num_ways * layout.accumulation, (frozen, layout)
            assert sum(call.num_bytes for calls in more for call in calls) == 2 * num_ways * num_bytes, (frozen, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_gradient_norm_is_one_number_over_the_shards(records: dict[Layout, list[Record]], layout: Layout) -> None:
    small = [call for call in records[layout][0].calls if call.kind == "all-reduce" and call.num_bytes <= 300]
    assert [(call.axis, call.num_bytes) for call in small] == [("fsdp", 8)]


@pytest.mark.parametrize(
    "layout", [each for each in LAYOUTS if each.ep == 2 and each.cp == 1 and not each.room], ids=str
)
def test_experts_and_dense_weights_are_gathered_a_block_ahead(
    records: dict[Layout, list[Record]], layout: Layout
) -> None:
    num_layers = CONFIG.num_hidden_layers
    gathers, at_counts, at_exchanges = 0, [], []
    for call in records[layout][0].calls:
        if call.kind == "all-gather":
            gathers += 1
        elif call.kind == "all-to-all":
            at_exchanges.append(gathers)
            if call.num_bytes == 8 * layout.ep:  # the numbers of copies: here the host waits, in each block
                at_counts.append(gathers)
    # When the host waits in a block, its dense unit and the next one, or the head, are under way, after the root's, and
    # so are its experts and the next block's.
    kept = kept_of(layout)
    size = len(dense_units(CONFIG, layout.ep, kept.dense)[0])
    assert at_counts[:num_layers] == [1 + block // size + 2 + min(block + 2, num_layers) for block in range(num_layers)]
    # The same on the way back, where the last ones were kept, or all: the preceding unit before the last block's first
    # exchange, the preceding block's experts before its second.
    before, *backward = at_exchanges[4 * num_layers - 1 :]
    preceding = before + (not kept.dense)
    assert backward[:2] == [preceding, preceding + (not kept.experts)]


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.ep == 1 and each.cp > 1], ids=str)
def test_the_head_is_gathered_before_the_last_block_computes(
    records: dict[Layout, list[Record]], layout: Layout
) -> None:
    calls = records[layout][0].calls
    of_head = 2 * sizes(CONFIG, layout.world // layout.replicate, layout.ep).head
    at_head = [index for index, call in enumerate(calls) if call[::2] == ("all-gather", of_head)]
    assert len(at_head) == layout.accumulation
    num_full = CONFIG.layer_types.count(FULL)
    num_forward = 3 * (CONFIG.num_hidden_layers - num_full) + 2 * num_full
    exchanges = [index for index, call in enumerate(calls) if call.kind == "all-to-all"]
    assert CONFIG.layer_types[-1] == FULL  # which has two exchanges
    assert exchanges[num_forward - 3] < at_head[0] < exchanges[num_forward - 2]


class Operations(TorchDispatchMode):
    """The operations that are run, and how many numbers each makes; none whose results activation checkpointing has
    kept."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        self.sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def operations_of_a_step(
    layouts: list[Layout], dtype: torch.dtype = torch.float32
) -> list[tuple[list[str], list[int]]]:
    found = []
    for layout in layouts:
        model, meshes, optimizer = build(CONFIG, layout, dtype)
        with Operations() as operations:
            step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS, 0))
        found.append((operations.names, operations.sizes))
    return found


@pytest.fixture(scope="module")
def operations() -> dict[str, tuple[list[str], list[int]]]:
    """Of each mode of activation checkpointing, the operations of a step at ep 2, on rank 0, and their sizes."""
    modes = ("none", "selective", "full")
    layouts = [Layout(world=2, ep=2, activation_checkpoint=mode) for mode in modes]
    return dict(zip(modes, run_ranks(operations_of_a_step, 2, layouts)[0]))


def test_the_host_waits_for_numbers_of_copies_once_a_layer(
    operations: dict[str, tuple[list[str], list[int]]],
) -> None:
    for mode, (names, _) in operations.items():
        assert names.count("qwen35_moe::splits") == CONFIG.num_hidden_layers, mode


def test_the_shared_expert_is_computed_while_results_and_their_gradients_travel(
    operations: dict[str, tuple[list[str], list[int]]],
) -> None:
    (names, _), num_products = operations["none"], list[int]()
    exchanges = [index for index, name in enumerate(names) if name == "_c10d_functional::all_to_all_single"]
    num_forward = 4 * CONFIG.num_hidden_layers  # numbers of copies, weights, copies, results
    for launch in exchanges[3:num_forward:4] + exchanges[num_forward::3]:
        arrival = names.index("_c10d_functional::wait_tensor", launch)
        num_products.append(names[launch:arrival].count("aten::mm"))
    # gate_proj, up_proj, down_proj and shared_expert_gate; on the way back each has two gradients.
    assert num_products == [4] * CONFIG.num_hidden_layers + [8] * CONFIG.num_hidden_layers


def test_gradients_of_experts_that_are_whole_on_their_rank_are_not_divided(
    operations: dict[str, tuple[list[str], list[int]]],
) -> None:
    num_parameters = 3 * CONFIG.num_experts // 2 * CONFIG.hidden_size * CONFIG.moe_intermediate_size

    def of_experts(names: list[str], sizes: list[int]) -> list[str]:
        return [name for name, size in zip(names, sizes) if size == num_parameters]

    assert of_experts(*operations["none"]) == []  # stored as computed with: no business of FSDP's
    converted = of_experts(*run_ranks(operations_of_a_step, 2, [Layout(world=2, ep=2)], torch.bfloat16)[0][0])
    assert "aten::empty" in converted  # FSDP lays the two parameters' gradients end to end
    assert not [name for name in converted if "div" in name or "mul" in name], converted


def test_selective_sends_nothing_again_and_keeps_no_product_that_was_sent() -> None:
    modes = ("none", "selective", "full")
    layouts = [Layout(world=2, cp=2, activation_checkpoint=mode) for mode in modes]
    names = dict(zip(modes, (names for names, _ in run_ranks(operations_of_a_step, 2, layouts)[0])))
    exchanges = {mode: names[mode].count("_c10d_functional::all_to_all_single") for mode in modes}
    num_full = CONFIG.layer_types.count(FULL)
    num_linear = CONFIG.num_hidden_layers - num_full
    assert exchanges["none"] == exchanges["selective"] == 6 * num_linear + 4 * num_full
    assert exchanges["full"] == 9 * num_linear + 6 * num_full
    # What linear attention has sent is made again; the compiler, which sees that nothing reads it, leaves it out.
    assert names["selective"].count("aten::mm") == names["none"].count("aten::mm") + num_linear
