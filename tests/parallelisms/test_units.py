"""Blocks are gathered together where they are small and their experts are units of their own."""

from dataclasses import replace

import pytest

from config.reading import load_config, model_config
from models.qwen35_moe.config import ModelConfig
from parallelisms.degrees import Degrees
from parallelisms.units import dense_units, head_is_unit, kept_gathered
from tests.models.qwen35_moe.shapes import tiny_config


def indices(shape: ModelConfig, expert_degree: int, is_kept: bool = False) -> list[list[int]]:
    return [list(unit) for unit in dense_units(shape, expert_degree, is_kept)]


def test_several_blocks_of_the_trunk_are_a_unit_where_experts_are_none_of_it() -> None:
    shape = tiny_config(num_hidden_layers=5, layer_types=tiny_config().layer_types[:1] * 5)
    assert indices(shape, 1) == indices(shape, 1, is_kept=True) == [[0], [1], [2], [3], [4]]
    assert indices(shape, 2) == indices(shape, 8) == [[0, 1], [2, 3], [4]]
    assert indices(shape, 2, is_kept=True) == indices(shape, 8, is_kept=True) == [[0, 1, 2, 3], [4]]
    with_mtp = replace(shape, mtp_num_hidden_layers=1)  # not with the trunk's last one
    assert indices(with_mtp, 2) == [[0, 1], [2, 3], [4], [5]]
    assert indices(with_mtp, 2, is_kept=True) == [[0, 1, 2, 3], [4], [5]]
    assert indices(with_mtp, 1) == [[0], [1], [2], [3], [4], [5]]


def test_the_head_is_a_unit_where_it_is_sharded_and_run_once() -> None:
    shape = tiny_config()
    assert head_is_unit(shape, 2)
    assert not head_is_unit(shape, 1)
    assert not head_is_unit(replace(shape, tie_word_embeddings=True), 2)
    assert not head_is_unit(replace(shape, mtp_num_hidden_layers=1), 2)


@pytest.mark.parametrize(
    ("changes", "of_freed", "of_kept"),
    [
        ((), 20, 10),
        (("--model.config.num_experts=512",), 20, 10),  # experts do not count
        (("--model.config.hidden_size=3072", "--model.config.num_attention_heads=32"), 40, 40),  # as the 122B
    ],
)
def test_large_blocks_are_units_by_themselves(changes: tuple[str, ...], of_freed: int, of_kept: int) -> None:
    shape = model_config(load_config(["--config=qwen35moe_35b_a3b.toml", *changes]))
    assert (len(dense_units(shape, 8, False)), len(dense_units(shape, 8, True))) == (of_freed, of_kept)
    assert len(dense_units(shape, 1, True)) == 40


@pytest.mark.parametrize(
    ("choice", "degrees", "changes", "expected"),
    [
        ("auto", Degrees(1, 8, 8), (), (True, False)),
        ("auto", Degrees(1, 8, 1), (), (False, False)),  # experts would be kept too
        (
            "auto",
            Degrees(1, 8, 8),
            ("--model.config.hidden_size=3072", "--model.config.num_hidden_layers=48"),
            (False,) * 2,
        ),
        ("always", Degrees(1, 8, 8), (), (False, False)),
        ("never", Degrees(1, 8, 1), (), (True, True)),
        ("always", Degrees(8, 1, 1), (), (True, True)),  # nothing is sharded
    ],
)
def test_what_is_kept(choice: str, degrees: Degrees, changes: tuple[str, ...], expected: tuple[bool, bool]) -> None:
    shape = model_config(load_config(["--config=qwen35moe_35b_a3b.toml", *changes]))
    assert kept_gathered(shape, degrees, choice, "selective") == expected
    freed_by_auto = choice == "auto" and degrees.shard > 1  # with "full", which is for who is short of memory
    assert kept_gathered(shape, degrees, choice, "full") == ((False, False) if freed_by_auto else expected)
