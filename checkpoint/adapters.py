"""Adapters without their base: what a checkpoint says of both, peft's format, and the weights with adapters merged.

hf/adapter.json    rank, alpha, targets; of the base, its directory, and the SHA-256 of each of its files of weights
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.files import read_json
from checkpoint.tensors.safetensors import Export, read_safetensors
from checkpoint.tensors.stored import StoredArray, StoredTensor
from config.options import Lora
from errors import UserError, reading
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.parameters import Box, full_box
from models.qwen35_moe.parts import ADAPTABLE

RECORD = "adapter.json"
_SERVED = Lora().targets
"""Parts whose adapters vLLM and SGLang load."""
_PEFT_VERSION = "0.19.1"  # the first that reads the experts' factors this way round


class Adapter(NamedTuple):
    """What a checkpoint says of its adapters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str
    """The directory of the weights that they belong to."""
    files: Mapping[str, str]
    """Of these weights: each file's SHA-256 by its name."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def write_adapter(folder: Path, lora: Lora, base: Path, files: Mapping[str, str]) -> None:
    """Writes a checkpoint's hf/adapter.json."""
    adapter = Adapter(lora.rank, lora.alpha, lora.targets, str(base.resolve()), files)
    (folder / RECORD).write_text(json.dumps(adapter._asdict(), indent=1) + "\n", encoding="utf-8")


def read_adapter(checkpoint: Path) -> Adapter | None:
    """What a checkpoint says of its adapters; None if it holds whole weights."""
    path = checkpoint / "hf" / RECORD
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    with reading(path):
        rank, alpha, targets, base, files = (values[key] for key in Adapter._fields)
        if type(rank) is not int or not 0 < rank < 2**18:
            raise ValueError(f"rank = {rank!r:.60}: expected a positive integer")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha = {alpha!r:.60}: expected a positive number")
        if not isinstance(targets, list) or not targets or not set(targets) <= set(ADAPTABLE):
            raise ValueError(f"targets = {targets!r:.60}: expected some of {', '.join(ADAPTABLE)}")
        hashes = dict(files)
        if not isinstance(base, str) or len(base) > 4096 or not all(isinstance(each, str) for each in hashes.values()):
            raise ValueError("expected the base's directory and its files' hashes")
        return Adapter(rank, float(alpha), tuple(targets), base, hashes)


def hash_base(folder: Path, share: int = 0, num_shares: int = 1) -> dict[str, str]:
    """SHA-256 of each file of weights in a Hugging Face directory; with several shares, of this share's files."""
    sources = (chunk.source for tensor in read_safetensors(folder).values() for chunk in tensor.chunks)
    paths = sorted({source.file for source in sources if isinstance(source, StoredArray)})
    with ThreadPoolExecutor(8) as threads:
        return dict(threads.map(_hash, paths[share::num_shares]))


def _hash(path: Path) -> tuple[str, str]:
    with reading(path), path.open("rb") as file:
        return path.name, hashlib.file_digest(file, "sha256").hexdigest()


def check_base(adapter: Adapter, folder: Path, files: Mapping[str, str]) -> None:
    """Raises UserError if these are not the weights that the adapters belong to."""
    for name in sorted(files.keys() | adapter.files.keys()):
        if files.get(name) != adapter.files.get(name):
            how = "is missing" if name not in files else "is new" if name not in adapter.files else "has changed"
            raise UserError(
                f"{folder} is not the model that the adapters were trained on: {name} {how}: expected the files that "
                f"were in {adapter.base}"
            )


def check_adapters(checkpoint: Path, lora: Lora, base: Path | None, files: Mapping[str, str]) -> None:
    """Raises UserError unless a checkpoint has adapters like a run's, on the same base, or none as the run."""
    adapter = read_adapter(checkpoint)
    if adapter is None:
        if lora.rank:
            raise UserError(
                f"lora.rank = {lora.rank}: checkpoint {checkpoint} holds whole weights: expected 0, or their export as "
                "model.path and another job.output_dir"
            )
        return
    for key in ("rank", "alpha", "targets"):
        before, now = getattr(adapter, key), getattr(lora, key)
        if before != now and (key != "targets" or set(before) != set(now)):
            raise UserError(
                f"lora.{key} = {now}: checkpoint {checkpoint} holds adapters with {before}: expected the same"
            )
    if base is None:
        raise UserError(
            f"checkpoint {checkpoint} holds adapters alone: expected model.initial_load = 'hf' with their base"
        )
    check_base(adapter, base, files)


