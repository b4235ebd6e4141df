"""Times of a step against operations and bytes that are counted another way."""

from math import prod

import pytest

from config.reading import load_config
from models.qwen35_moe.parameters import parameters
from training.flops import flops_per_token
from training.hardware import GPUS, LINKS
from training.memory import Case, case_of
from training.step_time import StepTime, step_time

GPU = GPUS["h100"]


def planned(*options: str, gpus: int = 1, per_node: int = 8, documents: tuple[int, ...] = ()) -> tuple[Case, StepTime]:
    config = load_config(["--config=benchmarks/one_gpu_35b.toml", *options])
    case = case_of(config, gpus, documents)
    return case, step_time(case, "h100", per_node)


@pytest.mark.parametrize("options", [[], ["--model.config.full_attention_interval=1"], ["--mtp.train=joint"]])
def test_operations_are_those_that_mfu_counts(options: list[str]) -> None:
    case, time = planned("--activation_checkpoint.mode=none", *options)
    kinds, tokens = time.by_kind, case.num_tokens * case.accumulation
    stacked = [prod(each.shape) for each in parameters(case.shape).values() if each.expert_dim is not None]
    weights = 3 * 2 * sum(stacked)  # bytes that are read in three passes
    operations = kinds["dense products"] * GPU.dense
    operations += (kinds["experts' products"] - weights / GPU.memory) * GPU.experts
    attention = 1 / (1 / GPU.attention_forward + 2.5 / GPU.attention_backward) * 3
    operations += kinds["attention"] * attention  # MFU counts twice the forward pass' for the backward pass
    num_linear = case.shape.layer_types.count("linear_attention")
    rule = 18 * case.shape.linear_num_value_heads * case.shape.linear_key_head_dim * case.shape.linear_value_head_dim
    assert operations + num_linear * rule * tokens == pytest.approx(
        tokens * flops_per_token(case.shape, 4096), rel=1e-9
    )
    assert time.flops == flops_per_token(case.shape, 4096)


def test_full_recomputation_makes_all_but_the_head_once_more() -> None:
    (case, none), (_, full) = planned("--activation_checkpoint.mode=none"), planned("--activation_checkpoint.mode=full")
    head = 6 * case.num_tokens * case.shape.vocab_size * case.shape.hidden_size / GPU.dense
    more = (full.by_kind["dense products"] - head) / (none.by_kind["dense products"] - head)
    assert more == pytest.approx(4 / 3)
    assert full.by_kind["experts' products"] == pytest.approx(4 / 3 * none.by_kind["experts' products"])


def test_short_documents_attend_less_and_all_else_is_as_it_was() -> None:
    (_, whole), (_, cut) = planned(), planned(documents=(1024,))
    assert cut.by_kind.pop("attention") == pytest.approx(whole.by_kind.pop("attention") / 4)
    for time in (whole, cut):
        time.by_kind.pop("the GPU waits for the host")
    assert cut.by_kind == whole.by_kind
    (case, uneven), mean = planned(documents=(1300,)), (3 * 1300**2 + 196**2) / 4096  # the last is what is left
    square = case.num_tokens * mean * case.shape.num_attention_heads * case.shape.head_dim
    square *= case.shape.layer_types.count("full_attention")
    seconds = 2 * square * (1 / GPU.attention_forward + 2.5 / GPU.attention_backward)
    assert uneven.by_kind["attention"] == pytest.approx(seconds)


def test_two_micro_batches_take_twice_the_work_and_one_update() -> None:
    (_, one), (_, two) = planned(), planned("--training.global_batch_size=8")
    assert two.by_kind["optimizer, clipping"] == one.by_kind["optimizer, clipping"]
    for kind in ("dense products", "experts' products", "attention", "delta rule", "softmax of the loss"):
        assert two.by_kind[kind] == pytest.approx(2 * one.by_kind[kind]), kind


@pytest.mark.parametrize(
    ("gpus", "per_node", "ep", "replicate", "axis", "over", "cards"),
    [
        (8, 8, 1, 1, "fsdp", "NVLink", 0),
        (3, 8, 1, 1, "fsdp", "NVLink", 0),
        (16, 8, 1, 1, "fsdp", "network, 8 of a node", 8),
        (12, 6, 1, 1, "fsdp", "network, 6 of a node", 6),
        (16, 6, 4, 1, "ep", "network, 2 of a node", 1),  # a node's border cuts through its second group
        (16, 6, 2, 1, "ep", "NVLink", 0),
        (16, 4, 4, 1, "efsdp", "network, 1 of a node", 1),
        (16, 8, 4, 1, "efsdp", "network, 2 of a node", 2),
        (16, 8, 1, 2, "replicate", "network, 1 of a node", 1),
        (16, 8, 1, 4, "fsdp", "NVLink", 0),
        (16, 16, 1, 1, "fsdp", "NVLink", 0),
    ],
)
def test_what_crosses_a_nodes_border_takes_its_cards(
    gpus: int, per_node: int, ep: int, replicate: int, axis: str, over: str, cards: int
) -> None:
    options = [f"--parallelism.expert_parallel_degree={ep}", "--training.global_batch_size=64"]
    options.append(f"--parallelism.data_parallel_replicate_degree={replicate}")
    _, time = planned(*options, gpus=gpus, per_node=per_node)
    ranks = {"fsdp": gpus // replicate, "ep": ep, "efsdp": gpus // ep, "replicate": replicate}[axis]
    links = [link for link in time.links if link.traffic.axis == axis]
    assert links
    for link in links:
        inside = LINKS.all_to_all if link.traffic.kind == "all-to-all" else LINKS.ring
        rate = min(inside, cards * LINKS.network) if cards else inside
        ways = 2 if link.traffic.kind == "all-reduce" else 1
        assert link.over == over
        assert link.seconds == pytest.approx(ways * link.traffic.num_bytes * (ranks - 1) / ranks / rate)


def test_an_uneven_load_costs_time_where_experts_are_spread_alone() -> None:
    for ep in (1, 2):
        options = [f"--parallelism.expert_parallel_degree={ep}", "--training.global_batch_size=64"]
        config = load_config(["--config=benchmarks/one_gpu_35b.toml", *options])
        even, uneven = (step_time(case_of(config, 2, imbalance=imbalance), "h100", 8) for imbalance in (1.0, 1.5))
        assert (uneven.by_kind["experts' products"] > even.by_kind["experts' products"]) == (ep > 1)
        assert (uneven.seconds > even.seconds) == (ep > 1)
