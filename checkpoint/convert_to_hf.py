"""Turns a checkpoint into a Hugging Face directory, in one process, a block of a tensor at a time.

python checkpoint/convert_to_hf.py CHECKPOINT OUT [--architecture causal_lm|image_text_to_text]
    [--dtype bfloat16|float32|keep] [--experts keep|stacked|per_expert] [--max-shard-size 5GB]
    [--base HF_DIR] [--verify]
"""

import argparse
import copy
import json
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file from anywhere

from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from checkpoint.command_line import DTYPES, OneLineParser
from checkpoint.dcp_reader import read_index
from checkpoint.directories import MANIFEST, find_checkpoint, find_damage, is_taken, new_directory
from checkpoint.fsdp_shards import is_shard_directory, read_shards
from checkpoint.hf_assets import class_config, copy_assets, read_base
from checkpoint.hf_reader import assemble
from checkpoint.safetensors_files import Export, read_headers, write_file
from checkpoint.stored import Shape, StoredArray, StoredTensor, whole
from errors import UserError
from models.qwen35_moe.config import ModelConfig, read_config
from models.qwen35_moe.hf_weights import (
    MTP,
    NOT_TEXT,
    PREFIXES,
    VISION,
    count_mtp_layers,
    find_mtp_pieces,
    hf_name,
    is_published_in_float32,
    mtp_shapes,
    parameter_shapes,
    pieces_of_experts,
)


class Options(NamedTuple):
    """How to export."""

    architecture: str | None = None
    """One of PREFIXES; None: the class that the model came from, causal_lm if it was trained from random weights."""
    dtype: torch.dtype | None = torch.bfloat16
    """Of all trained tensors but the few that published checkpoints have in float32; None keeps what is stored."""
    experts: str = "keep"
    """'stacked', 'per_expert', or 'keep': as the model that it came from has them, stacked if it came from none."""
    max_shard_bytes: int = 5 * 10**9
    base: Path | None = None
    """Hugging Face directory that gives what was not trained; None: the one that the run was loaded from."""


class Plan(NamedTuple):
    """Everything that will be written, checked against what the class needs."""

    config: dict[str, Any]
    tensors: list[Export]
    assets: list[Path]


def convert_to_hf(checkpoint: Path, out: Path, options: Options | None = None, progress: bool = False) -> Plan:
    """Writes `checkpoint` (a step-* directory, a run's output_dir, per-rank FSDP2 files) as a Hugging Face directory.

    `out` is new or empty; it appears when it is complete. Raises UserError, naming what does not fit, before anything
    is written.
    """
    options = options or Options()
    plan = make_plan(checkpoint, options)
    tensors = {tensor.key: tensor for tensor in plan.tensors}
    files = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=options.max_shard_bytes,
    )
    total = files.metadata["total_size"]
    with (
        new_directory(out) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc=out.name, disable=None if progress else True) as bar,
    ):
        copy_assets(folder, *plan.assets, vision="vision_config" in plan.config)
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        for name, keys in files.filename_to_tensors.items():
            for num_bytes in write_file(folder / name, [tensors[key] for key in keys]):
                bar.update(num_bytes)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return plan


def make_plan(checkpoint: Path, options: Options) -> Plan:
    """Decides what is written. Raises UserError naming what is missing, unknown, or of a wrong shape."""
    stored, assets, recorded_base = _open_checkpoint(checkpoint)
    base = options.base or recorded_base
    if base and (base / "config.json").is_file():
        assets = [*assets, base]
    configs = [read_config(path) for a in assets if (path := a / "config.json").is_file()]
    if not configs:
        raise UserError(f"{checkpoint} has no config.json: expected --base with the model that it came from")
    # The checkpoint's own config tells what was trained; the base's may have what the checkpoint's left out: vision.
    config = configs[0] if "vision_config" in configs[0] else configs[-1]
    shape = ModelConfig.from_dict(configs[0])
    if ModelConfig.from_dict(config) != shape:
        raise UserError(f"--base {base}: its text model has another shape than the checkpoint's")
    has_vision = any(key.startswith(VISION) for key in stored)
    from_image_text = "vision_config" in config and (base is not None or has_vision)
    architecture = options.architecture or ("image_text_to_text" if from_image_text else "causal_lm")

    arrays: dict[str, StoredArray] = {}
    if base and base.is_dir() and (from_image_text or options.base or any(base.glob("*.safetensors"))):
        arrays = read_headers(base)
    elif base and architecture == "image_text_to_text" and not has_vision:
        raise UserError(
            f"the model came from {base}, which is not there: expected --base with it, or --architecture causal_lm"
        )
    # What was trained comes from the checkpoint, the rest from the base.
    others = {key: tensor for key, tensor in stored.items() if key.startswith(NOT_TEXT)}
    for kind in NOT_TEXT:
        if not any(key.startswith(kind) for key in others):
            others |= {key: whole(key, array) for key, array in arrays.items() if key.startswith(kind)}
    per_expert = options.experts == "per_expert" or (
        options.experts == "keep" and any(".experts.0." in key and not key.startswith(MTP) for key in arrays)
    )
    exports = _text_exports(checkpoint, stored, shape, architecture, options.dtype, per_expert)
    mtp = _mtp_exports(shape, {k: t for k, t in others.items() if k.startswith(MTP)}, options.experts)
    dtype = str(options.dtype or exports[0].stored.dtype).removeprefix("torch.")
    written = class_config(config, architecture, count_mtp_layers(others), dtype, assets[0])
    vision = []
    if architecture == "image_text_to_text":
        vision = [Export(key, tensor, tensor.dtype) for key, tensor in others.items() if key.startswith(VISION)]
        _check("the vision tower", {e.key: e.shape for e in vision}, _vision_shapes(written))
    return Plan(written, [*vision, *exports, *mtp], assets)


