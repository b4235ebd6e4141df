"""The tables of docs/scale.md are what the command makes, and the simulated step is one."""

import json
from pathlib import Path

import pytest

from benchmarks.scale import configuration, row, simulated, with_tables
from benchmarks.timeline import middle_blocks, overlap, read_trace
from errors import UserError
from training.plan import Where, alternatives

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("model", "gpus", "length"), [("35B-A3B", 64, 4096), ("397B-A17B", 64, 262144)])
def test_the_tables_are_the_commands(model: str, gpus: int, length: int) -> None:
    text = (ROOT / "docs/scale.md").read_text()
    table = text.split(f"<!-- table {model} -->\n")[1].split("<!-- end -->")[0]
    assert row(model, gpus, length, False) in table.splitlines()


def test_all_tables_are_the_commands() -> None:
    text = (ROOT / "docs/scale.md").read_text()
    assert with_tables(text) == text


def test_a_table_of_no_model_is_told() -> None:
    assert with_tables("no table") == "no table"
    with pytest.raises(UserError, match="table '1B': expected one of 35B-A3B"):
        with_tables("<!-- table 1B -->\n<!-- end -->")


def test_a_simulated_step_waits_for_weights_and_takes_as_long_as_the_plan(tmp_path: Path) -> None:
    found = alternatives(configuration("35B-A3B", 64, 4096), Where(64, 8, "h100"))
    plan = next(plan for plan, _ in found if plan.case.degrees == (1, 64, 1, 1))
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": simulated(plan)}))
    work, _ = read_trace(path)
    computing = sum(item.stop - item.start for item in work if item.lane == "computation") / 1000
    kinds = ("dense products", "experts' products", "attention", "delta rule", "convolution", "norms, routing, copies")
    assert computing == pytest.approx(sum(plan.time.by_kind[kind] for kind in kinds) / plan.case.accumulation)
    gathers = [item for item in work if item.lane == "all-gather"]
    reduces = [item for item in work if item.lane == "reduce-scatter"]
    first = next(item for item in work if item.lane == "computation")
    assert first.start >= gathers[0].stop
    assert len(gathers) == 2 * len(reduces) + 1
    assert set(middle_blocks(work)) == {"Forward pass of one block", "Backward pass of one block"}
    together, hidden = overlap(work)["together"]
    assert 0 < hidden < together
