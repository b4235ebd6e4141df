"""What an export consists of: which tensors of a checkpoint and of its base, under which names, in which dtypes.

The base is the Hugging Face directory that the checkpoint's weights came from, or that --base names.

part            taken from                                            written
---------------------------------------------------------------------------------------------------------------
text            the checkpoint; all of it, or nothing is exported     in --dtype, experts as --experts says
vision tower    the checkpoint                                        in --dtype
                else the base; neither: refused. Left out of          bit for bit
                causal_lm
MTP             the checkpoint                                        in --dtype, experts as --experts says
                else the base; neither: config.json declares no       bit for bit, experts as --experts says
                layers of it

adapters        the checkpoint                                        as peft has them, in --dtype
                with --merge: added to the base's weights             in the base's dtype or --dtype; what they are not
                                                                      on, the base bit for bit

class           what --architecture says; else image_text_to_text where a config.json has a vision_config and the
                checkpoint has a tower, or the base that it came from has, or there is a --base; else causal_lm
"""

import copy
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from checkpoint import hf_assets
from checkpoint.adapters import Adapter, Computed, check_base, hash_base, merge, peft_config, peft_exports, read_adapter
from checkpoint.directories import check_files, find_checkpoint, new_directory
from checkpoint.hf_reader import assemble, hash_parts, naming_tensors, native_tensors
from checkpoint.tensors.dcp import read_dcp
from checkpoint.tensors.fsdp_shards import is_shard_directory, read_fsdp_shards
from checkpoint.tensors.safetensors import Export, read_file, read_safetensors, write_file
from checkpoint.tensors.stored import StoredTensor
from errors import UserError, WrongTensors, reading
from models.qwen35_moe.config import ModelConfig, read_config
from models.qwen35_moe.hf_config import class_config
from models.qwen35_moe.hf_weights import (
    MTP,
    NOT_TEXT,
    PREFIXES,
    TOWER,
    VISION,
    count_mtp_layers,
    find_architecture,
    find_mtp_pieces,
    hf_name,
    is_published_in_float32,
    mtp_shapes,
    pieces_of_experts,
)
from models.qwen35_moe.parameters import Shape, adapter_shapes, parameters

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "keep": None}
"""The values of the converters' --dtype; None: of each tensor, what is stored."""
_MAX_DEPTH = 1000  # blocks of a vision tower


class Options(NamedTuple):
    """How to export."""

    architecture: str | None = None
    """One of PREFIXES; None: the class that the model came from, causal_lm if it was trained from random weights."""
    dtype: torch.dtype | None = torch.bfloat16
    """Of all trained tensors but the few that published checkpoints have in float32; None keeps what is stored."""
    experts: str = "keep"
    """'stacked', 'per_expert', or 'keep': as the model that it came from has them, those of MTP by themselves, and
    stacked if it came from none."""
    max_shard_bytes: int = 5 * 10**9
    base: Path | None = None
    """Hugging Face directory that gives what was not trained; None: the one that the run was loaded from."""
    verify: bool = False
    """Read what was written again, before it gets its name."""
    merge: bool = False
    """Of adapters: write the whole weights with them instead of peft's files."""


class Plan(NamedTuple):
    """Everything that will be written, checked against what the class needs."""

    source: Path
    config: dict[str, Any]
    tensors: list[Export]
    assets: list[Path]


def export_to_hf(checkpoint: Path, out: Path, options: Options | None = None, progress: bool = False) -> Plan:
    """Writes `checkpoint` (a step-* directory, a run's output_dir, per-rank FSDP2 files) as a Hugging Face directory.

    `out` is new or empty; it appears when it is complete. Raises UserError, naming what does not fit, before anything
    is written.
    """
    options = options or Options()
    if (adapter := adapter_of(checkpoint)) and not options.merge:
        return _export_adapter(checkpoint, adapter, out, options)
    if options.merge and adapter is None:
        raise UserError(f"--merge: {checkpoint} holds whole weights, not adapters: expected none of it")
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
        new_directory(out, plan.source) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc=out.name, disable=None if progress else True) as bar,
    ):
        hf_assets.write_files(folder, hf_assets.read_assets(*plan.assets, vision="vision_config" in plan.config))
        hf_assets.write_generation_config(folder, plan.config)
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        hf_assets.check_tokenizer(folder, plan.assets)
        for name, keys in files.filename_to_tensors.items():
            for num_bytes in write_file(folder / name, [tensors[key] for key in keys]):
                bar.update(num_bytes)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if options.verify:
            verify(folder, plan, progress)
    return plan


