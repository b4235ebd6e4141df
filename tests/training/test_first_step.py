"""What a run says of its plan at its first logged step."""

import logging

import pytest
import torch

from config.reading import load_config
from training.first_step import FirstStep, compared
from training.memory import GIB
from training.plan import Plan, Where, make_plan

ONE_GPU = ["--config", "benchmarks/one_gpu_35b.toml"]


def plan_of(arguments: list[str], where: Where) -> Plan:
    return make_plan(load_config(arguments), where)


METRICS = {"peak_memory_gib": 54.6, "data_seconds": 0.001, "expert_load_max_over_mean": 1.2}


def test_the_first_logged_step_says_what_was_predicted() -> None:
    plan = plan_of(ONE_GPU, Where(1, 8, "h100"))
    lasting = sum(plan.memory[term] for term in ("weights", "moments")) / GIB
    said = compared(plan, METRICS, lasting, plan.time.seconds, list)
    assert said == f"plan: peak 54.5 GiB, actual 54.6; step {plan.time.seconds:.3f} s, actual {plan.time.seconds:.3f}"
    late = 2 * plan.time.seconds
    assert "time is off by data" in compared(plan, METRICS | {"data_seconds": 0.3}, lasting, late, list)
    assert "time is off, most of the plan's is dense products" in compared(plan, METRICS, lasting, late, list)
    more = METRICS | {"peak_memory_gib": 64.6}
    assert "most is activations" in compared(plan, more, lasting, plan.time.seconds, list)
    told = compared(plan, more, lasting + 10, plan.time.seconds, lambda: ["2 GPUs: links"])
    assert "off by weights and moments: 29.6 GiB, actual 39.6" in told
    assert told.endswith("outside of what was measured: 2 GPUs: links")


def test_a_run_on_a_known_gpu_says_it_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30 * GIB)
    caplog.set_level(logging.INFO, logger="train")
    first = FirstStep(load_config(ONE_GPU), 1, device)
    first.compare(METRICS, 30.0, device, compiles=True)
    assert not caplog.messages
    for _ in range(2):
        first.compare(METRICS, 0.34, device, compiles=False)
    (said,) = caplog.messages
    seconds = plan_of(ONE_GPU, Where(1, 8, "h100")).time.seconds
    assert said.startswith(f"plan: peak 54.5 GiB, actual 54.6; step {seconds:.3f} s, actual 0.340")
    for device_type, name in (("cpu", ""), ("cuda", "NVIDIA A100")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        FirstStep(load_config(ONE_GPU), 1, torch.device(device_type)).compare(METRICS, 1.0, device, compiles=False)
    assert len(caplog.messages) == 1


def test_images_and_the_load_of_experts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A model with a tower has no plan, as nobody knows how many images come; uneven experts are named."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    caplog.set_level(logging.INFO, logger="train")
    vision = load_config(["--config", "benchmarks/one_gpu_vision.toml"])
    FirstStep(vision, 1, torch.device("cuda")).compare(METRICS, 1.0, torch.device("cuda"), compiles=False)
    assert not caplog.messages
    plan = plan_of([*ONE_GPU, "--parallelism.expert_parallel_degree=2"], Where(2, 8, "h100"))
    even, uneven = (METRICS | {"expert_load_max_over_mean": load} for load in (1.2, 3.1))
    late = 1.5 * plan.time.seconds
    assert "the experts' load: the largest is 3.1 times the mean" in compared(plan, uneven, 0.0, late, list)
    assert "experts' load" not in compared(plan, even, 0.0, late, list)
    assert "experts' load" not in compared(plan, uneven, 0.0, plan.time.seconds / 2, list)
