"""The degrees of a number of processes: the largest that fit, and those that are refused."""

from pathlib import Path

import pytest

from config.checks import check_config
from config.reading import model_config
from parallelisms.degrees import work_out_degrees
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