def adapter_of(checkpoint: Path) -> Adapter | None:
    """What the checkpoint, or the newest of a run, says of its adapters; None if it has none."""
    return None if is_shard_directory(checkpoint) else read_adapter(find_checkpoint(checkpoint))


def _export_adapter(checkpoint: Path, adapter: Adapter, out: Path, options: Options) -> Plan:
    """Writes adapters as peft does, for the class that their base's tensors are named for."""
    source, stored, assets, recorded_base = _open_checkpoint(checkpoint)
    base = options.base or recorded_base
    model = read_config(assets[0] / "config.json")
    _check_adapters(checkpoint, stored, adapter, ModelConfig.from_dict(model))
    architecture = options.architecture or ("image_text_to_text" if "vision_config" in model else "causal_lm")
    if not options.architecture and base and any(base.glob("*.safetensors")):
        architecture = find_architecture(read_safetensors(base))
    config = peft_config(adapter._replace(base=str(options.base.resolve())) if options.base else adapter, stored)
    plan = Plan(source, config, peft_exports(stored, architecture, options.dtype), assets)
    with new_directory(out, source) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for _ in write_file(folder / "adapter_model.safetensors", plan.tensors):
            pass
        if options.verify:
            _compare(read_file(folder / "adapter_model.safetensors"), plan)
    return plan


def _check_adapters(checkpoint: Path, stored: dict[str, StoredTensor], adapter: Adapter, shape: ModelConfig) -> None:
    expected = adapter_shapes(shape, adapter.rank, adapter.targets)
    _check(str(checkpoint), {name: tensor.shape for name, tensor in stored.items()}, dict(expected))


def make_plan(checkpoint: Path, options: Options) -> Plan:
    """Decides what is written. Raises UserError naming what is missing, unknown, or of a wrong shape."""
    source, stored, assets, recorded_base = _open_checkpoint(checkpoint)
    base = options.base or recorded_base
    if base and (base / "config.json").is_file():
        assets = [*assets, base]
    configs = [read_config(path) for folder in assets if os.path.lexists(path := folder / "config.json")]
    if not configs:
        raise UserError(f"{checkpoint} has no config.json: expected --base with the model that it came from")
    # The checkpoint's own config tells what was trained; the base's may have what the checkpoint's left out: vision.
    config = next((each for each in configs if "vision_config" in each), configs[-1 if options.base else 0])
    shape = ModelConfig.from_dict(configs[0])
    if ModelConfig.from_dict(config) != shape:
        raise UserError(f"--base {base}: its text model has another shape than the checkpoint's")
    if (ends := configs[0].get("text_config", configs[0]).get("eos_token_id")) is not None:  # of trained turns too
        text = config.get("text_config", config) | {"eos_token_id": ends}
        config = config | {"text_config": text} if "text_config" in config else text
    adapter = adapter_of(checkpoint)
    has_tower = any(key.startswith(VISION) for key in stored)
    came_with_vision = "vision_config" in config and (base is not None or has_tower)
    architecture = options.architecture or ("image_text_to_text" if came_with_vision else "causal_lm")

    of_base: dict[str, StoredTensor] = {}
    if base and base.is_dir() and (came_with_vision or options.base or any(base.glob("*.safetensors"))):
        of_base = read_safetensors(base)
    elif base and architecture == "image_text_to_text" and not has_tower:
        raise UserError(
            f"the model came from {base}, which is not there: expected --base with it, or --architecture causal_lm"
        )
    if adapter:
        if not base or not base.is_dir():
            raise UserError(f"the adapters belong to {adapter.base}, which is not there: expected --base with it")
        of_base = of_base or read_safetensors(base)
        check_base(adapter, base, hash_base(base))
        _check_adapters(checkpoint, stored, adapter, shape)
        stored = merge(native_tensors(shape, of_base), stored, adapter.scale)
    if not options.architecture and not options.base and of_base and not (has_tower or _part(VISION, of_base)):
        architecture = "causal_lm"  # the run came from a text model beside the config.json of a whole one
    others = {part: _part(part, stored) or _part(part, of_base) for part in NOT_TEXT}
    if of_base and not options.base:
        _check_parts(source, base, {p: t for p, t in others.items() if not _part(p, stored)}, architecture)
    exports = _text_exports(checkpoint, stored, shape, architecture, options.dtype)
    came_per_expert = any(".experts.0." in key and not key.startswith(MTP) for key in of_base)
    if options.experts == "per_expert" or (options.experts == "keep" and came_per_expert):
        exports = _one_by_one(exports)
    mtp_experts, is_trained = options.experts, any(key.startswith(MTP) for key in stored)
    if is_trained and mtp_experts == "keep" and any(".experts.0." in key for key in _part(MTP, of_base)):
        mtp_experts = "per_expert"
    mtp = _mtp_exports(shape, others[MTP], mtp_experts)
    if is_trained and options.dtype is not None:
        mtp = [tensor._replace(dtype=options.dtype) for tensor in mtp]
    dtype = str(options.dtype or exports[0].stored.dtype).removeprefix("torch.")
    special_tokens = hf_assets.special_token_ids(hf_assets.find_tokenizer(assets))
    written = class_config(config, architecture, count_mtp_layers(others[MTP]), dtype, special_tokens)
    vision = []
    if architecture == "image_text_to_text":
        dtype_of_tower = options.dtype if has_tower else None
        vision = [Export(key, tensor, dtype_of_tower or tensor.dtype) for key, tensor in others[VISION].items()]
        _check("the vision tower", {e.key: e.shape for e in vision}, _vision_shapes(written))
    return Plan(source, written, [*vision, *exports, *mtp], assets)


