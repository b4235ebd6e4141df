"""The degrees of a number of processes: the largest that fit, and those that are refused."""

from pathlib import Path

import pytest

from config.checks import check_config
from config.reading import model_config
from parallelisms.degrees import shape_on_a_rank, work_out_degrees
from tests.config.runs import error_of, load, write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path)
    return tmp_path


def test_experts_over_more_processes_than_divide_them() -> None:
    options = ("--model.config.num_experts=6", "--parallelism.expert_parallel_degree=4")
    assert "= 4: expected a divisor of the model's num_experts = 6" in error_of(*options, world_size=4)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("moe_intermediate_size", 33, "does not divide the model's 2 * moe_intermediate_size = 66"),
        ("hidden_size", 2046, "does not divide the model's hidden_size = 2046"),
    ],
)
def test_experts_that_fsdp_cannot_cut_evenly(key: str, value: int, expected: str) -> None:
    option = f"--model.config.{key}={value}"
    batch = "--training.global_batch_size=8"
    assert expected in error_of(option, batch, "--parallelism.expert_parallel_degree=2", world_size=8)
    check_config(
        load(option, batch), 8
    )  # without expert parallelism they are cut between experts, as evenly as it goes


@pytest.mark.parametrize(
    ("world_size", "shard", "num_experts", "expected"),
    [
        (1, -1, 8, 1),
        (2, -1, 8, 2),
        (3, -1, 8, 1),
        (4, -1, 8, 4),
        (16, -1, 8, 8),
        (6, -1, 8, 1),
        (4, 2, 8, 2),
        (12, -1, 9, 3),
    ],
)
def test_the_largest_expert_degree_that_fits(world_size: int, shard: int, num_experts: int, expected: int) -> None:
    options = [f"--model.config.num_experts={num_experts}", "--parallelism.expert_parallel_degree=-1"]
    if shard > 0:
        options.append(f"--parallelism.data_parallel_replicate_degree={world_size // shard}")
    config = load(*options)
    check_config(config, world_size)
    assert work_out_degrees(config.parallelism, config.training, model_config(config), world_size).expert == expected


def of_model(changes: dict[str, int]) -> list[str]:
    """Options: full attention of 8 query and 2 key heads, linear attention of 8 key heads, but for `changes`."""
    numbers = {"num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_key_heads": 8} | changes
    return [f"--model.config.{key}={value}" for key, value in numbers.items()]


@pytest.mark.parametrize(
    ("world_size", "degree", "changes", "expected"),
    [
        (3, 2, {}, "expected a divisor of 3, the number of processes"),
        (2, 4, {}, "expected a divisor of 2, the number of processes"),
        (16, 16, {}, "expected a divisor of the model's num_attention_heads = 8"),
        (8, 8, {"linear_num_key_heads": 4}, "expected a divisor of the model's linear_num_key_heads = 4"),
        (4, 4, {"num_attention_heads": 24, "num_key_value_heads": 6}, "of the model's num_key_value_heads = 6"),
        # Multi-token prediction alone has full attention.
        (8, 8, {"num_attention_heads": 4, "full_attention_interval": 5}, "of the model's num_attention_heads = 4"),
        (4, 4, {"num_attention_heads": 24, "num_key_value_heads": 6, "full_attention_interval": 5}, "value_heads = 6"),
    ],
)
def test_contexts_that_do_not_divide(world_size: int, degree: int, changes: dict[str, int], expected: str) -> None:
    options = [*of_model(changes), f"--parallelism.context_parallel_degree={degree}", "--mtp.train=joint"]
    message = error_of(*options, world_size=world_size)
    assert message.startswith(f"parallelism.context_parallel_degree = {degree}: ")
    assert expected in message


def test_contexts_that_do_not_divide_a_micro_batch() -> None:
    options = [*of_model({}), "--parallelism.context_parallel_degree=4", "--training.sequence_length=66"]
    expected = "expected a divisor of training.local_batch_size * sequence_length = 66"
    assert error_of(*options, world_size=4) == f"parallelism.context_parallel_degree = 4: {expected}"
    check_config(load(*options, "--training.local_batch_size=2"), 4)


@pytest.mark.parametrize(
    ("degree", "changes"),
    [
        (8, {}),
        (2, {"num_key_value_heads": 4}),
        # What the model does not have hinders nobody.
        (8, {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "full_attention_interval": 1}),
        (8, {"num_attention_heads": 6, "full_attention_interval": 5}),
    ],
)
def test_contexts_that_fit(degree: int, changes: dict[str, int]) -> None:
    config = load(*of_model(changes), f"--parallelism.context_parallel_degree={degree}")
    check_config(config, 16)
    degrees = work_out_degrees(config.parallelism, config.training, model_config(config), 16)
    assert (degrees.context, degrees.num_data_ranks) == (degree, 16 // degree)


def test_heads_on_a_rank() -> None:
    whole = model_config(load(*of_model({})))
    own = shape_on_a_rank(whole, 4)
    heads = (own.num_attention_heads, own.num_key_value_heads, own.linear_num_key_heads, own.linear_num_value_heads)
    assert heads == (2, 1, 2, whole.linear_num_value_heads // 4)
    assert (4 * own.key_dim, 4 * own.value_dim, own.head_dim) == (whole.key_dim, whole.value_dim, whole.head_dim)


def test_heads_that_the_model_does_not_have_and_context_does_not_divide() -> None:
    linear, full = ["--model.config.full_attention_interval=5"], ["--model.config.full_attention_interval=1"]
    shape = model_config(load(*of_model({"num_attention_heads": 10, "num_key_value_heads": 5}), *linear))
    assert shape_on_a_rank(shape, 2).linear_num_key_heads == 4
    shape = model_config(load(*of_model({"linear_num_key_heads": 5, "linear_num_value_heads": 10}), *full))
    assert shape_on_a_rank(shape, 2).num_attention_heads == 4
