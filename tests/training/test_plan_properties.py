"""What is true of every plan, whatever the model, the layout and the GPUs: tried on drawn ones."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.checks import check_config
from config.reading import load_config
from errors import UserError
from training.memory import GIB, LASTING
from training.plan import Images, Plan, Where, alternatives, as_options, describe, fits, make_plan, uncertain

TINY = "--config=qwen35moe_tiny.toml"
LARGE = "--config=benchmarks/one_gpu_35b.toml"
TRIES = settings(max_examples=60, deadline=None, derandomize=True)


def one_of(key: str, *values: object) -> st.SearchStrategy[list[str]]:
    return st.sampled_from([[], *([f"--{key}={value}"] for value in values)])


TOWER = [
    "--model.config.vision_config.depth=2", "--model.config.vision_config.hidden_size=64",
    "--model.config.vision_config.num_heads=4", "--model.config.image_token_id=4098",
    "--model.config.video_token_id=4099", "--model.config.vision_start_token_id=4096",
    "--model.config.vision_end_token_id=4097", "--data.tokenizer=data/tiny_vision/model",
]  # fmt: skip
OPTIONS = [
    st.sampled_from([[TINY], [LARGE], [TINY, "--model.config.vocab_size=4112", *TOWER], [LARGE, *TOWER]]),
    one_of("model.config.tie_word_embeddings", "true"),
    one_of("model.config.num_experts_per_tok", 1),
    one_of("model.config.full_attention_interval", 1, 100),
    one_of("model.config.shared_expert_intermediate_size", 1, 7),
    one_of("model.config.num_experts", 12, 33),
    one_of("mtp.train", "head", "joint"),
    one_of("model.freeze", "vision", "merger", "vision,merger", "text", "embeddings,head", "experts,router,norms"),
    st.sampled_from([[], ["--lora.rank=8"], ["--lora.rank=8", "--lora.targets=experts,shared_expert,head"]]),
    one_of("training.master_dtype", "bfloat16"),
    one_of("training.dtype", "float32"),
    one_of("optimizer.state_dtype", "bfloat16", "float32"),
    one_of("activation_checkpoint.mode", "none", "full"),
    one_of("parallelism.expert_parallel_degree", 1, 2, 4, 3),
    one_of("parallelism.context_parallel_degree", 2, 3),
    one_of("parallelism.data_parallel_replicate_degree", 2, 3, 64),
    one_of("training.sequence_length", 1, 4096, 262144),
    one_of("training.local_batch_size", 3),
    one_of("training.global_batch_size", 1, 1000),
]
COMMANDS = st.tuples(*OPTIONS).map(lambda parts: [*itertools.chain(*parts), "--checkpoint.enable=false"])
GPUS = st.sampled_from([1, 2, 3, 7, 8, 12, 64, 512, 4096])
PLACES = st.builds(
    Where,
    gpus=GPUS,
    gpus_per_node=st.sampled_from([4, 6, 8, 16]),
    gpu=st.sampled_from(["h100", "h200"]),
    documents=st.sampled_from([(), (100, 7), (10**8,)]),
    imbalance=st.sampled_from([1.0, 1.5]),
    images=st.sampled_from([None, None, Images(64, 96, 0.3)]),
)


def plan_or_mistake(words: list[str], where: Where) -> Plan | str:
    try:
        return make_plan(load_config(words), where)
    except UserError as error:
        return str(error)


@TRIES
@given(COMMANDS, PLACES)
def test_a_plan_is_made_of_its_terms_or_refused_as_train_py_would(words: list[str], where: Where) -> None:
    plan = plan_or_mistake(words, where)
    if isinstance(plan, str):
        assert len(plan.splitlines()) == 1
        if plan.startswith("--images"):  # no option of train.py's
            return
        with pytest.raises(UserError) as error:
            check_config(load_config(words), where.gpus)
        assert str(error.value) == plan
        return
    numbers = [*plan.memory.values(), *plan.time.by_kind.values()]
    numbers += [part for link in plan.time.links for part in (link.seconds, link.hidden, link.seconds - link.hidden)]
    assert all(0 <= number < math.inf for number in numbers)
    assert plan.peak == sum(plan.memory.values()) > 0
    assert plan.time.seconds == sum(plan.time.by_kind.values()) > 0
    table = describe(plan, where).partition("worst moment")[2].partition("Time of a step")[0]
    shown = [
        float(line.split()[-1]) for line in table.splitlines()[1:-1] if line.startswith("  ") and " of " not in line
    ]
    assert sum(shown) <= plan.peak / GIB + 0.05 * len(shown)
    assert all(reason.count(": ") >= 1 for reason in uncertain(plan, where))


@TRIES
@given(COMMANDS, st.integers(1, 300), st.integers(1, 300))
def test_more_gpus_hold_no_more_of_what_lasts(words: list[str], few: int, more: int) -> None:
    words = [word for word in words if not word.startswith("--parallelism.")]
    words += ["--parallelism.expert_parallel_degree=1"]
    plans = [plan_or_mistake(words, Where(gpus, 8, "h100")) for gpus in (min(few, more), max(few, more))]
    if not any(isinstance(plan, str) for plan in plans):
        first, second = (sum(plan.memory.get(term, 0.0) for term in LASTING) for plan in plans)
        assert second <= first


@TRIES
@given(COMMANDS, PLACES)
def test_longer_rows_keep_more_and_take_longer(words: list[str], where: Where) -> None:
    words = [word for word in words if "sequence_length" not in word]
    where = where._replace(documents=(), images=None)
    plans = [plan_or_mistake([*words, f"--training.sequence_length={n}"], where) for n in (1024, 2048, 32768)]
    if not any(isinstance(plan, str) for plan in plans):
        for shorter, longer in itertools.pairwise(plans):
            assert longer.peak > shorter.peak
            assert longer.time.seconds >= 0.999999 * shorter.time.seconds


def changed_words(words: list[str], options: str) -> list[str]:
    """With these options in the place of those that have the same names."""
    new = dict(zip(options.split()[::2], options.split()[1::2])) if options.startswith("--") else {}
    return [word for word in words if word.partition("=")[0] not in new] + [f"{k}={v}" for k, v in new.items()]


@settings(TRIES, max_examples=12)
@given(COMMANDS, PLACES)
def test_what_is_recommended_is_accepted_fits_and_ranks_as_it_is_said(words: list[str], where: Where) -> None:
    if isinstance(plan_or_mistake(words, where), str):
        return
    config = load_config(words)
    rates = []
    for plan, change in alternatives(config, where)[:4]:
        again = load_config(changed_words(words, as_options(config, change)))
        check_config(again, where.gpus)
        planned = make_plan(again, where)
        assert (planned.peak, planned.tokens_per_second) == (plan.peak, plan.tokens_per_second)
        assert fits(planned, where) == "fits"
        rates.append(planned.tokens_per_second)
    assert all(later <= 1.011 * earlier for earlier, later in itertools.pairwise(rates))


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_adapters_take_less_memory_and_time(gpus: int, mode: str) -> None:
    words = [LARGE, f"--activation_checkpoint.mode={mode}", "--training.global_batch_size=256"]
    whole, adapters = (
        make_plan(load_config([*words, *more]), Where(gpus, 8, "h100")) for more in ([], ["--lora.rank=16"])
    )
    assert adapters.peak < whole.peak
    assert adapters.time.seconds < whole.time.seconds
    more: list[Any] = [
        make_plan(load_config([*words, f"--lora.rank={rank}"]), Where(gpus, 8, "h100")) for rank in (8, 64)
    ]
    assert more[0].memory["adapters"] < more[1].memory["adapters"]
