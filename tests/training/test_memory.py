"""What lies on a rank after a step, and what it gathers and reduces, against the plan's terms: to the byte."""

import random
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from config.options import Config
from config.reading import load_config, model_config
from data.batch import Frame
from errors import UserError
from models.ops.kernels import Kernels
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.lora import add_adapters
from models.qwen35_moe.parameters import parameters
from models.qwen35_moe.parts import freeze, frozen_parts
from parallelisms.degrees import work_out_degrees
from parallelisms.mesh import build_meshes
from parallelisms.parallelize import local_region
from tests.distributed import run_ranks
from tests.parallelisms.collectives import Collective, recorded
from tests.parallelisms.layouts import Layout, own_batches
from train import build_model, build_on_meta
from training.memory import Case, case_of, gradient_bytes, peak_memory
from training.optimizer import build_optimizer
from training.step import Stepper
from training.step_time import step_time

TINY = [
    "--config=qwen35moe_tiny.toml", "--model.config.vocab_size=97", "--model.config.hidden_size=48",
    "--model.config.head_dim=16", "--model.config.rope_parameters.mrope_section=[1, 1, 0]",
    "--model.config.linear_key_head_dim=16", "--model.config.linear_value_head_dim=16",
    "--model.config.moe_intermediate_size=24", "--training.sequence_length=32", "--training.global_batch_size=8",
]  # fmt: skip
TOWER = [
    "depth=2", "hidden_size=32", "intermediate_size=40", "num_heads=2", "patch_size=4", "num_position_embeddings=36",
]  # fmt: skip
IDS = ["image_token_id=90", "video_token_id=91", "vision_start_token_id=92", "vision_end_token_id=93"]
# What training needs beside what is drawn at random: each is tried on every number of processes.
KINDS: list[list[str]] = [
    [],
    ["--training.master_dtype=bfloat16"],
    ["--optimizer.state_dtype=bfloat16", "--optimizer.betas=0.9,0.95"],
    ["--training.dtype=float32"],
    ["--mtp.train=joint"],
    ["--mtp.train=head"],
    ["--model.freeze=router,experts,head"],
    ["--model.freeze=embeddings,norms,linear_attention", "--training.master_dtype=bfloat16"],
    ["--lora.rank=8", "--checkpoint.enable=false"],
    ["--lora.rank=8", "--checkpoint.enable=false", "--lora.targets=experts,head,shared_expert"],
    ["tower"],
    ["tower", "--model.freeze=vision"],
    ["tower", "--model.freeze=merger"],
    ["tower", "--model.freeze=vision,merger"],
    ["tower", "--model.freeze=text"],
]


def drawn(kind: list[str], world: int, seed: int) -> list[str]:
    """Options of a random model and layout of this kind."""
    draw = random.Random(seed).choice
    words = [*TINY, *(word for word in kind if word != "tower")]
    if "tower" in kind:
        words += [f"--model.config.vision_config.{each}" for each in TOWER] + [f"--model.config.{each}" for each in IDS]
    ep = draw([n for n in (1, 2, 4) if world % n == 0])
    layers = draw(['["linear_attention","full_attention","linear_attention"]', '["full_attention","full_attention"]',
                   '["linear_attention","linear_attention"]'])  # fmt: skip
    sizes = {
        "layer_types": layers,
        "num_hidden_layers": layers.count(",") + 1,
        "num_experts": draw([6, 10]) if ep < 4 else 12,
        "num_experts_per_tok": draw([1, 3]),
        "shared_expert_intermediate_size": draw([17, 32]),
        "tie_word_embeddings": draw(["true", "false"]) if "head" not in " ".join(kind) else "false",
    }
    if "linear_attention" in " ".join(kind):
        sizes |= {"layer_types": '["linear_attention","full_attention","linear_attention"]', "num_hidden_layers": 3}
    words += [f"--model.config.{key}={value}" for key, value in sizes.items()]
    if kind[:1] == ["--lora.rank=8"] and len(kind) == 2:
        targets = [part for part in ("linear_attention", "full_attention") if part in layers]
        words.append(f"--lora.targets={','.join([*targets, 'shared_expert']).replace('full_attention', 'attention')}")
    replicate = draw([n for n in (1, 2) if world % (n * ep) == 0])
    words += [f"--parallelism.expert_parallel_degree={ep}", f"--training.local_batch_size={draw([1, 2])}"]
    words += [f"--parallelism.data_parallel_replicate_degree={replicate}"]
    words += [f"--parallelism.context_parallel_degree={draw([n for n in (1, 2) if world % n == 0])}"]
    words += [f"--activation_checkpoint.mode={draw(['none', 'selective', 'full'])}"]
    return words if "--training.dtype=float32" in kind else [*words, "--training.dtype=bfloat16"]


