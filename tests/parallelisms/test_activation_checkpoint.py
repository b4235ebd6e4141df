"""Checkpointed blocks are compiled, in every mode: one graph each, and at ep > 1 without room one for each part."""

from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Measure
from parallelisms.activation_checkpoint import _SAVED, _policy, apply_activation_checkpointing
from parallelisms.degrees import Degrees
from parallelisms.mesh import build_meshes
from parallelisms.parallelize import parallelize_fn
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import random_stream, run_model, tiny_config
from tests.parallelisms.layouts import Layout, build, compiling_by, materialise, own_batches


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_checkpointed_block_is_one_graph_however_many_documents(mode: str) -> None:
    config = tiny_config()
    model = Qwen35Moe(config, Kernels())
    init_weights(model, 0)
    apply_activation_checkpointing([(block, "forward") for block in model.blocks], mode)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(backend=counter)
    for lengths in [40, 24], [64], [1, 20, 43], [1] * 64:
        tokens, positions, _, labels = random_stream(config, lengths)
        loss, _ = run_model(model, tokens, positions, Documents.from_lengths(lengths, max_seqlen=64), labels)
        loss.backward()
    assert counter.frame_count == len(set(config.layer_types)) == 2


def test_the_loop_over_experts_is_kept_as_grouped_products_are() -> None:
    rows, gate_up, down = torch.empty(3, 16), torch.empty(2, 8, 16), torch.empty(2, 16, 4)
    saved, operation = _SAVED["selective"], torch.ops.qwen35_moe.grouped_linear.default
    assert _policy(saved, (), None, operation, rows, gate_up, None) == CheckpointPolicy.MUST_SAVE
    assert _policy(saved, (), None, operation, rows[:, :4], down, None) == CheckpointPolicy.PREFER_RECOMPUTE
    assert _policy(_SAVED["full"], (), None, operation, rows, gate_up, None) == CheckpointPolicy.PREFER_RECOMPUTE


class AtEp2(NamedTuple):
    """What two processes did with a few micro-batches in a mode."""

    graphs: tuple[int, int, int]
    """After a micro-batch; after two more, of other lengths, and validation between them, whose streams have fillers;
    and after all of that once more."""
    grouped_products: float
    """In a micro-batch, of each block."""


def count(profile: torch.profiler.profile, operation: str) -> int:
    """How often it ran. Called through a mode, as checkpointing is one, it shows once more inside itself."""

    def is_inside_itself(event: Any) -> bool:
        above = event.cpu_parent
        while above is not None and above.name != operation:
            above = above.cpu_parent
        return above is not None

    return sum(event.name == operation and not is_inside_itself(event) for event in profile.events())


def train_at_ep_2(cases: list[tuple[float, str]]) -> list[AtEp2]:
    with pytest.MonkeyPatch.context() as monkeypatch, compiling_by("aot_eager"):
        # Else what is beyond the limit runs uncompiled, and counts as no graph.
        monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        config, found = tiny_config(), []
        for room, mode in cases:
            with torch.device("meta"):
                model = Qwen35Moe(config, Kernels())
            meshes = build_meshes("cpu", Degrees(1, 2, 2))
            meshes.room.factor = room
            parallelize_fn(model, meshes, compute_dtype=torch.bfloat16, activation_checkpoint=mode, compile_blocks=True)
            materialise(model, torch.device("cpu"), seed=0)
            torch.compiler.reset()
            counters.clear()

            def train(lengths: list[int], model: Qwen35Moe = model) -> int:
                tokens, positions, _, labels = random_stream(config, lengths)
                documents = Documents.from_lengths(lengths, max_seqlen=64)
                run_model(model, tokens, positions, documents, labels)[0].backward()
                return counters["stats"]["unique_graphs"]

            def validate(model: Qwen35Moe = model) -> None:
                tokens, positions, _, labels = random_stream(config, [60, 4])
                documents = Documents.from_lengths([60, 4], max_seqlen=64)
                with torch.no_grad():
                    run_model(model, tokens, positions, documents, labels, Measure(is_real=torch.arange(64) < 50))

            first = train([40, 24])
            train([64])
            validate()
            second = train([1, 20, 43])
            validate()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                third = train([8] * 8)
            num_products = count(profile, "aten::_grouped_mm")
            found.append(AtEp2((first, second, third), num_products / config.num_hidden_layers))
        return found


