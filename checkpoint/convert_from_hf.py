"""Turns a Hugging Face directory into a checkpoint that a run can start from, in one process, a tensor at a time.

    python checkpoint/convert_from_hf.py HF_DIR OUT [--dtype bfloat16|float32|keep]
    ./run_train.sh --config X.toml --model.path HF_DIR --checkpoint.resume OUT

The checkpoint holds weights alone: a run that resumes from it begins at step 0 with a fresh optimizer.
"""

import json
import pickle
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

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

from safetensors import SafetensorError, safe_open

from checkpoint.command_line import DTYPES, OneLineParser
from checkpoint.directories import is_taken, new_directory
from checkpoint.hf_assets import write_hf_assets
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import NOT_TEXT, Piece, Shape, find_pieces, is_float32, parameter_shapes


def convert_from_hf(source: Path, out: Path, dtype: torch.dtype | None) -> list[str]:
    """Writes the text model of `source` (one safetensors file or several, experts stacked or one by one) to `out`.

    dtype: of all parameters but the few that are float32 in training; None keeps what is stored. Returns the tensors
    that were left out: vision tower and multi-token prediction. `out` is new or empty; it appears when it is complete.
    Raises ValueError naming a tensor that is missing, of a wrong shape, or unknown.
    """
    shape = ModelConfig.from_pretrained(source)
    files, available = _read_headers(source)
    pieces = find_pieces(shape, available)
    with new_directory(out) as folder:
        (folder / "hf").mkdir()
        _write_dcp(folder, parameter_shapes(shape), pieces, files, dtype)
        write_hf_assets(folder / "hf", json.loads((source / "config.json").read_text(encoding="utf-8")), source)
    return [key for key in available if key.startswith(NOT_TEXT)]


def _read_headers(source: Path) -> tuple[dict[str, Path], dict[str, Shape]]:
    """The file and the shape of each tensor."""
    index = source / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    for name in names:
        path = source / name
        if not path.exists():
            raise ValueError(f"{source}: {name} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in keys}
                files |= dict.fromkeys(keys, path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no complete safetensors file: {error}") from error
    return files, shapes


def _write_dcp(
    folder: Path,
    shapes: Mapping[str, Shape],
    pieces: Mapping[str, list[Piece]],
    files: Mapping[str, Path],
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


def _assemble(shape: Shape, pieces: list[Piece], files: Mapping[str, Path]) -> torch.Tensor:
    # Files are opened anew for each parameter: what is read of one stays mapped, and counts as memory, until it closes.
    with ExitStack() as stack:
        paths = {files[piece.key] for piece in pieces}
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}

        def read(piece: Piece) -> torch.Tensor:
            return opened[files[piece.key]].get_tensor(piece.key)

        first = read(pieces[0])
        if not pieces[0].region:
            return first
        full = torch.empty(shape, dtype=first.dtype)
        for piece in pieces:
            full[piece.region] = read(piece)
        return full


def main(arguments: list[str]) -> int:
    """0; 2 for a mistake on the command line; 1 for a directory that cannot be converted."""
    parser = OneLineParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="config.json, tokenizer, *.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the master weights (default: %(default)s; A_log, dt_bias and routers are float32 in any case); "
        "keep: as stored",
    )
    options = parser.parse_args(arguments)
    if is_taken(options.out):
        parser.error(f"{options.out} exists: expected a new or an empty directory")
    if not (options.source / "config.json").is_file():
        parser.error(f"{options.source} has no config.json: expected a Hugging Face directory")
    try:
        left_out = convert_from_hf(options.source, options.out, DTYPES[options.dtype])
    except (ValueError, OSError) as error:
        print(f"convert_from_hf: {error}", file=sys.stderr)
        return 1
    if left_out:
        print(f"{len(left_out)} tensors are no part of the text model and were left out: {left_out[0]}, ...")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
