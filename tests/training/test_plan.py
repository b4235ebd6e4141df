"""The planner's command, what it recommends, and what a run says of it at its first logged step."""

import itertools
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from config.reading import load_config
from errors import UserError
from training.hardware import GPUS
from training.plan import (
    Change,
    Plan,
    Where,
    alternatives,
    as_options,
    changed,
    describe,
    fits,
    main,
    make_plan,
    uncertain,
)

ROOT = Path(__file__).resolve().parents[2]
ONE_GPU = ["--config", "benchmarks/one_gpu_35b.toml"]
WHOLE = ["--config", "qwen35moe_35b_a3b.toml", "--data.tokenizer=data/tiny/tokenizer"]


DENSE_GATHERS = ("all-gather", "fsdp")


def plan_of(arguments: list[str], where: Where) -> Plan:
    return make_plan(load_config(arguments), where)


def test_the_command_needs_no_gpu_and_seconds() -> None:
    command = [sys.executable, "-m", "training.plan", *WHOLE, "--gpus", "64"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60  # of the processor, not the clock
    for part in ("weights", "peak", "dense products", "tokens/s a GPU", "all-to-all", "the fastest first", "64 GPUs"):
        assert part in done.stdout, part


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus=0"], "--gpus = 0: expected at least 1"),
        (["--gpus=2", "--gpu=abacus"], "argument --gpu: invalid choice: 'abacus'"),
        (["--gpus=2", "--gpus", "4"], "--gpus is given a second time: expected one value"),
        (["--gpus=2", "--gpus-per=4"], "--gpus-per = '4' is unknown"),
        (["--gpus=2", "--gpus-per-node=-1"], "--gpus-per-node = -1: expected at least 1"),
        (["--gpus=1000000000"], "--gpus = 1000000000: expected at least 1 and at most 1048576"),
        (["--gpus=2", "--imbalance=nan"], "--imbalance = nan: expected at least 1"),
        (["--gpus=2", "--alternatives=-1"], "--alternatives = -1: expected at least 0"),
        (["--gpus=2", "--documents=" + "9" * 5000], "expected lengths as 4096,1024"),
        (["--gpus=2", "--documents=٣"], "expected lengths as 4096,1024"),
        (["--gpus=2", "--images=64x64:0.0"], "expected as 1080x1920:0.3"),
        (["--gpus=2", "--lora.rank=8", "--checkpoint.enable"], "model.initial_load = 'none': lora.rank = 8 saves"),
        (["--gpus=2", "--model.freeze=merger"], "the model has no part 'merger'"),
        (
            ["--gpus=2", "--optimizer.state_dtype=bfloat16", "--optimizer.betas=0.9,0.999"],
            "optimizer.betas = [0.9, 0.99",
        ),
        (["--gpus=2", "--documents=4,x"], "--documents = '4,x': expected lengths as 4096,1024"),
        (["--gpus=2", "--images=big"], "--images = 'big': expected as 1080x1920:0.3"),
        (["--gpus=2", "--images=64x64:0.5"], "--images: expected a model with a vision_config"),
        (["--gpus=3", "--parallelism.expert_parallel_degree=2"], "expert_parallel_degree = 2: expected a divisor"),
    ],
)
def test_mistakes_are_told(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        main([*ONE_GPU, *arguments])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("4000x4000:0.5", "--images: one of 15,625 tokens: expected at most training.sequence_length = 4,096"),
        ("10x9999:0.5", "--images: 9999 x 10 pixels: expected sides in a ratio of 200 at most"),
    ],
)
def test_images_that_no_row_has_room_for_are_told(images: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        main(["--config=benchmarks/one_gpu_vision.toml", "--gpus=1", f"--images={images}"])
    assert str(error.value) == expected


def test_what_died_of_memory_after_minutes_is_told_in_a_second() -> None:
    where = Where(1, 8, "h100")
    plan = plan_of([*ONE_GPU, "--model.config.num_hidden_layers=40"], where)
    assert fits(plan, where) == "does not fit"
    assert "does not fit" in describe(plan, where)
    assert fits(plan_of(ONE_GPU, where), where) == "fits"


def test_recommended_options_make_the_plan_that_they_stand_for() -> None:
    where = Where(64, 8, "h100")
    config = load_config(WHOLE)
    found = alternatives(config, where)
    rates = [plan.tokens_per_second for plan, _ in found]
    assert len(found) > 20
    assert all(later <= 1.011 * earlier for earlier, later in itertools.pairwise(rates))
    for plan, change in found[:5]:
        again = plan_of([*WHOLE, *as_options(config, change).split()], where)
        assert (again.peak, again.tokens_per_second) == (plan.peak, plan.tokens_per_second)
        assert plan.peak < GPUS["h100"].capacity


def test_more_of_what_costs_memory_costs_memory() -> None:
    where = Where(8, 8, "h200")
    base = load_config([*WHOLE, "--activation_checkpoint.mode=full"])
    peaks = {}
    for mode in ("full", "selective", "none"):
        plan = make_plan(changed(base, {("activation_checkpoint", "mode"): mode}), where)
        peaks[mode] = plan.peak
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    fuller = {("activation_checkpoint", "mode"): "none", ("parallelism", "expert_room"): 0.0}
    assert make_plan(changed(base, fuller), where._replace(imbalance=2.0)).peak > peaks["none"]
    assert make_plan(changed(base, fuller | {("parallelism", "expert_room"): 2.0}), where).peak > peaks["none"]
    halved = make_plan(changed(base, {("training", "master_dtype"): "bfloat16"}), where)
    of_float32 = 8 * halved.case.sizes().outside  # what is outside FSDP stays float32
    assert (halved.memory["moments"] - of_float32) * 2 == make_plan(base, where).memory["moments"] - of_float32


def test_what_stays_gathered_takes_memory_and_is_freed_where_that_helps() -> None:
    where = Where(8, 8, "h200")
    words = [*WHOLE, "--activation_checkpoint.mode=selective", "--parallelism.expert_parallel_degree=8"]
    kept, freed = (plan_of([*words, f"--parallelism.reshard_after_forward={how}"], where) for how in ("auto", "always"))
    units = freed.case.sizes().units(freed.case.shape, 8, False)
    assert kept.moment == freed.moment == "the loss"
    assert kept.peak - freed.peak == 2 * sum(units[:-1])  # the last one is there anyway
    gathers = [
        link.traffic.calls for plan in (kept, freed) for link in plan.time.links if link.traffic[:2] == DENSE_GATHERS
    ]
    assert gathers[0] < gathers[1]
    casts = [plan.time.by_kind["weights cast and gathered"] for plan in (kept, freed)]
    assert casts[0] < casts[1]

    def freed_of(found: list[tuple[Plan, Change]]) -> set[bool]:
        own = [change for _, change in found if change["parallelism", "expert_parallel_degree"] == 8]
        return {("parallelism", "reshard_after_forward") in change for change in own}

    config = load_config(words)
    assert True in freed_of(alternatives(config, Where(8, 8, "h100")))  # where 2 GiB decide
    assert False in freed_of(alternatives(config, where))


def test_a_trunk_that_runs_forward_alone_keeps_nothing() -> None:
    where = Where(8, 8, "h200")
    joint, head = (plan_of([*WHOLE, f"--mtp.train={train}"], where) for train in ("joint", "head"))
    of_blocks = [sum(size for term, size in plan.memory.items() if "activations," in term) for plan in (joint, head)]
    assert of_blocks[1] <= of_blocks[0] / 40
    assert head.peak < joint.peak
    assert head.time.flops < joint.time.flops


def test_parts_that_do_not_train_have_no_gradients_and_no_moments() -> None:
    where = Where(8, 8, "h200")
    whole, experts, text = (
        plan_of([*WHOLE, *options], where)
        for options in ([], ["--model.freeze=experts"], ["--lora.rank=8", "--checkpoint.enable=false"])
    )
    assert text.memory["moments"] < experts.memory["moments"] < whole.memory["moments"] / 8
    assert experts.memory["frozen weights"] == 2 * whole.case.sizes().experts / 8
    assert text.peak < experts.peak < whole.peak


def test_it_says_where_nothing_was_measured() -> None:
    assert uncertain(plan_of(ONE_GPU, Where(1, 8, "h100")), Where(1, 8, "h100")) == []
    where = Where(16, 8, "h100")
    reasons = uncertain(plan_of([*WHOLE, "--parallelism.context_parallel_degree=4"], where), where)
    assert any(reason.startswith("16 GPUs") for reason in reasons)
    assert any(reason.startswith("several nodes") for reason in reasons)
    assert any(reason.startswith("context degree 4") for reason in reasons)
    assert not any(
        reason.startswith("several nodes") for reason in uncertain(plan_of(WHOLE, where), Where(16, 16, "h100"))
    )
    assert any(reason.startswith("several nodes") for reason in uncertain(plan_of(WHOLE, where), Where(8, 4, "h100")))
    adapters = plan_of([*ONE_GPU, "--lora.rank=8", "--checkpoint.enable=false"], two := Where(2, 8, "h200"))
    assert [reason.split(":")[0] for reason in uncertain(adapters, two)] == ["frozen weights over several GPUs"]
    joint = uncertain(plan_of([*ONE_GPU, "--mtp.train=joint"], two), two)
    assert [reason.split(":")[0] for reason in joint] == ["multi-token prediction"]
    wide = uncertain(plan_of([*ONE_GPU, "--model.config.hidden_size=3072"], Where(1, 8, "h100")), Where(1, 8, "h100"))
    assert any(reason.startswith("other widths") for reason in wide)
