"""Every option of a run: one frozen dataclass a TOML section; read from TOML and the command line, and checked.

Precedence: defaults below < TOML (`extends = "base.toml"`, relative to the file, merges a base first) < command line
(`--section.key value` or `--section.key=value`). Tables merge key by key, also `[model.config]`; lists replace. A
`model.path` of a later source takes the place of an earlier source's `model.config`.

Relative paths are taken from the working directory; what is to be read and is not there, from the repository's root.
A loaded Config holds absolute paths only, so a stored `config.toml` means the same wherever it is loaded.

    python config.py --world-size N --config FILE [--section.key value ...]     checks a run without starting it
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tomli
import tomli_w

from data.files import is_dataset, matches
from errors import UserError
from models.qwen35_moe.config import ModelConfig

ROOT = Path(__file__).resolve().parent


class Accept(NamedTuple):
    """Narrows a field's type, as the second argument of `Annotated`."""

    text: str
    """What is accepted, for messages and --help."""
    test: Callable[[Any], bool]


PositiveInt = Annotated[int, Accept("a positive integer", lambda n: n > 0)]
Count = Annotated[int, Accept("an integer of at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Accept("an integer from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)]
Degree = Annotated[int, Accept("a positive integer, or -1", lambda n: n > 0 or n == -1)]
Positive = Annotated[float, Accept("a positive number", lambda x: 0 < x < math.inf)]
PositiveOrInf = Annotated[float, Accept("a positive number, or inf", lambda x: x > 0)]
NotNegative = Annotated[float, Accept("a number of at least 0", lambda x: 0 <= x < math.inf)]
Ratio = Annotated[float, Accept("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Beta = Annotated[float, Accept("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Folder = Annotated[str, Accept("a folder", lambda path: path != "")]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The run as a whole."""

    output_dir: Folder = "outputs/run"
    """Folder for everything the run writes: config.toml, metrics.jsonl, checkpoints/, tensorboard/."""
    seed: Seed = 0
    """Determines the initial weights and the order of the data, whatever the number of processes."""
    deterministic: bool = False
    """Only deterministic algorithms: the same run on the same layout gives the same numbers bit for bit, slower."""
    collective_timeout_seconds: PositiveInt = 600
    """How long a process waits for the others; then the run ends and names those that did not come."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model's shape: either `path` or `config`."""

    path: str = ""
    """Hugging Face directory whose config.json gives the shape."""
    initial_load: Literal["none", "hf"] = "none"
    """What a run without checkpoints starts from. "none": random weights; "hf": the weights in `path`."""
    config: dict[str, Any] = field(default_factory=dict)
    """The shape as a table, with the keys of config.json's text_config; what is left out is as in 35B-A3B."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on, and how it becomes tokens."""

    format: Literal["text", "chat"] = "text"
    """What a sample is. "text": one document, every token trained on; "chat": a conversation, the assistant's turns."""
    path: tuple[str, ...] = ()
    """Files or globs (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt), folders that `datasets` or data.tokenize wrote,
    or names of datasets on the Hub: "owner/name", "owner/name:subset"."""
    weights: tuple[Positive, ...] = ()
    """Of the entries of `path`: the shares of their samples in what is trained on; they need not sum to 1. Empty: each
    sample as often as the others."""
    split: str = "train"
    """Of those datasets that come in several."""
    text_key: str = "text"
    """Name of the field that holds a document's text."""
    messages_key: str = "messages"
    """Name of the field that holds a conversation's messages, as transformers' chat templates take them."""
    tools_key: str = "tools"
    """Name of the field that holds the tools a conversation may use, if there is one."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are trained on."""
    train_empty_thinking: bool = False
    """Train on the empty <think></think> that a chat template puts before answers without reasoning."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to conversations that are longer than a row."""
    on_bad_sample: Literal["skip", "error"] = "skip"
    """"skip": go on, count it and write it down in skipped/ of the run's folder; "error": stop at the first."""
    tokenizer: str = ""
    """Hugging Face directory with tokenizer.json. Empty: `model.path`."""
    shuffle: bool = True
    """Read the documents in another random order each epoch, instead of the files' order."""
    num_workers: Count = 2
    """Background processes a rank that tokenise and pack. 0: in the training process. The data is the same."""
    end_of_document: bool = True
    """Append the tokenizer's end-of-sequence token to each document."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Steps, batch and precision."""

    steps: PositiveInt
    """Optimizer steps of the whole run, those before a resume included."""
    sequence_length: PositiveInt
    """Tokens in a row. Rows are filled with documents end to end; a document that does not fit is cut."""
    local_batch_size: PositiveInt = 1
    """Rows in one micro-batch of one process."""
    global_batch_size: PositiveInt
    """Rows in one optimizer step: processes * local_batch_size * micro-batches of each process."""
    max_grad_norm: PositiveOrInf = 1.0
    """Gradients are scaled down to this global 2-norm. inf: never."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are not finite is never applied. 'stop': end the run; 'skip': go on after it."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations and of weights in matrix products. "auto": bfloat16 on GPUs, float32 on CPUs."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored weights and the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What turns gradients into updates."""

    name: Literal["adamw"] = "adamw"
    """'adamw': Adam with decoupled weight decay."""
    lr: Positive
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the root of the mean square."""
    weight_decay: NotNegative = 0.1
    """Of weight matrices; norms, biases, A_log and dt_bias do not decay."""


@dataclass(frozen=True, kw_only=True)
class LRScheduler:
    """The learning rate over the run, as a factor of `optimizer.lr`."""

    warmup_steps: Count = 0
    """Steps of linear rise from 0 to the peak."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Curve from the peak to `min_lr_ratio` at the last step; "wsd": stay at the peak, fall linearly at the end."""
    decay_steps: Count = 0
    """Length of the final fall of "wsd", in steps; with any other decay it must be 0."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the last step / peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Losses on the router, beside the cross-entropy, that keep the experts in use."""

    aux_loss_coef: NotNegative = 0.0
    """Weight of the load-balancing loss. 0: off. Models of this family use 0.001."""
    aux_loss_scope: Literal["global", "hf"] = "global"
    """What is to be balanced. "global": the micro-batches of all processes together; "hf": each by itself, pooled over
    layers, as transformers does."""
    z_loss_coef: NotNegative = 0.0
    """Weight of the router z-loss, which keeps the router's logits small. 0: off."""
    force_balanced_routing: bool = False
    """Benchmarks only: tokens go to the experts in turn, whatever the router prefers."""


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How many processes share what. replicate * shard = number of processes; expert divides shard."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Groups of processes that each hold the whole model between them (HSDP)."""
    data_parallel_shard_degree: Degree = -1
    """Processes over which FSDP shards weights, gradients and optimizer state. -1: all that are left."""
    expert_parallel_degree: PositiveInt = 1
    """Processes over which the experts are spread; tokens travel to them. 1: experts are sharded like the rest."""


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpoint:
    """Less memory for more computation: activations that the backward pass computes again."""

    mode: Literal["none", "selective", "full"] = "none"
    """'none': keep all; 'selective': recompute what is cheap; 'full': keep each block's input and its routing alone."""


@dataclass(frozen=True, kw_only=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile each block."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation computes what."""

    attention: Literal["auto", "sdpa", "varlen", "cudnn", "fa4"] = "auto"
    """'sdpa': one call a document, runs everywhere; 'varlen': PyTorch's FlashAttention 2 over the stream, CUDA and
    bfloat16; 'cudnn': cuDNN where all documents of a micro-batch have one length, else as 'varlen'; 'fa4':
    FlashAttention 4 over the stream, package flash-attn-4 (Hopper, Blackwell), which 'auto' leaves out."""
    gated_delta_rule: Literal["auto", "torch", "fla", "flash_qla"] = "auto"
    """'torch': runs everywhere; 'fla': flash-linear-attention, 'flash_qla': flash-qla, both CUDA and bfloat16."""
    causal_conv1d: Literal["auto", "torch", "triton"] = "auto"
    """The short convolution of linear attention. 'torch': runs everywhere; 'triton': one kernel each way, on CUDA."""
    cross_entropy: Literal["auto", "torch", "compiled"] = "auto"
    """The softmax over the vocabulary. 'torch': runs everywhere; 'compiled': by torch.compile, on CUDA."""
    self_test: bool = True
    """On GPUs: before the run, compare the kernels' values and gradients with plain PyTorch's, and stop where they
    differ. Takes seconds, beside the kernels' compilation."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saving and resuming."""

    enable: bool = True
    """Save checkpoints, the last step's included."""
    interval: PositiveInt = 500
    """Steps from one save to the next."""
    keep: Count = 3
    """Newest checkpoints to keep. 0: all."""
    async_: bool = True
    """Save in the background, from a copy in host memory: each process needs room for its whole state there. The last
    save is never in the background."""
    resume: str = "auto"
    """'auto': everything from the newest undamaged checkpoint in `job.output_dir`, if there is one; 'never': there must
    be none; or everything from the checkpoint at this path, whatever `job.output_dir` holds."""
    start_from: str = ""
    """A checkpoint whose weights, and nothing else of it, a run without checkpoints of its own starts from: new
    optimizer, step 0, the data's beginning. Also what convert_from_hf.py makes."""
    export_hf: Literal["never", "last", "all"] = "never"
    """Which saves are also written as Hugging Face directories, in bfloat16, to `job.output_dir`/hf; all are kept."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss on data that is not trained on."""

    enable: bool = False
    """Measure it."""
    path: tuple[str, ...] = ()
    """As `data.path`; all else is as in [data]."""
    interval: PositiveInt = 100
    """Training steps from one validation to the next."""
    steps: Count = 0
    """At most so many batches of `training.global_batch_size` rows. 0: all of the data, once."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is logged."""

    log_interval: PositiveInt = 1
    """Steps from one log line, and one line of metrics.jsonl, to the next."""
    tensorboard: bool = False
    """Write TensorBoard events too."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training
    optimizer: Optimizer
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    moe: MoE = field(default_factory=MoE)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    kernels: Kernels = field(default_factory=Kernels)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)


# The schema of a TOML file: a table is a dict from its keys to schemas, everything else a type as `typing` writes it.
# An inline model may have the keys that ModelConfig reads and no others, so that a typo there is found too.
SECTIONS: dict[str, type] = get_type_hints(Config)
_NARROWED = {int: PositiveInt, float: Positive}
_SHAPE = {key: _NARROWED.get(hint, hint) for key, hint in get_type_hints(ModelConfig).items()}
_ROPE = {key: _SHAPE[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section")}
_HF_FORM = {"model_type": str, "full_attention_interval": PositiveInt, "hidden_act": str, "attention_bias": bool}
_ROPE_PARAMETERS = {"rope_type": str, "mrope_interleaved": bool, **_ROPE}
# A field whose TOML key is a Python keyword ends in an underscore.
SCHEMA: dict[str, Any] = {
    name: {field.rstrip("_"): hint for field, hint in get_type_hints(cls, include_extras=True).items()}
    for name, cls in SECTIONS.items()
}
SCHEMA["model"]["config"] = _SHAPE | _HF_FORM | {"attention_dropout": float, "rope_parameters": _ROPE_PARAMETERS}


def load_config(argv: list[str]) -> Config:
    """The configuration that a command line asks for. `--help` prints every key and exits with status 0.

    Raises UserError. What depends on files or on the number of processes is left to `check_config`.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    path, options = _parse_command_line(argv)
    tables = _merge(_load_toml(path) if path else {}, options)
    model = tables.get("model", {})
    if model.get("path") and model.get("config"):
        raise UserError(f"model.path = {model['path']!r} and model.config exclude each other: expected one of them")
    if not model.get("path") and not model.get("config"):
        raise UserError("model.path = '' and model.config is empty: expected a Hugging Face directory or a table")
    sections = {}
    for section, cls in SECTIONS.items():
        given = tables.get(section, {})
        values = {}
        for item in dataclasses.fields(cls):
            key = item.name.rstrip("_")
            if key in given:
                values[item.name] = given[key]
            elif not _default(item):
                raise UserError(f"{section}.{key} is missing: expected {_accepted(SCHEMA[section][key])}")
        sections[section] = cls(**values)
    return _with_absolute_paths(Config(**sections))


def resolved_toml(config: Config) -> str:
    """The whole configuration as TOML. Loading it gives an equal Config."""
    return tomli_w.dumps(dataclasses.asdict(config, dict_factory=lambda items: {k.rstrip("_"): v for k, v in items}))


def model_config(config: Config) -> ModelConfig:
    """The model's shape, from `model.path` or `model.config`. Raises UserError."""
    if config.model.path and not Path(config.model.path, "config.json").is_file():
        raise UserError(f"model.path = {config.model.path!r}: expected a directory with a config.json")
    try:
        if config.model.path:
            return ModelConfig.from_pretrained(config.model.path)
        return ModelConfig.from_table(config.model.config)
    except UserError as error:
        source = f"model.path = {config.model.path!r}" if config.model.path else "model.config"
        raise UserError(f"{source}: {str(error).removeprefix('model config: ')}") from error


def check_config(config: Config, world_size: int) -> None:
    """Raises UserError for what `world_size` processes on this machine could not run."""
    from parallelisms.degrees import work_out_degrees

    shape = model_config(config)
    work_out_degrees(config.parallelism, shape, world_size)
    _check_schedule(config.lr_scheduler, config.training.steps)
    _check_kernels(config, shape)
    from data.check import check_data  # which needs Config

    check_data(config, shape.vocab_size)
    _check_paths(config)


def _check_schedule(schedule: LRScheduler, steps: int) -> None:
    if schedule.warmup_steps > steps:
        raise UserError(
            f"lr_scheduler.warmup_steps = {schedule.warmup_steps}: expected at most training.steps = {steps}"
        )
    key = f"lr_scheduler.decay_steps = {schedule.decay_steps}"
    if schedule.decay != "wsd":
        if schedule.decay_steps:
            raise UserError(f"{key}: expected 0 with lr_scheduler.decay = {schedule.decay!r}; only 'wsd' reads it")
    elif not 1 <= schedule.decay_steps <= steps - schedule.warmup_steps:
        raise UserError(
            f"{key}: with decay = 'wsd' expected 1 to training.steps - warmup_steps = {steps - schedule.warmup_steps}"
        )


def _check_kernels(config: Config, shape: ModelConfig) -> None:
    if config.kernels == Kernels():
        return  # "auto" is always possible; importing torch takes seconds
    import torch

    from models.ops.kernels import select_kernels

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    name = config.training.dtype
    if name == "auto":
        name = "bfloat16" if device_type == "cuda" else "float32"
    try:
        head_dims = (shape.linear_key_head_dim, shape.linear_value_head_dim)
        requested, dtype = dataclasses.asdict(config.kernels), getattr(torch, name)
        select_kernels(requested, device_type, dtype, head_dims, shape.linear_conv_kernel_dim, shape.head_dim)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_paths(config: Config) -> None:
    resume, start = config.checkpoint.resume, config.checkpoint.start_from
    if resume not in ("auto", "never") and not os.path.isdir(resume):
        raise UserError(f"checkpoint.resume = {resume!r}: expected 'auto', 'never' or a directory")
    if start and not os.path.isdir(start):
        raise UserError(f"checkpoint.start_from = {start!r}: expected a directory")
    if start and resume not in ("auto", "never"):
        raise UserError(f"checkpoint.start_from and checkpoint.resume = {resume!r}: expected one of them")
    if config.model.initial_load == "hf":
        if start:
            raise UserError("model.initial_load = 'hf' and checkpoint.start_from exclude each other: expected one")
        if not list(Path(config.model.path or "/dev/null").glob("*.safetensors")):
            raise UserError(
                f"model.initial_load = 'hf': expected model.path = {config.model.path!r} to hold safetensors files"
            )
    parent = Path(config.job.output_dir)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        output_dir = config.job.output_dir
        raise UserError(f"job.output_dir = {output_dir!r}: expected a folder that can be written in {str(parent)!r}")


def _with_absolute_paths(config: Config) -> Config:
    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    def readable(path: str) -> str:
        if not path:
            return ""
        here, shipped = absolute(path), os.path.abspath(ROOT / path)
        return shipped if not matches(here) and matches(shipped) else here

    def entries(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path if is_dataset(path) and not matches(readable(path)) else readable(path) for path in paths)

    job, data, checkpoint = config.job, config.data, config.checkpoint
    model = replace(config.model, path=readable(config.model.path))
    resume = checkpoint.resume if checkpoint.resume in ("auto", "never") else readable(checkpoint.resume)
    return replace(
        config,
        job=replace(job, output_dir=absolute(job.output_dir)),
        model=model,
        data=replace(data, path=entries(data.path), tokenizer=readable(data.tokenizer) or model.path),
        validation=replace(config.validation, path=entries(config.validation.path)),
        checkpoint=replace(checkpoint, resume=resume, start_from=readable(checkpoint.start_from)),
    )


# Reading: TOML and command line -> tables of checked values


def _find_config(name: str) -> Path:
    """The TOML file that `--config NAME` means. Raises UserError."""
    folder = ROOT / "train_configs"
    for path in (Path(name), ROOT / name, folder / name, folder / f"{name}.toml"):
        if path.is_file():
            return path
    shipped = sorted(path.name for path in folder.glob("*.toml"))
    raise UserError(f"--config = {name!r} does not exist: expected a file's path, or one of {', '.join(shipped)}")


def _load_toml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's tables, merged over those of the file it extends. `below`: the files that extend this one."""
    path = path.resolve()
    if path in below:
        raise UserError(
            f"{below[-1]}: extends = {str(path)!r} is a cycle: expected a file that does not extend this one"
        )
    try:
        tables = tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected a TOML file") from None
    except ValueError as error:  # TOMLDecodeError tells line and column; UnicodeDecodeError the position
        raise UserError(f"{path} is not TOML: {error}") from None
    base = tables.pop("extends", None)
    values = _convert_table("", SCHEMA, tables, f"{path}: ")
    if base is None:
        return values
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f"{path}: extends = {base!r}: expected a TOML file's path, relative to this file")
    return _merge(_load_toml(path.parent / base, (*below, path)), values)


def _parse_command_line(argv: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The file that `--config` names, and the tables of all other options."""
    path: Path | None = None
    tables: dict[str, Any] = {}
    seen: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {word!r} on the command line: expected --section.key value")
        key, equals, value = word[2:].partition("=")
        text = value if equals else words.pop(0) if words and not words[0].startswith("--") else None
        if key in seen:
            raise UserError(f"--{key} = {text!r} is given a second time: expected one value")
        seen.add(key)
        names = key.split(".")
        schema: Any = {"config": str, **SCHEMA}
        for name in names:
            if not isinstance(schema, Mapping) or name not in schema:
                raise UserError(f"--{key} = {text!r} is unknown: {_nearest(key)}")
            schema = schema[name]
        if text is None:
            if schema is not bool:
                raise UserError(f"--{key} has no value: expected {_accepted(schema)}")
            text = "true"
        if key == "config":
            path = _find_config(text)
            continue
        try:
            table = _parse_word(schema, text)
        except ValueError:
            raise UserError(f"--{key} = {text!r}: {_expected(schema, text)}") from None
        for name in reversed(names):
            table = {name: table}
        tables = _merge(tables, _convert_table("", SCHEMA, table, "--"))
    return path, tables


def _parse_word(schema: Any, text: str) -> Any:
    """A word of the command line as the TOML value that it means. Raises UserError."""
    hint = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    if hint is str or get_origin(hint) is Literal:
        return text
    if get_origin(hint) is tuple and not text.startswith("["):
        if get_args(hint)[0] is str:
            return text.split(",")
        text = f"[{text}]"
    return tomli.loads(f"value = {text}")["value"]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` upon `base`: tables key by key, anything else replaces."""
    merged = dict(base)
    if over.get("model", {}).get("path") and "model" in base:
        merged["model"] = {key: value for key, value in base["model"].items() if key != "config"}
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _convert_table(prefix: str, schema: Mapping[str, Any], table: Any, source: str) -> dict[str, Any]:
    """A TOML table with every value as its schema wants it. Raises UserError, its line begun with `source`."""
    converted: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in schema:
            raise UserError(f"{source}{key} = {value!r} is unknown: {_nearest(key)}")
        if isinstance(schema[name], Mapping) and isinstance(value, dict):
            converted[name] = _convert_table(f"{key}.", schema[name], value, source)
            continue
        try:
            converted[name] = _convert(schema[name], value)
        except (ValueError, OverflowError):  # a float may be written as an integer, of any size
            raise UserError(f"{source}{key} = {value!r}: {_expected(schema[name], value)}") from None
    return converted


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`: an integer may be a float, a list becomes a tuple. Raises UserError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(arguments[0], value)
        accepted = arguments[1].test(value)
    elif origin is Literal:
        accepted = value in arguments
    elif origin is tuple:
        if arguments == (str, ...) and isinstance(value, str):
            value = [value]
        if accepted := isinstance(value, list):
            hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            accepted = len(hints) == len(value)
            value = tuple(map(_convert, hints, value))
    elif hint is float:
        accepted = type(value) in (int, float)  # bool is another type
        value = float(value) if accepted else value
    else:
        accepted = type(value) is hint
    if not accepted:
        raise ValueError(value)
    return value


# Messages


def _accepted(hint: Any) -> str:
    """What a schema accepts, in words."""
    arguments = get_args(hint)
    if isinstance(hint, Mapping):
        return "a table"
    if get_origin(hint) is Annotated:
        return str(arguments[1].text)
    if get_origin(hint) is Literal:
        *others, last = map(repr, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(hint) is tuple:
        return f"a list of {'any length' if arguments[-1] is ... else len(arguments)}, each {_accepted(arguments[0])}"
    return {str: "a string", bool: "true or false", int: "an integer", float: "a number"}[hint]


def _expected(hint: Any, value: Any) -> str:
    nearest = difflib.get_close_matches(str(value), get_args(hint), n=1) if get_origin(hint) is Literal else []
    return f"expected {_accepted(hint)}" + "".join(f"; did you mean {choice!r}?" for choice in nearest)


def _nearest(key: str) -> str:
    """What an unknown key may have been meant to be."""

    def leaves(schema: Mapping[str, Any], prefix: str) -> list[str]:
        found = []
        for name, inner in schema.items():
            found += leaves(inner, f"{prefix}{name}.") if isinstance(inner, Mapping) else [prefix + name]
        return found

    known = leaves(SCHEMA, "")
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, same_name or known, n=1, cutoff=0.0 if same_name else 0.6)
    if nearest:
        return f"did you mean {nearest[0]}?"
    section = key.partition(".")[0]
    return f"expected one of {', '.join(SCHEMA.get(section, SCHEMA))}"


def help_text() -> str:
    """Every key with its type, default and docstring."""
    lines = ["usage: ./run_train.sh --config FILE [--section.key value | --section.key=value ...]", ""]
    lines += ['FILE is a path or a name in train_configs/. Lists: \'["a", "b"]\' or a,b. --help shows this and ends.']
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}] {inspect.getdoc(cls)}"]
        docs = field_docs(cls)
        for item in dataclasses.fields(cls):
            default = f"default {_default(item)}" if _default(item) else "required"
            key = item.name.rstrip("_")
            lines.append(f"  --{section}.{key}: {_accepted(SCHEMA[section][key])}; {default}")
            lines += textwrap.wrap(docs[item.name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _default(item: "dataclasses.Field[Any]") -> str:
    """A field's default as TOML, empty if it has none."""
    if item.default is dataclasses.MISSING:
        return "" if item.default_factory is dataclasses.MISSING else "{}"
    return json.dumps(item.default)


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a class."""
    docs = {}
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = inspect.cleandoc(doc)
    return docs


def main(argv: list[str]) -> int:
    """`--world-size N` and then train.py's own arguments: 0, or 2 with one line on stderr."""
    try:
        if len(argv) < 2 or argv[0] != "--world-size" or not argv[1].isdecimal() or int(argv[1]) < 1:
            raise UserError("usage: python config.py --world-size N --config FILE [--section.key value ...]")
        check_config(load_config(argv[2:]), int(argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
