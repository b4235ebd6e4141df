"""Times of a step against operations and bytes that are counted another way."""

from dataclasses import replace
from math import prod

import pytest

from config.reading import load_config
from models.qwen35_moe.parameters import parameters
from training.flops import flops_per_token
from training.hardware import GPUS, HOST, HOST_FORWARD, LINKS, RAGGED, STEP
from training.memory import Case, case_of
from training.step_time import StepTime, products_per_token, step_time

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
    (case, uneven), pairs = planned(documents=(1300,)), 4 * (3 * 1408**2 + 256**2)  # the last is what is left: 196
    operations = 2 * pairs * case.shape.num_attention_heads * case.shape.head_dim
    operations *= case.shape.layer_types.count("full_attention")
    forward, backward = GPU.attention_forward * RAGGED[0], GPU.attention_backward * RAGGED[1]
    assert uneven.by_kind["attention"] == pytest.approx(operations * (1 / forward + 2.5 / backward))


def test_a_document_is_whole_chunks_of_the_delta_rule() -> None:
    (_, whole), (_, cut) = planned(), planned(documents=(4,))
    assert cut.by_kind["delta rule"] == pytest.approx(16 * whole.by_kind["delta rule"])


def test_the_trunk_runs_forward_alone_where_the_module_alone_trains() -> None:
    (_, alone), (case, joint) = planned("--mtp.train=head"), planned("--mtp.train=joint")
    kinds = "dense products", "experts' products", "delta rule", "norms, routing, copies", "optimizer, clipping"
    assert all(alone.by_kind[kind] < 0.6 * joint.by_kind[kind] for kind in kinds)
    operations = joint.by_kind["dense products"] - alone.by_kind["dense products"]
    dense, _ = products_per_token(replace(case.shape, mtp_num_hidden_layers=0))
    head = case.shape.vocab_size * case.shape.hidden_size
    assert operations * GPU.dense == pytest.approx(2 * case.num_tokens * (2 * dense + 3 * head))


def test_the_host_is_late_with_one_row_and_launches_more_where_it_runs_forward_twice() -> None:
    options = ["--model.config.num_hidden_layers=40", "--lora.rank=8", "--checkpoint.enable=false"]
    options += ["--training.local_batch_size=1", "--training.global_batch_size=1", "--training.sequence_length=512"]
    (_, once), (_, twice) = planned(*options), planned(*options, "--activation_checkpoint.mode=full")
    assert once.seconds - once.by_kind["optimizer, clipping"] == pytest.approx(40 * HOST["no units"] + STEP)
    assert twice.seconds - once.seconds == pytest.approx(40 * HOST["no units"] * HOST_FORWARD)


def test_nothing_hides_the_roots_weights() -> None:
    case, time = planned("--training.global_batch_size=8", gpus=2)
    apart = [link.seconds - link.hidden for link in time.links]
    root, total = case.sizes().root, [link.traffic.num_bytes for link in time.links]
    gather, reduce, _ = time.links
    assert apart[0] == pytest.approx(gather.seconds * 2 * root / total[0])
    assert apart[1] == pytest.approx(reduce.seconds * 2 * root / total[1])


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
        is_exchanged = link.traffic.kind in ("all-to-all", "reduce-scatter")[: 1 if cards else 2]
        inside = LINKS.all_to_all if is_exchanged else LINKS.ring
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
