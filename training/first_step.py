"""The first logged step against the plan: predicted and actual peak and time, and the term that is off."""

import logging
from collections.abc import Callable, Mapping

import torch

from config.options import Config
from config.reading import model_config
from training.hardware import GIB
from training.memory import LASTING
from training.plan import Plan, Where, make_plan, uncertain
from training.recorded import GPUS_PER_NODE, OFF_BY, gpu_named

logger = logging.getLogger("train")


class FirstStep:
    """Says it once, on GPUs that the planner knows, of text: how many images come it cannot know before."""

    def __init__(self, config: Config, world_size: int, device: torch.device) -> None:
        self._plan: Plan | None = None
        gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if gpu is not None and model_config(config).vision is None:
            per_node = min(world_size, torch.cuda.device_count() or GPUS_PER_NODE)
            self._where = Where(world_size, per_node, gpu, imbalance=1.0)
            self._plan = make_plan(config, self._where)

    @property
    def waits(self) -> bool:
        """Whether it is still to be said; the same on all ranks."""
        return self._plan is not None

    def compare(self, metrics: Mapping[str, float], seconds: float, device: torch.device, compiles: bool) -> None:
        """At a logged step, which took `seconds` by itself. One that compiles has no time to compare: the next has."""
        if self._plan is not None and not compiles:
            lasting = torch.cuda.memory_allocated(device) / GIB
            plan, self._plan = self._plan, None
            logger.info(compared(plan, metrics, lasting, seconds, lambda: uncertain(plan, self._where)))


def compared(
    plan: Plan, metrics: Mapping[str, float], lasting_gib: float, seconds: float, reasons: Callable[[], list[str]]
) -> str:
    """One line. metrics: peak_memory_gib, data_seconds and expert_load_max_over_mean are read; lasting_gib: what is
    allocated between steps, without gradients; reasons: what lies outside of what was measured, asked for if it is off.
    """
    peak, actual = plan.peak / GIB, metrics["peak_memory_gib"]
    line = f"plan: peak {peak:.1f} GiB, actual {actual:.1f}; step {plan.time.seconds:.3f} s, actual {seconds:.3f}"
    terms = []
    if abs(peak / actual - 1) > OFF_BY["peak"]:
        fixed = sum(plan.memory.get(term, 0.0) for term in LASTING) / GIB
        if abs(fixed - lasting_gib) > abs(peak - actual) / 2:
            terms.append(f"memory is off by weights and moments: {fixed:.1f} GiB, actual {lasting_gib:.1f}")
        else:
            others = {term: size for term, size in plan.memory.items() if term not in LASTING}
            largest = max(others, key=lambda term: others[term])
            terms.append(f"memory is off by what comes and goes in a step, of which most is {largest}")
    late = seconds - plan.time.seconds
    if abs(late) > OFF_BY["time"] * seconds:
        if metrics["data_seconds"] > late / 2 > 0:
            terms.append(f"time is off by data: it was waited for {metrics['data_seconds']:.3f} s")
        elif plan.case.degrees.expert > 1 and late > 0 and metrics["expert_load_max_over_mean"] > 2:
            load = metrics["expert_load_max_over_mean"]
            terms.append(f"time is off by the experts' load: the largest is {load:.1f} times the mean")
        else:
            largest = max(plan.time.by_kind, key=lambda kind: plan.time.by_kind[kind])
            terms.append(f"time is off, most of the plan's is {largest}")
    if terms and (outside := reasons()):
        terms.append("outside of what was measured: " + "; ".join(outside))
    return ". ".join([line, *terms])