def _check_parts(
    checkpoint: Path, base: Path | None, parts: dict[str, dict[str, StoredTensor]], architecture: str
) -> None:
    """Raises UserError if a part that comes from the recorded base is not what it was when the weights came from it."""
    for prefix, before in hf_assets.read_base_parts(checkpoint).items():
        needed = prefix in parts and (prefix == MTP or architecture == "image_text_to_text")
        if needed and hash_parts(parts[prefix], [prefix])[prefix] != before:
            raise UserError(
                f"{base}: {prefix}* is not what it was when the model came from there: expected --base with the model "
                "as it was, or with the one to take this from"
            )


def _part(prefix: str, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _open_checkpoint(path: Path) -> tuple[Path, dict[str, StoredTensor], list[Path], Path | None]:
    """Where it is; its tensors, text ones by native name and others by Hugging Face's; where config.json may be; its
    base."""
    if is_shard_directory(path):
        tensors = read_fsdp_shards(path)
        prefix = next((p for p in (*PREFIXES.values(), "") if p + "embed_tokens.weight" in tensors), "")
        stored = {k if k.startswith(NOT_TEXT) else k.removeprefix(prefix): t for k, t in tensors.items()}
        stored = _with_tower_by_hf_name(stored)
        return path, stored, [folder for folder in (path, path / "huggingface", path / "hf") if folder.is_dir()], None
    path = find_checkpoint(path)
    check_files(path)
    stored = {n.removeprefix("model."): t for n, t in read_dcp(path).items() if n.startswith("model.")}
    return path, _with_tower_by_hf_name(stored), [path / "hf"], hf_assets.read_base(path)


def _with_tower_by_hf_name(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A run that trains the tower has it by its native name."""
    return {hf_name(name) if name.startswith(TOWER) else name: tensor for name, tensor in tensors.items()}


def _text_exports(
    checkpoint: Path, stored: dict[str, StoredTensor], shape: ModelConfig, architecture: str, dtype: torch.dtype | None
) -> list[Export]:
    is_merged = any(isinstance(tensor, Computed) for tensor in stored.values())
    expected = {name: parameter.shape for name, parameter in parameters(shape).items()}
    text = {name: tensor for name, tensor in stored.items() if not name.startswith(NOT_TEXT)}
    if shape.tie_word_embeddings:
        text.pop("lm_head.weight", None)
    _check(str(checkpoint), {name: tensor.shape for name, tensor in text.items()}, expected)
    exports = []
    for name in expected:
        tensor = text[name]
        wanted = torch.float32 if is_published_in_float32(name) else dtype
        if wanted is None or dtype is None or (is_merged and not isinstance(tensor, Computed)):
            wanted = tensor.dtype
        exports.append(Export(hf_name(name, architecture), tensor, wanted))
    return exports


def _mtp_exports(shape: ModelConfig, tensors: dict[str, StoredTensor], experts: str) -> list[Export]:
    """Multi-token prediction as it is stored; its experts stacked or one by one as asked."""
    with naming_tensors():
        pieces = find_mtp_pieces(shape, {key: tensor.shape for key, tensor in tensors.items()})
    if experts != "keep":
        shapes = mtp_shapes(shape, count_mtp_layers(tensors))
        tensors = {key: assemble(key, shapes[key], parts, tensors) for key, parts in pieces.items()}
    exports = [Export(key, tensor, tensor.dtype) for key, tensor in tensors.items()]
    return _one_by_one(exports) if experts == "per_expert" else exports


def _one_by_one(exports: list[Export]) -> list[Export]:
    """The same with the experts of a stacked tensor each by itself."""
    result = []
    for export in exports:
        pieces = pieces_of_experts(export.key, export.stored.shape) if ".experts." in export.key else []
        result += [export._replace(key=piece.key, box=piece.box) for piece in pieces] or [export]
    return result


def _vision_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """What transformers' image-text class has under `model.visual.`."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration  # slow to import

    with reading("vision_config"), torch.device("meta"):
        if not 0 < config["vision_config"].get("depth", 1) <= _MAX_DEPTH:
            raise ValueError(f"depth = {config['vision_config']['depth']!r}: expected 1 to {_MAX_DEPTH}")
        model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**copy.deepcopy(config)))
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith(VISION)}


