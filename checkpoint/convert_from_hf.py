"""Turns a Hugging Face directory into a checkpoint that a run can start from, in one process, a tensor at a time.

    python checkpoint/convert_from_hf.py HF_DIR OUT [--dtype bfloat16|float32|keep] [--vision] [--mtp]
    ./run_train.sh --config X.toml --model.path HF_DIR --checkpoint.start_from OUT

The checkpoint holds weights alone. A run can also read HF_DIR itself: `model.initial_load = "hf"`.
"""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import BytesStorageMetadata, ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file from anywhere

from checkpoint.directories import check_is_free, new_directory, write_manifest
from checkpoint.export import DTYPES
from checkpoint.hf_assets import name_base, read_checkpoint_assets, special_token_ids, write_files
from checkpoint.hf_reader import hash_parts, naming_tensors, native_tensors
from checkpoint.tensors.safetensors import read_safetensors
from checkpoint.tensors.stored import StoredTensor, finite
from errors import OneLineParser, exit_on_error
from models.qwen35_moe.config import ModelConfig, read_config
from models.qwen35_moe.hf_weights import left_out
from models.qwen35_moe.parameters import parameters
from torch_private import StorageInfo

_BLOCK_BYTES = 256 * 2**20


def convert_from_hf(
    source: Path, out: Path, dtype: torch.dtype | None, with_vision: bool = False, with_mtp: bool = False
) -> list[str]:
    """Writes the text model of `source` (one safetensors file or several, experts stacked or one by one) to `out`.

    dtype: of all parameters but the few that are float32 in training; None keeps what is stored. `with_vision`: the
    tower too; `with_mtp`: multi-token prediction too. Returns the tensors that were left out, which an export takes
    from `source` again. `out` is new or empty; it appears when it is complete. Raises UserError naming a tensor that is
    missing, odd or unknown.
    """
    special_token_ids(source)  # a damaged tokenizer is told now, and not when a run begins
    stored = read_safetensors(source)
    config, shape = read_config(source / "config.json"), ModelConfig.from_pretrained(source, with_vision, with_mtp)
    with naming_tensors():
        tensors = native_tensors(shape, stored)
    float32 = {name for name, parameter in parameters(shape).items() if parameter.is_float32}
    dtypes = {n: t.dtype if dtype is None else torch.float32 if n in float32 else dtype for n, t in tensors.items()}
    parts = hash_parts(stored, left_out(shape))
    with new_directory(out, source) as folder:
        (folder / "hf").mkdir()
        _write_dcp(folder, tensors, dtypes)
        write_files(folder / "hf", read_checkpoint_assets(config, source) | name_base(source, parts))
        write_manifest(folder)
    return [key for key in stored if key.startswith(left_out(shape))]


def _write_dcp(folder: Path, tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """One `.distcp` file, each tensor in chunks of its rows, and its index: what `dcp.save` writes, block by block."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, StorageInfo] = {}
    path = folder / "__0_0.distcp"
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            key, row = f"model.{name}", 0
            chunks: list[ChunkStorageMetadata] = []
            for block in tensor.blocks(_BLOCK_BYTES):
                offsets = torch.Size([row] + [0] * (block.dim() - 1)) if block.dim() else torch.Size()
                start = file.tell()
                torch.save(finite(tensor, block.to(dtypes[name])), file)
                places[MetadataIndex(key, offsets, len(chunks))] = StorageInfo(path.name, start, file.tell() - start)
                chunks.append(ChunkStorageMetadata(offsets, block.shape))
                row += block.shape[0] if block.dim() else 0
            properties = TensorProperties(dtype=dtypes[name])
            entries[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    plain = {key: (key,) for key in entries}
    metadata = Metadata(entries, planner_data=plain, storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def main(arguments: list[str]) -> None:
    """The command line. Raises UserError."""
    parser = OneLineParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="config.json, tokenizer, *.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the master weights (default: %(default)s; A_log, dt_bias and routers are float32 in any case); "
        "keep: all as stored",
    )
    parser.add_argument("--vision", action="store_true", help="the vision tower too, for runs that it is part of")
    parser.add_argument("--mtp", action="store_true", help="multi-token prediction too, for runs that train it")
    options = parser.parse_args(arguments)
    check_is_free(options.out)
    if not (options.source / "config.json").is_file():
        parser.error(f"{options.source} has no config.json: expected a Hugging Face directory")
    spare = convert_from_hf(options.source, options.out, DTYPES[options.dtype], options.vision, options.mtp)
    if spare:
        print(f"{len(spare)} tensors are no part of the model and were left out: {spare[0]}, ...")


if __name__ == "__main__":
    with exit_on_error("convert_from_hf: ", interrupted="interrupted, nothing is left"):
        main(sys.argv[1:])