def serving_note(targets: Collection[str]) -> str:
    """What serving programs make of adapters on these parts, in a line."""
    others = [part for part in targets if part not in _SERVED]
    if not others:
        return "vLLM and SGLang load these adapters, and so does peft"
    return (
        f"peft loads these adapters; vLLM and SGLang load none on {' and '.join(others)}, or pass over them without a "
        "word: serve the weights that convert_to_hf.py --merge writes"
    )


def peft_config(adapter: Adapter, names: Collection[str]) -> dict[str, Any]:
    """adapter_config.json, for adapters with these names."""
    of_layers = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    of_experts = {name.split("_lora_")[0].rpartition(".")[2] for name in names if "_lora_" in name}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": _PEFT_VERSION,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(of_layers),
        "target_parameters": sorted(f"mlp.experts.{name}" for name in of_experts) or None,
    }


@dataclass(frozen=True)
class Computed(StoredTensor):
    """A tensor that is computed, a box at a time, from stored ones."""

    compute: Callable[[Box], torch.Tensor]

    def __post_init__(self) -> None:
        """It has no chunks of its own."""

    def read(self, box: Box = ()) -> torch.Tensor:
        """The part in `box`, maybe in a wider dtype than its own: what is written is rounded once."""
        return self.compute(full_box(box, self.shape))


def peft_exports(adapters: Mapping[str, StoredTensor], architecture: str, dtype: torch.dtype | None) -> list[Export]:
    """The tensors of adapter_model.safetensors, for the class `architecture`.

    peft wraps down_proj around gate_up_proj, whose key says `base_layer`. Of experts it has A as [E * r, in], with each
    expert's rows together, and B as [out, r * E], with each rank's experts together.
    """
    exports = []
    for name, tensor in adapters.items():
        key = name
        if "_lora_" in name:
            layer, _, factor = name.rpartition("_lora_")
            folder, _, projection = layer.rpartition(".")
            key = f"{folder}.{'base_layer.' if projection == 'gate_up_proj' else ''}lora_{factor}.weight"
            tensor = _flat_rows(tensor) if factor == "A" else _flat_columns(tensor)
        exports.append(Export("base_model.model." + hf_name(key, architecture), tensor, dtype or tensor.dtype))
    return exports


def _flat_rows(tensor: StoredTensor) -> Computed:
    num_experts, rank, width = tensor.shape

    def compute(box: Box) -> torch.Tensor:
        (start, stop), columns = box
        first = start // rank
        values = tensor.read(((first, max(first, -(-stop // rank))), (0, rank), columns))
        return values.flatten(0, 1)[start - first * rank : stop - first * rank]

    return Computed(tensor.name, (num_experts * rank, width), tensor.dtype, [], compute)


def _flat_columns(tensor: StoredTensor) -> Computed:
    num_experts, width, rank = tensor.shape

    def compute(box: Box) -> torch.Tensor:
        rows, columns = box
        values = tensor.read(((0, num_experts), rows))
        return values.permute(1, 2, 0).flatten(1)[:, slice(*columns)].contiguous()

    return Computed(tensor.name, (width, rank * num_experts), tensor.dtype, [], compute)


def merge(
    weights: Mapping[str, StoredTensor], adapters: Mapping[str, StoredTensor], scale: float
) -> dict[str, StoredTensor]:
    """The weights with scale * B A added where there are adapters; all others as they are."""
    merged = dict(weights)
    for name, a in adapters.items():
        if "lora_A" in name:
            layer = name.replace(".lora_A", "").replace("_lora_A", "")
            b = adapters[name.replace("lora_A", "lora_B")]
            merged[layer] = _sum(weights[layer], a, b, scale)
    return merged


def _sum(weight: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float) -> Computed:
    """weight [..., out, in] + scale * b [..., out, r] a [..., r, in]."""

    def compute(box: Box) -> torch.Tensor:
        *experts, rows, columns = box
        of_b, of_a = b.read((*experts, rows, (0, b.shape[-1]))), a.read((*experts, (0, a.shape[-2]), columns))
        wide = torch.promote_types(torch.promote_types(weight.dtype, of_a.dtype), torch.float32)
        return weight.read(box).to(wide).add_(of_b.to(wide) @ of_a.to(wide), alpha=scale)

    return Computed(weight.name, weight.shape, weight.dtype, [], compute)
