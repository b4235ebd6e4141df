"""Turns a Hugging Face directory into a checkpoint that a run can start from, in one process, a tensor at a time.

    python checkpoint/convert_from_hf.py HF_DIR OUT [--dtype float32|bfloat16|keep]
    ./run_train.sh --config X.toml --model.path HF_DIR --checkpoint.resume OUT

The checkpoint holds weights alone: a run that resumes from it begins at step 0 with a fresh optimizer.
"""

import argparse
import json
import pickle
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file from anywhere

from safetensors import safe_open

from checkpoint.hf_assets import write_hf_assets
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import NOT_TEXT, Piece, Shape, find_pieces, is_float32, parameter_shapes


def convert_from_hf(source: Path, out: Path, dtype: torch.dtype | None) -> list[str]:
    """Writes the text model of `source` (one safetensors file or several, experts stacked or one by one) to `out`.

    dtype: of all parameters but the few that are float32 in training; None keeps what is stored. Returns the tensors
    that were left out: vision tower and multi-token prediction. `out` must not exist; it appears when it is complete.
    Raises ValueError naming a tensor that is missing, of a wrong shape, or unknown.
    """
    if out.exists():
        raise ValueError(f"{out}: exists: expected a new directory")
    shape = ModelConfig.from_pretrained(source)
    with ExitStack() as stack:
        files = _open_files(source, stack)
        available: dict[str, Shape] = {k: tuple(f.get_slice(k).get_shape()) for k, f in files.items()}
        pieces = find_pieces(shape, available)
        unfinished = out.with_name(f".{out.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "hf").mkdir(parents=True)
        try:
            _write_dcp(unfinished, parameter_shapes(shape), pieces, files, dtype)
            write_hf_assets(unfinished / "hf", json.loads((source / "config.json").read_text()), source)
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return [key for key in available if key.startswith(NOT_TEXT)]


def _open_files(source: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file of each tensor."""
    index = source / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files: dict[str, Any] = {}
    for name in names:
        if not (source / name).exists():
            raise ValueError(f"{source}: {name} is missing")
        file = stack.enter_context(safe_open(source / name, framework="pt"))
        files |= dict.fromkeys(file.keys(), file)
    return files


def _write_dcp(
    folder: Path,
    shapes: Mapping[str, Shape],
    pieces: Mapping[str, list[Piece]],
    files: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """One `.distcp` file, each tensor one chunk, and its index: what `dcp.save` writes, but never all in memory."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for name, shape in shapes.items():
            tensor = _assemble(shape, pieces[name], files)
            tensor = tensor.to(torch.float32 if is_float32(name) else dtype or tensor.dtype)
            start = file.tell()
            torch.save(tensor, file)
            key, whole = f"model.{name}", torch.Size([0] * tensor.dim())
            entries[key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [ChunkStorageMetadata(whole, tensor.shape)]
            )
            places[MetadataIndex(key, whole, 0)] = _StorageInfo(
                file.name.rpartition("/")[2], start, file.tell() - start
            )
    plain = {key: (key,) for key in entries}
    metadata = Metadata(entries, planner_data=plain, storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _assemble(shape: Shape, pieces: list[Piece], files: Mapping[str, Any]) -> torch.Tensor:
    if not pieces[0].region:
        return files[pieces[0].key].get_tensor(pieces[0].key)
    first = files[pieces[0].key].get_tensor(pieces[0].key)
    full = torch.empty(shape, dtype=first.dtype)
    for piece in pieces:
        full[piece.region] = files[piece.key].get_tensor(piece.key)
    return full


def main(arguments: list[str]) -> int:
    """0; 2 for a mistake on the command line; 1 for a directory that cannot be converted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="config.json, tokenizer, *.safetensors")
    parser.add_argument("out", type=Path, help="the checkpoint directory to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "keep"), default="float32")
    options = parser.parse_args(arguments)
    if options.out.exists() or not (options.source / "config.json").is_file():
        wrong = f"{options.out} exists" if options.out.exists() else f"{options.source} has no config.json"
        print(f"convert_from_hf: {wrong}", file=sys.stderr)
        return 2
    try:
        left_out = convert_from_hf(
            options.source, options.out, None if options.dtype == "keep" else getattr(torch, options.dtype)
        )
    except (ValueError, OSError) as error:
        print(f"convert_from_hf: {error}", file=sys.stderr)
        return 1
    if left_out:
        print(f"{len(left_out)} tensors are no part of the text model and were left out: {left_out[0]}, ...")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