@dataclass
class Found:
    """Bytes of a rank."""

    weights: int = 0
    frozen: int = 0
    moments: int = 0
    gradients: int = 0
    calls: tuple[Collective, ...] = ()


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def run_steps(configs: list[Config], world: int) -> list[Found]:
    """Of each configuration a step, and what there is in it and after it."""
    results = []
    for config in configs:
        found, shape = Found(), model_config(config)
        degrees = work_out_degrees(config.parallelism, config.training, shape, world)
        meshes = build_meshes("cpu", degrees)
        model = build_model(config, shape, meshes, torch.device("cpu"))
        init_weights(model, 0, local_region)
        optimizer = build_optimizer(model, config.optimizer)
        of_micro_batches = config.training.local_batch_size * degrees.num_data_ranks
        layout = Layout(world, cp=degrees.context, accumulation=8 // of_micro_batches)
        frames = [[Frame(3, 4, 6)], [Frame(8, 2, 2)]] * 4 if shape.vision else ()
        batches = own_batches(shape, layout, [[32]] * 8, 0, frames)

        def count_gradients(*_: Any, found: Found = found, model: torch.nn.Module = model) -> None:
            found.gradients = sum(_bytes(each.grad) for each in model.parameters() if each.grad is not None)

        optimizer.register_step_pre_hook(count_gradients)
        with recorded(meshes) as calls:
            of_losses = (config.training, config.moe, config.mtp)
            Stepper(model, optimizer, meshes, torch.device("cpu"), *of_losses).launch(batches, 256, 1)
        found.calls = tuple(calls)
        for parameter in model.parameters():
            if parameter.requires_grad:
                found.weights += _bytes(parameter)
            else:
                found.frozen += _bytes(parameter)
        states = (state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        found.moments = sum(map(_bytes, states))
        results.append(found)
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_lies_on_a_rank_and_what_it_communicates_is_what_the_plan_says(world: int) -> None:
    drawings = [drawn(kind, world, 100 * world + number) for number, kind in enumerate(KINDS)]
    configs = [load_config(words) for words in drawings]
    for words, config, found in zip(drawings, configs, run_ranks(run_steps, world, configs, world)[0]):
        case = case_of(config, world)
        terms = peak_memory(case)[1]
        assert terms.get("weights", 0) + terms.get("adapters", 0) == found.weights, words
        assert terms["moments"] == found.moments, words
        assert terms.get("frozen weights", 0) == found.frozen, words
        assert gradient_bytes(case) == found.gradients, words
        assert planned(case) == measured(case, found.calls), words


Totals = dict[str, tuple[int, float]]


def planned(case: Case) -> Totals:
    """Collectives by kind, (calls, bytes): all but those whose size depends on routing."""
    totals: Totals = {}
    for link in step_time(case, "h100", 8).links:
        kind, axis, calls, num_bytes = link.traffic
        if kind != "all-to-all" or (axis == "cp" and knows_exchanges(case)):
            before = totals.get(kind, (0, 0))
            totals[kind] = (before[0] + calls, before[1] + num_bytes)
    return totals


def knows_exchanges(case: Case) -> bool:
    """Whether the ranks of cp are no other axis', trade nothing beside the layers' tokens and heads, and trade the
    first block's gradients too."""
    axes = (1, case.degrees.expert, case.degrees.shard, case.degrees.shard * case.degrees.replicate)
    is_text = not case.shape.vision and not case.shape.mtp_num_hidden_layers
    return case.degrees.context not in axes and is_text and "embeddings" in case.trained


def measured(case: Case, calls: tuple[Collective, ...]) -> Totals:
    """The same of what a rank did, without the gradient norm's float64 number."""
    degrees = case.degrees
    ranks = {"fsdp": degrees.shard, "efsdp": degrees.shard // degrees.expert, "replicate": degrees.replicate}
    totals: Totals = {}
    of_norm = 1  # of 8 bytes; and another, of the two numbers that travel alone where nothing outside FSDP trains
    if degrees.shard * degrees.replicate > 1 and not case.sizes(trains=True).outside:
        totals["all-reduce"], of_norm = (1, 8), 2
    small = [size for kind, axis, size in calls if (kind, size) == ("all-reduce", 8) and ranks.get(axis, 2) > 1]
    assert len(small) in (0, of_norm), small
    for kind, axis, size in calls:
        counts = axis == "cp" and knows_exchanges(case) if kind == "all-to-all" else ranks.get(axis, 2) > 1
        if counts and (kind, size) != ("all-reduce", 8):
            before = totals.get(kind, (0, 0))
            totals[kind] = (before[0] + 1, before[1] + size)
    return totals


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([kind for kind in KINDS if "tower" not in kind]),
    shard=st.sampled_from([1, 2, 3, 4, 7, 8, 64, 4096]),
    expert=st.sampled_from([1, 2, 4]),
    replicate=st.sampled_from([1, 2]),
    seed=st.integers(0, 10**6),
)
def test_sizes_on_any_number_of_gpus_are_those_of_its_parameters(
    kind: list[str], shard: int, expert: int, replicate: int, seed: int
) -> None:
    """Counted here from the model's own shapes, as FSDP and the experts' ranks cut them: the first rank's part."""
    words = [word for word in drawn(kind, 1, seed) if "--parallelism." not in word and "num_experts=" not in word]
    words += [f"--parallelism.expert_parallel_degree={expert}", "--model.config.num_experts=12"]
    words += [f"--parallelism.data_parallel_replicate_degree={replicate}"]
    config = load_config(words)
    try:
        case = case_of(config, replicate * shard)
    except UserError:  # expert degrees that do not divide
        assume(False)
    model = build_on_meta(model_config(config), Kernels(), getattr(torch, config.training.master_dtype))
    freeze(model, frozen_parts(config.model.freeze, config.mtp.train))
    if config.lora.rank:
        add_adapters(model, config.lora.rank, 1.0, config.lora.targets)
    is_float32 = {id(parameter) for parameter in model.float32_parameters()}
    found = {"weights": 0.0, "moments": 0.0, "frozen": 0.0}
    for name, parameter in model.named_parameters():
        if id(parameter) in is_float32:
            own, num_bytes = parameter.numel(), 4
        elif ".experts." in name and expert > 1:
            own, num_bytes = parameter.numel() // shard, case.master_bytes
            assert parameter.numel() % shard == 0
        else:
            rows = len(torch.empty(len(parameter), 0).chunk(shard)[0])
            own, num_bytes = rows * parameter[0].numel(), case.master_bytes
        if not parameter.requires_grad:
            found["frozen"] += own * (4 if id(parameter) in is_float32 else case.c)
            continue
        found["weights"] += own * num_bytes
        found["moments"] += 2 * own * (2 if config.optimizer.state_dtype == "bfloat16" else num_bytes)
    terms = peak_memory(case)[1]
    assert terms.get("weights", 0) + terms.get("adapters", 0) == found["weights"] == gradient_bytes(case)
    assert (terms["moments"], terms.get("frozen weights", 0)) == (found["moments"], found["frozen"])


def test_a_case_of_one_gpu_by_hand() -> None:
    """The moment of the loss of one_gpu_35b.toml, from the shapes of 35B-A3B."""
    case = case_of(load_config(["--config=benchmarks/one_gpu_35b.toml", "--activation_checkpoint.mode=none"]), 1)
    moment, terms = peak_memory(case)
    experts = 12 * 32 * 3 * 2048 * 512
    table = parameters(case.shape)
    outside = 12 * 32 * 2048 + 9 * 2 * 32
    total = sum(prod(each.shape) for each in table.values())
    assert terms["weights"] == 4 * total
    assert terms["moments"] == 8 * total
    assert sum(prod(each.shape) for each in table.values() if each.expert_dim is not None) == experts
    assert moment == "the loss"  # all that is cast is there once more in bfloat16, and no gradient
    assert terms["gathered weights"] == 2 * (total - outside)
    assert "gradients" not in terms
    # 16,384 tokens are four chunks of 4096, of which three sizes are alive, and the head's gradient is in float32.
    logits = 3 * 2 * 4096 * 248320 + 4 * 248320 * 2048
    assert terms["loss: logits, the head's gradient"] == logits + 16384 * (2048 * 12 + 64 * 4)