# Room of experts and mode.
AT_EP_2 = [(0.0, "none"), (0.0, "selective"), (0.0, "full"), (1.2, "selective")]


@pytest.fixture(scope="module")
def at_ep_2() -> dict[tuple[float, str], list[AtEp2]]:
    """Of each case, what each rank did."""
    return dict(zip(AT_EP_2, zip(*run_ranks(train_at_ep_2, 2, AT_EP_2))))


@pytest.mark.parametrize(("room", "mode"), AT_EP_2)
def test_at_ep_2_all_but_exchanges_is_compiled_and_stays_so(
    at_ep_2: dict[tuple[float, str], list[AtEp2]], room: float, mode: str
) -> None:
    # With room two kinds of block. Where the host asks: two kinds of block up to their experts; copies; their order by
    # expert; the experts; the shared expert; the residual. Numbers of copies and rows differ between blocks. In
    # validation, without gradients, it always does, and has each of them (torch 2.11 two a second time).
    num_graphs = 2 if room else 7
    for of_rank in at_ep_2[room, mode]:
        first, second, third = of_rank.graphs
        assert first == num_graphs
        assert num_graphs + 7 <= second == third <= num_graphs + 9


@pytest.mark.parametrize(("room", "mode"), AT_EP_2)
def test_selective_makes_no_product_of_the_experts_again(
    at_ep_2: dict[tuple[float, str], list[AtEp2]], room: float, mode: str
) -> None:
    # Two forward, two for each gradient. "full" has kept nothing. It needs the first again, but the graph has both.
    for of_rank in at_ep_2[room, mode]:
        assert of_rank.grouped_products == (8 if mode == "full" else 6)


class AtCp2(NamedTuple):
    """What two processes that share tokens did with a few micro-batches in a mode."""

    graphs: list[int]
    """After each of four micro-batches of the same number of tokens; and after two without gradients."""
    num_breaks: int


def train_at_cp_2(ep: int, room: float, modes: list[str]) -> list[AtCp2]:
    config, found = tiny_config(), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        for mode in modes:
            layout = Layout(world=2, cp=2, ep=ep, room=room, activation_checkpoint=mode, compile="eager")
            model, _, _ = build(config, layout, torch.bfloat16)
            counters.clear()
            graphs = []
            for lengths in [40, 24], [64], [1, 20, 43], [1] * 64:
                (batch,) = own_batches(config, layout, [lengths], 0)
                model(batch)[0].backward()
                graphs.append(counters["stats"]["unique_graphs"])
            with torch.no_grad():
                for lengths in [60, 4], [8] * 8:
                    (batch,) = own_batches(config, layout, [lengths], 0)
                    model(batch)
                    graphs.append(counters["stats"]["unique_graphs"])
            found.append(AtCp2(graphs, sum(counters["graph_break"].values())))
    return found


@pytest.mark.parametrize(
    ("ep", "room", "modes"),
    [(1, 0.0, ["none", "selective", "full"]), (2, 0.0, ["selective"]), (2, 1.2, ["selective"])],
)
def test_the_exchange_of_tokens_for_heads_breaks_no_graph(ep: int, room: float, modes: list[str]) -> None:
    # Two kinds of block; at ep 2 without room, and so without gradients, in parts, as above.
    num_graphs, num_others = 7 if ep > 1 and not room else 2, 7 if ep > 1 else 2
    for rank in run_ranks(train_at_cp_2, 2, ep, room, modes):
        for graphs, num_breaks in rank:
            assert graphs[:4] == [num_graphs] * 4
            assert num_graphs + num_others <= graphs[4] == graphs[5] <= num_graphs + num_others + 2 * (ep - 1)
            assert num_breaks == 0