def _open_checkpoint(path: Path) -> tuple[dict[str, StoredTensor], list[Path], Path | None]:
    """Its tensors (text ones by native name, others by Hugging Face's), where its config.json may be, its base."""
    if is_shard_directory(path):
        tensors = read_shards(path)
        prefix = next((p for p in (*PREFIXES.values(), "") if p + "embed_tokens.weight" in tensors), "")
        stored = {k if k.startswith(NOT_TEXT) else k.removeprefix(prefix): t for k, t in tensors.items()}
        return stored, [folder for folder in (path, path / "huggingface", path / "hf") if folder.is_dir()], None
    path = find_checkpoint(path)
    stored = {n.removeprefix("model."): t for n, t in read_index(path).items() if n.startswith("model.")}
    return stored, [path / "hf"], read_base(path)


def _text_exports(
    checkpoint: Path,
    stored: dict[str, StoredTensor],
    shape: ModelConfig,
    architecture: str,
    dtype: torch.dtype | None,
    per_expert: bool,
) -> list[Export]:
    expected = parameter_shapes(shape)
    text = {name: tensor for name, tensor in stored.items() if not name.startswith(NOT_TEXT)}
    if shape.tie_word_embeddings:
        text.pop("lm_head.weight", None)
    _check(str(checkpoint), {name: tensor.shape for name, tensor in text.items()}, expected)
    exports = []
    for name in expected:
        tensor = text[name]
        wanted = tensor.dtype if dtype is None else torch.float32 if is_published_in_float32(name) else dtype
        exports += _experts(Export(hf_name(name, architecture), tensor, wanted), per_expert)
    return exports


def _mtp_exports(shape: ModelConfig, tensors: dict[str, StoredTensor], experts: str) -> list[Export]:
    """Multi-token prediction as it is, bit for bit; its experts stacked or one by one as asked."""
    pieces = find_mtp_pieces(shape, {key: tensor.shape for key, tensor in tensors.items()})
    if experts == "keep":
        return [Export(key, tensor, tensor.dtype) for key, tensor in tensors.items()]
    arrays = {key: tensor.chunks[0].array for key, tensor in tensors.items() if len(tensor.chunks) == 1}
    shapes = mtp_shapes(shape, count_mtp_layers(tensors))
    exports = []
    for key, parts in pieces.items():
        if key not in tensors and not all(part.key in arrays for part in parts):
            raise UserError(f"{parts[0].key!r} is in several pieces: expected --experts keep")
        tensor = tensors[key] if key in tensors else assemble(key, shapes[key], parts, arrays)
        exports += _experts(Export(key, tensor, tensor.dtype), experts == "per_expert")
    return exports


def _experts(export: Export, per_expert: bool) -> list[Export]:
    """The stacked tensor itself, or its experts one by one."""
    if not per_expert or ".experts." not in export.key:
        return [export]
    pieces = pieces_of_experts(export.key, export.stored.shape)
    return [export._replace(key=piece.key, box=piece.region) for piece in pieces]


