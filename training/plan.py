"""Will it fit, how fast, over which wires: memory, time and traffic of a run, and better layouts, without a GPU.

    python -m training.plan --config X.toml --gpus 64 [--gpus-per-node 8] [--gpu h100] [--section.key value ...]

Options of its own: `--documents 4096,1024`: rows are cut into documents of these lengths, over and over (default: a row
is one); `--images 1080x1920:0.3`: so large a share of the tokens stands for images of this size; `--imbalance 1.1`:
what the fullest rank receives of experts' rows, over the mean; `--alternatives 5`: how many are shown. The other
options are train.py's. Formulas and rates stand in formulas.py, memory.py, step_time.py and hardware.py; recorded.py
has the runs that they are held to.
"""

import argparse
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from config.options import Config
from config.reading import load_config, model_config
from data.images import PixelRules, fit_image
from data.packing import BadSample
from errors import OneLineParser, UserError, exit_on_error
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.vision_config import VisionConfig
from training.hardware import GPUS
from training.memory import GIB, Case, case_of, peak_memory
from training.recorded import OFF_BY, outside, recorded_runs
from training.step_time import StepTime, step_time


class Images(NamedTuple):
    """Their height and width in pixels, and the share of the tokens that stands for them."""

    height: int
    width: int
    share: float

    def grid(self, vision: VisionConfig) -> tuple[int, int]:
        """Height and width in patches, by the published limits. Raises UserError."""
        rules = PixelRules(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
        try:
            height, width = fit_image(self.height, self.width, rules)
        except BadSample as error:
            raise UserError(f"--images: {error}") from None
        return height // vision.patch_size, width // vision.patch_size


class Where(NamedTuple):
    """What a run runs on, and what is not in its configuration."""

    gpus: int
    gpus_per_node: int
    gpu: str
    documents: tuple[int, ...] = ()
    imbalance: float = 1.1
    images: Images | None = None


class Plan(NamedTuple):
    """What a configuration takes there."""

    case: Case
    moment: str
    """The worst of a step, of memory."""
    memory: dict[str, float]
    """Bytes then, by term."""
    time: StepTime
    config: Config

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float:
        """A GPU's; rows that only fill up the last micro-batch do not count."""
        training, degrees = self.config.training, self.case.degrees
        tokens = training.global_batch_size * training.sequence_length
        return tokens / self.time.seconds / (degrees.replicate * degrees.shard)


def make_plan(config: Config, where: Where, shape: ModelConfig | None = None) -> Plan:
    """shape: the model's, if it is known. Raises UserError for what train.py would refuse on any machine."""
    case = case_of(config, where.gpus, where.documents, where.imbalance, shape)
    if where.images is not None:
        if case.shape.vision is None:
            raise UserError("--images: expected a model with a vision_config")
        case = _with_images(case, case.shape.vision, where.images, config.training.sequence_length)
    moment, memory = peak_memory(case)
    return Plan(case, moment, memory, step_time(case, where.gpu, where.gpus_per_node), config)


def _with_images(case: Case, vision: VisionConfig, images: Images, row: int) -> Case:
    """With as many images as their share allows, and one more in the fullest micro-batch if it is no whole number."""
    patches = math.prod(images.grid(vision))
    tokens = patches // vision.patches_per_token
    if tokens > row:
        raise UserError(f"--images: one of {tokens:,} tokens: expected at most training.sequence_length = {row:,}")
    of_micro_batch = images.share * case.num_tokens / tokens
    frames = ((patches, max(1, round(of_micro_batch * case.accumulation))),)
    return dataclasses.replace(case, patches=patches * math.ceil(of_micro_batch), frames=frames)


Change = dict[tuple[str, str], int | str]
"""(section, key) -> value."""


def changed(config: Config, change: Change) -> Config:
    """The configuration with these keys changed."""
    for (section, key), value in change.items():
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def _changes(config: Config, where: Where) -> Iterator[Change]:
    """Layouts that may be better: recomputation, degrees within a node, replicas, rows of a micro-batch, and the
    configuration's own; the batch of a step stays."""
    own, num_nodes = config.parallelism, where.gpus // where.gpus_per_node
    degrees = {n for n in range(1, min(where.gpus, where.gpus_per_node) + 1) if where.gpus % n == 0}
    replicas = {1, num_nodes, num_nodes // 8, own.data_parallel_replicate_degree} - {0}
    rows = {2**n for n in range(10)} | {config.training.local_batch_size}
    for mode, ep, cp, replicate, local in itertools.product(
        ("none", "selective", "full"),
        sorted(degrees | {own.expert_parallel_degree} - {-1}),
        sorted(degrees | {own.context_parallel_degree}),
        sorted(replicas),
        sorted(n for n in rows if n <= config.training.global_batch_size),
    ):
        yield {
            ("activation_checkpoint", "mode"): mode,
            ("parallelism", "expert_parallel_degree"): ep,
            ("parallelism", "context_parallel_degree"): cp,
            ("parallelism", "data_parallel_replicate_degree"): replicate,
            ("parallelism", "data_parallel_shard_degree"): -1,
            ("training", "local_batch_size"): local,
        }


def alternatives(config: Config, where: Where) -> list[tuple[Plan, Change]]:
    """Layouts that fit with the error of the prediction to spare, the fastest first; of those that are as fast within
    1 %, the one with less communication and less memory. Weights that "auto" keeps gathered are freed if that helps."""
    found, shape = [], model_config(config)
    for change in _changes(config, where):
        try:
            plan = make_plan(changed(config, change), where, shape)
            is_kept = plan.case.kept.dense and plan.case.degrees.shard > 1 and plan.case.reshard == "auto"
            if is_kept and fits(plan, where) != "fits":
                change = {**change, ("parallelism", "reshard_after_forward"): "always"}
                plan = make_plan(changed(config, change), where, shape)
        except UserError:
            continue  # degrees that cannot be
        if fits(plan, where) == "fits":
            found.append((plan, change))
    cheaper = {id(plan): sum(link.seconds for link in plan.time.links) + plan.peak / 1e15 for plan, _ in found}
    found.sort(key=lambda each: (-round(math.log(each[0].tokens_per_second) / 0.01), cheaper[id(each[0])]))
    return found


def as_options(config: Config, change: Change) -> str:
    """What of a change differs from the configuration, as options of the command line."""
    differs = {
        (section, key): value
        for (section, key), value in change.items()
        if getattr(getattr(config, section), key) != value
    }
    return " ".join(f"--{section}.{key} {value}" for (section, key), value in differs.items()) or "(as it is)"


def fits(plan: Plan, where: Where) -> str:
    """In a word or two."""
    capacity = GPUS[where.gpu].capacity
    if plan.peak > capacity:
        return "does not fit"
    return "fits" if plan.peak * (1 + OFF_BY["peak"]) <= capacity else "may fit"


def describe(plan: Plan, where: Where) -> str:
    """All tables but that of alternatives."""
    case, gpu, training = plan.case, GPUS[where.gpu], plan.config.training
    degrees, seconds = case.degrees, plan.time.seconds
    lines = [
        f"{where.gpus} x {where.gpu.upper()}, {min(where.gpus_per_node, where.gpus)} a node: replicate "
        f"{degrees.replicate}, shard {degrees.shard}, ep {degrees.expert}, cp {degrees.context}; {case.mode}; "
        f"micro-batches a GPU and step: {case.accumulation} of {case.num_tokens:,} tokens",
        "",
        f"Memory of a GPU, GiB, at the worst moment: {plan.moment}",
    ]
    lines += [f"  {term:44} {size / GIB:8.1f}" for term, size in plan.memory.items() if size > 0.05 * GIB]
    spare = (gpu.capacity - plan.peak) / GIB
    how_much = f"{spare:.1f} to spare" if spare >= 0 else f"{-spare:.1f} too many"
    lines += [f"  {'peak':44} {plan.peak / GIB:8.1f} of {gpu.capacity / GIB:.1f}: {fits(plan, where)}, {how_much}"]
    lines += ["", "Time of a step, seconds"]
    lines += [f"  {kind:44} {part:8.3f} {part / seconds:6.0%}" for kind, part in plan.time.by_kind.items()]
    hidden = sum(link.hidden for link in plan.time.links)
    lines += [f"  {'communication that is hidden':44} {hidden:8.3f}"] if hidden else []
    mfu = plan.time.flops * plan.tokens_per_second / gpu.peak
    days = f"; {training.steps:,} steps: {training.steps * seconds / 86400:.2f} days" if training.steps else ""
    lines += [
        f"  {'step':44} {seconds:8.3f}",
        f"  {plan.tokens_per_second:,.0f} tokens/s a GPU, {mfu:.1%} MFU of text{days}",
    ]
    if plan.time.links:
        lines += [
            "",
            "Traffic of a GPU in a step",
            f"  {'':16} {'axis':14} {'over':22} calls      GB   seconds  hidden",
        ]
        for link in sorted(plan.time.links, key=lambda link: -link.seconds):
            kind, axis, calls, num_bytes = link.traffic
            lines.append(
                f"  {kind:16} {axis:14} {link.over:22} {calls:5} {num_bytes / 1e9:7.2f} {link.seconds:9.3f} "
                f"{link.hidden / link.seconds if link.seconds else 0:7.0%}"
            )
    return "\n".join(lines)


def uncertain(plan: Plan, where: Where) -> list[str]:
    """In what this run is outside of all that was measured, and by which term."""
    return outside(plan.case, where.gpu, where.gpus_per_node, recorded_runs())


def parse_documents(text: str) -> tuple[int, ...]:
    """Lengths; none for an empty text. Raises UserError."""
    if text and not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text, re.ASCII):
        raise UserError(f"--documents = {text!r}: expected lengths as 4096,1024")
    return tuple(map(int, text.split(","))) if text else ()


def parse_images(text: str) -> Images | None:
    """HEIGHTxWIDTH:SHARE; None for an empty text. Raises UserError."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5}):(0?\.\d{1,9})", text, re.ASCII)
    if text and (found is None or not float(found[3])):
        raise UserError(f"--images = {text!r}: expected as 1080x1920:0.3")
    return Images(int(found[1]), int(found[2]), float(found[3])) if found else None


def _own_options(arguments: list[str]) -> tuple[Where, int, list[str]]:
    """Where it would run, how many alternatives are to be shown, and the options that are train.py's."""
    parser = OneLineParser(
        prog="python -m training.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu", type=str.lower, choices=tuple(GPUS), default="h100")
    parser.add_argument("--documents", default="", metavar="LENGTHS")
    parser.add_argument("--images", default="", metavar="HEIGHTxWIDTH:SHARE")
    parser.add_argument("--imbalance", type=float, default=1.1)
    parser.add_argument("--alternatives", type=int, default=5, metavar="NUMBER")
    options, rest = parser.parse_known_args(arguments)
    for name, value in vars(options).items():
        least, most = (0 if name == "alternatives" else 1), (100 if name == "imbalance" else 2**20)
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} = {value}: expected at least {least} and at most {most}")
    images, documents = parse_images(options.images), parse_documents(options.documents)
    where = Where(options.gpus, options.gpus_per_node, options.gpu, documents, options.imbalance, images)
    return where, options.alternatives, rest


def main(arguments: list[str]) -> None:
    where, number, rest = _own_options(arguments)
    config = load_config(rest)
    plan = make_plan(config, where)
    print(describe(plan, where))
    if number:
        found = alternatives(config, where)[:number]
        print(
            "\nLayouts that fit, the fastest first, within 1 % those that communicate less: tokens/s a GPU, peak GiB,"
        )
        print("options, in the place of those above that have the same names")
        for other, change in found:
            print(f"  {other.tokens_per_second:8,.0f} {other.peak / GIB:7.1f}  {as_options(config, change)}")
        if not found:
            print("  none: it takes more GPUs, larger ones, or a smaller state (--optimizer.state_dtype bfloat16)")
    reasons = uncertain(plan, where)
    if reasons:
        print("\nOutside of what was measured, so that the error is not known:")
        print("\n".join(f"  {reason}" for reason in reasons))
    else:
        bounds = f"{OFF_BY['peak']:.0%} in memory and {OFF_BY['time']:.0%} in time"
        print(f"\nInside of what was measured: on {len(recorded_runs())} recorded runs off by at most {bounds}.")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