def _check(where: str, available: dict[str, Shape], expected: dict[str, Shape]) -> None:
    for name in sorted(available.keys() ^ expected.keys()):
        raise WrongTensors(f"{where}: {name!r} is {'missing' if name in expected else 'unknown to this model'}")
    for name, shape in expected.items():
        if available[name] != shape:
            raise WrongTensors(f"{where}: {name!r} has shape {list(available[name])}, not {list(shape)}")


def verify(out: Path, plan: Plan, progress: bool = False) -> None:
    """Reads `out` again: every tensor bit for bit against the source, then with transformers. Raises UserError."""
    _compare(read_safetensors(out), plan, progress)
    _load_with_transformers(out, plan)


def _compare(arrays: dict[str, StoredTensor], plan: Plan, progress: bool = False) -> None:
    """Raises UserError unless what was written is what was to be."""
    _check("verify", {k: a.shape for k, a in arrays.items()}, {e.key: e.shape for e in plan.tensors})
    for export in tqdm(plan.tensors, desc="verify", unit="tensor", disable=None if progress else True):
        written = arrays[export.key].open(arrays[export.key].chunks[0])
        if written.dtype != export.dtype:
            raise UserError(f"verify: {export.key!r} is {written.dtype}, not {export.dtype}")
        for block in export.blocks():
            same = written._replace(shape=(block.numel(),), strides=(1,)).read()
            if not torch.equal(same.view(torch.uint8), block.view(torch.uint8)):
                raise UserError(f"verify: {export.key!r} in {written.file} differs from the checkpoint's")
            written = written._replace(start=written.start + block.numel() * block.dtype.itemsize)


def _load_with_transformers(out: Path, plan: Plan) -> None:
    """Loads `out`; no key may be missing, unexpected or mismatched. Takes no memory where accelerate is installed."""
    import transformers  # slow to import

    cls = getattr(transformers, plan.config["architectures"][0])
    place = "meta" if find_spec("accelerate") else None
    with reading(out):
        _, loading = cls.from_pretrained(
            out, dtype="auto", device_map=place, output_loading_info=True, trust_remote_code=False
        )
    for problem, keys in loading.items():
        if keys:
            raise UserError(f"verify: {cls.__name__} finds {problem.replace('_', ' ')}: {sorted(map(str, keys))[0]}")