def _vision_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """What transformers' image-text class has under `model.visual.`."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration  # slow to import

    with torch.device("meta"):
        model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**copy.deepcopy(config)))  # it changes it
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith(VISION)}


def _check(where: str, available: dict[str, Shape], expected: dict[str, Shape]) -> None:
    for name in sorted(available.keys() ^ expected.keys()):
        raise UserError(f"{where}: {name!r} is {'missing' if name in expected else 'unknown to this model'}")
    for name, shape in expected.items():
        if available[name] != shape:
            raise UserError(f"{where}: {name!r} has shape {list(available[name])}, not {list(shape)}")


def verify(checkpoint: Path, out: Path, plan: Plan, progress: bool = False) -> None:
    """Reads `out` again: every tensor bit for bit against the source, then with transformers. Raises UserError."""
    if not is_shard_directory(checkpoint):
        step = find_checkpoint(checkpoint)
        if (step / MANIFEST).exists() and (damage := find_damage(step)):
            raise UserError(f"verify: {damage}")
    arrays = read_headers(out)
    _check(f"verify: {out}", {k: a.shape for k, a in arrays.items()}, {e.key: e.shape for e in plan.tensors})
    bar: Iterable[Export] = tqdm(plan.tensors, desc="verify", unit="tensor", disable=None if progress else True)
    for export in bar:
        written = arrays[export.key]
        if written.dtype != export.dtype:
            raise UserError(f"verify: {export.key!r} is {written.dtype}, not {export.dtype}")
        for block in export.blocks():
            same = written._replace(shape=(block.numel(),), strides=(1,)).read()
            if not torch.equal(same.view(torch.uint8), block.view(torch.uint8)):
                raise UserError(f"verify: {export.key!r} in {written.file} differs from the checkpoint's")
            written = written._replace(start=written.start + block.numel() * block.dtype.itemsize)
    _load_with_transformers(out, plan)


def _load_with_transformers(out: Path, plan: Plan) -> None:
    """Loads `out`; no key may be missing, unexpected or mismatched. Takes no memory where accelerate is installed."""
    import transformers  # slow to import

    cls = getattr(transformers, plan.config["architectures"][0])
    place = "meta" if find_spec("accelerate") else None
    _, loading = cls.from_pretrained(out, dtype="auto", device_map=place, output_loading_info=True)
    for problem, keys in loading.items():
        if keys:
            raise UserError(f"verify: {cls.__name__} finds {problem.replace('_', ' ')}: {sorted(map(str, keys))[0]}")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number (powers of ten, as Hugging Face counts)."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 200MB")
    return int(match[1]) * {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(arguments: list[str]) -> int:
    """0; 2 for a mistake on the command line; 1 for a checkpoint that cannot be converted."""
    parser = OneLineParser(description=__doc__.splitlines()[0] if __doc__ else None)
    checkpoint_help = "a step-* directory, a run's output_dir (its newest step), or per-rank FSDP2 files"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=checkpoint_help)
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument("--architecture", choices=PREFIXES, help="class to export (default: the model's own)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the trained tensors, a few of them float32 as published (default: %(default)s); keep: as trained",
    )
    parser.add_argument(
        "--experts",
        choices=("keep", "stacked", "per_expert"),
        default="keep",
        help="one tensor a layer or one an expert (default: as in the model that it came from)",
    )
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of a file (default: %(default)s)"
    )
    base_help = "whose vision and MTP tensors are taken along (default: the model that the run was loaded from)"
    parser.add_argument("--base", type=Path, metavar="HF_DIR", help=base_help)
    parser.add_argument("--verify", action="store_true", help="read OUT again and compare every tensor bit for bit")
    given = parser.parse_args(arguments)
    if is_taken(given.out):
        parser.error(f"{given.out} exists: expected a new or an empty directory")
    if not given.checkpoint.is_dir():
        parser.error(f"{given.checkpoint} is no directory: expected a step-* directory, or a run's output_dir")
    if given.base and not (given.base / "config.json").is_file():
        parser.error(f"--base {given.base} has no config.json: expected a Hugging Face directory")
    options = Options(given.architecture, DTYPES[given.dtype], given.experts, given.max_shard_size, given.base)
    try:
        plan = convert_to_hf(given.checkpoint, given.out, options, progress=True)
        if given.verify:
            verify(given.checkpoint, given.out, plan, progress=True)
    except (ValueError, OSError) as error:
        print(f"convert_to_hf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_to_hf: interrupted, nothing is left", file=sys.stderr)
        return 130
    counts = {kind: sum(tensor.key.startswith(kind) for tensor in plan.tensors) for kind in NOT_TEXT}
    text = len(plan.tensors) - sum(counts.values())
    print(
        f"{plan.config['architectures'][0]}: {text} text, {counts[VISION]} vision and {counts[MTP]} MTP tensors"
        + (", verified" if given.verify else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
