"""The table of ceilings: none above what its vendor says, each with its source, and each read."""

import re

import pytest

from config.reading import load_config
from training import hardware, step_time
from training.hardware import GPUS, HIDDEN, LINKS, Gpu
from training.memory import GIB, Case, case_of
from training.recorded import recorded_runs

RATES = ("dense", "experts", "attention_forward", "attention_backward", "memory", "optimizer")
MEMORY = {"h100": (80e9, 3.35e12), "h200": (141e9, 4.8e12)}  # bytes, and bytes a second, from the datasheets


def case(*options: str, gpus: int = 1) -> Case:
    return case_of(load_config(["--config=benchmarks/one_gpu_35b.toml", *options]), gpus)


@pytest.mark.parametrize("name", GPUS)
def test_no_rate_is_above_the_vendors(name: str) -> None:
    gpu, (num_bytes, rate) = GPUS[name], MEMORY[name]
    assert 0.95 * num_bytes < gpu.capacity <= 1.07 * num_bytes  # the vendor's GB may be GiB
    assert max(gpu.dense, gpu.experts, gpu.attention_forward, gpu.attention_backward) < gpu.peak
    assert max(gpu.memory, gpu.optimizer) <= rate
    assert max(LINKS.ring, LINKS.all_to_all) < 450e9  # NVLink 4
    assert LINKS.network < 400e9 / 8
    assert all(0 <= share < 1 for share in HIDDEN.values())


@pytest.mark.parametrize("name", GPUS)
def test_each_has_its_source_and_a_run_on_record(name: str) -> None:
    assert name.upper() in GPUS[name].source
    assert re.search(r"\d{4}-\d\d-\d\d", GPUS[name].source)
    runs = [run for run in recorded_runs() if run.gpu == name and run.peak_gib]
    assert runs
    assert all(run.peak_gib * GIB < GPUS[name].capacity for run in runs if run.peak_gib)


@pytest.mark.parametrize("rate", RATES)
def test_half_of_a_rate_takes_longer(rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = step_time.step_time(case(), "h100", 8).seconds
    slower: Gpu = GPUS["h100"]._replace(**{rate: getattr(GPUS["h100"], rate) / 2})
    monkeypatch.setitem(GPUS, "h100", slower)
    assert step_time.step_time(case(), "h100", 8).seconds > 1.005 * before


@pytest.mark.parametrize("rate", LINKS._fields)
def test_half_of_a_links_rate_takes_longer(rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 16 if rate == "network" else 8
    spread = case("--parallelism.expert_parallel_degree=4", "--training.global_batch_size=64", gpus=gpus)
    before = step_time.step_time(spread, "h100", 8)
    monkeypatch.setattr(step_time, "LINKS", LINKS._replace(**{rate: getattr(LINKS, rate) / 2}))
    after = step_time.step_time(spread, "h100", 8)
    slower = [link for link, old in zip(after.links, before.links) if link.seconds > 1.99 * old.seconds]
    assert slower
    for link in slower:
        assert link.over.startswith("network") == (rate == "network")
        is_exchange = link.traffic.kind in ("all-to-all", "reduce-scatter")  # gradients too, within a host
        assert rate == "network" or is_exchange == (rate == "all_to_all")


@pytest.mark.parametrize(
    "constant", ["DELTA_RULE", "CONVOLUTION", "PASSES_IN_PARTS", "WAIT_AT_EP", "HOST", "GAPS", "STEP"]
)
def test_more_of_a_constant_takes_longer(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = "--parallelism.expert_parallel_degree=2", "--parallelism.expert_room=0"
    small = case(*asks, "--training.sequence_length=64", gpus=2)
    long, value = case(*asks, gpus=2), getattr(hardware, constant)
    of = small if constant in ("HOST", "STEP") else long  # where the GPU has little to do

    def doubled(value: object) -> object:
        if isinstance(value, dict):
            return {key: 2 * each for key, each in value.items()}
        return tuple(2 * each for each in value) if isinstance(value, tuple) else 2 * value  # type: ignore[operator]

    before = step_time.step_time(of, "h100", 8).seconds
    monkeypatch.setattr(hardware, constant, doubled(value))
    assert step_time.step_time(of, "h100", 8).seconds > 1.005 * before


@pytest.mark.parametrize(
    ("share", "options", "gpus", "documents"),
    [
        ("LAID_OUT_SHARE", [], 2, ()),
        ("THIN_SHARE", ["--lora.rank=8", "--checkpoint.enable=false"], 1, ()),
        ("RAGGED", [], 1, (3000, 1096)),
    ],
)
def test_half_of_a_share_takes_longer(
    share: str, options: list[str], gpus: int, documents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    of, value = (
        case_of(load_config(["--config=benchmarks/one_gpu_35b.toml", *options]), gpus, documents),
        getattr(hardware, share),
    )
    before = step_time.step_time(of, "h100", 8).seconds
    monkeypatch.setattr(hardware, share, tuple(each / 2 for each in value) if isinstance(value, tuple) else value / 2)
    assert step_time.step_time(of, "h100", 8).seconds > 1.005 * before
