"""Turns a checkpoint into a Hugging Face directory, in one process, a tensor at a time.

python checkpoint/convert_to_hf.py CHECKPOINT OUT [--dtype bfloat16|float32|keep] [--max-shard-size 5GB]
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file from anywhere

from checkpoint.checkpointer import find_checkpoint
from checkpoint.command_line import DTYPES, OneLineParser
from checkpoint.dcp_reader import StoredTensor, read_index
from checkpoint.directories import is_taken, new_directory
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import hf_name, is_published_in_float32, parameter_shapes

# The names of dtypes in a safetensors header.
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def convert_to_hf(checkpoint: Path, out: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Writes `checkpoint` (a step-* directory, or a run's output_dir) as a Hugging Face causal-LM directory to `out`.

    dtype: of all tensors but the few that the published checkpoints have in float32; None keeps what is stored. `out`
    is new or empty; it appears when it is complete. Raises ValueError, naming what does not fit, before anything is
    written.
    """
    checkpoint = find_checkpoint(checkpoint)
    config = json.loads((checkpoint / "hf" / "config.json").read_text(encoding="utf-8"))
    tensors = _model_tensors(checkpoint, ModelConfig.from_dict(config), dtype)
    config["dtype"] = str(dtype or tensors[0].stored.dtype).removeprefix("torch.")
    shards = _split(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    with new_directory(out) as folder:
        shutil.copytree(checkpoint / "hf", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            with (folder / name).open("wb") as file:
                _write_shard(file, shard)
            weight_map |= {tensor.key: name for tensor in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _Export(NamedTuple):
    """A stored tensor as it will be written."""

    key: str
    stored: StoredTensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.stored.shape).numel() * self.dtype.itemsize


def _model_tensors(checkpoint: Path, shape: ModelConfig, dtype: torch.dtype | None) -> list[_Export]:
    """The model's tensors in its order, after a check against the table of parameters."""
    stored = {n.removeprefix("model."): t for n, t in read_index(checkpoint).items() if n.startswith("model.")}
    expected = parameter_shapes(shape)
    for name in sorted(stored.keys() ^ expected.keys()):
        raise ValueError(f"{checkpoint}: {name!r} is {'missing' if name in expected else 'unknown to this model'}")
    for name, size in expected.items():
        if stored[name].shape != size:
            raise ValueError(f"{checkpoint}: {name!r} has shape {list(stored[name].shape)}, not {list(size)}")
        if stored[name].dtype not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{checkpoint}: {name!r} is {stored[name].dtype}, not floating point")

    def export_dtype(name: str) -> torch.dtype:
        if dtype is None:
            return stored[name].dtype
        return torch.float32 if is_published_in_float32(name) else dtype

    return [_Export(hf_name(name), stored[name], export_dtype(name)) for name in expected]


def _split(tensors: list[_Export], max_bytes: int) -> list[list[_Export]]:
    """Consecutive tensors of at most `max_bytes` together; a larger one alone."""
    shards: list[list[_Export]] = []
    used = 0
    for tensor in tensors:
        if not shards or used + tensor.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards


def _write_shard(file: BinaryIO, tensors: list[_Export]) -> None:
    """The safetensors format: the header's length (8 bytes, little-endian), a JSON header, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.key] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.stored.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        values = tensor.stored.read().to(tensor.dtype)
        file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number (powers of ten, as Hugging Face counts)."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 200MB")
    return int(match[1]) * {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(arguments: list[str]) -> int:
    """0; 2 for a mistake on the command line; 1 for a checkpoint that cannot be converted."""
    parser = OneLineParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a step-* directory, or a run's output_dir (its newest step)",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the tensors (default: %(default)s; A_log and linear attention's norms stay float32, as in the "
        "published checkpoints); keep: as trained",
    )
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of a file (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if is_taken(options.out):
        parser.error(f"{options.out} exists: expected a new or an empty directory")
    if not options.checkpoint.is_dir():
        parser.error(f"{options.checkpoint} is no directory: expected a step-* directory, or a run's output_dir")
    try:
        convert_to_hf(options.checkpoint, options.out, DTYPES[options.dtype], options.max_shard_size)
    except (ValueError, OSError) as error:
        print(f"convert_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
