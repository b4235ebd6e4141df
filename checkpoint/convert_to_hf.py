"""Turns a checkpoint into a Hugging Face directory, in one process, a tensor at a time.

python checkpoint/convert_to_hf.py CHECKPOINT OUT [--dtype bfloat16|float32|keep] [--max-shard-size 5GB]
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file from anywhere

from checkpoint.checkpointer import find_checkpoint
from checkpoint.dcp_reader import StoredTensor, read_index
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import hf_name, parameter_shapes

# The names of dtypes in a safetensors header.
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def convert_to_hf(checkpoint: Path, out: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Writes `checkpoint` (a step-* directory, or a run's output_dir) as a Hugging Face causal-LM directory to `out`.

    dtype: of all tensors; None keeps what is stored. `out` must not exist; it appears when it is complete. Raises
    ValueError, naming what does not fit, before anything is written.
    """
    checkpoint = find_checkpoint(checkpoint)
    if out.exists():
        raise ValueError(f"{out}: exists: expected a new directory")
    config = json.loads((checkpoint / "hf" / "config.json").read_text(encoding="utf-8"))
    tensors = _model_tensors(checkpoint, ModelConfig.from_dict(config))
    config["dtype"] = str(dtype or tensors[0].dtype).removeprefix("torch.")

    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint / "hf", unfinished)
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shards = _split(tensors, dtype, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            with (unfinished / name).open("wb") as file:
                _write_shard(file, shard, dtype)
            weight_map |= {hf_name(_native(tensor)): name for tensor in shard}
        if len(shards) > 1:
            total = sum(_num_bytes(tensor, dtype) for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _native(tensor: StoredTensor) -> str:
    return tensor.name.removeprefix("model.")


def _model_tensors(checkpoint: Path, shape: ModelConfig) -> list[StoredTensor]:
    """The model's tensors in its order, after a check against the table of parameters."""
    stored = {_native(t): t for name, t in read_index(checkpoint).items() if name.startswith("model.")}
    expected = parameter_shapes(shape)
    for name in sorted(stored.keys() ^ expected.keys()):
        raise ValueError(f"{checkpoint}: {name!r} is {'missing' if name in expected else 'unknown to this model'}")
    for name, size in expected.items():
        if stored[name].shape != size:
            raise ValueError(f"{checkpoint}: {name!r} has shape {list(stored[name].shape)}, not {list(size)}")
    return [stored[name] for name in expected]


def _num_bytes(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    return torch.Size(tensor.shape).numel() * (dtype or tensor.dtype).itemsize


def _split(tensors: list[StoredTensor], dtype: torch.dtype | None, max_bytes: int) -> list[list[StoredTensor]]:
    """Consecutive tensors of at most `max_bytes` together; a larger one alone."""
    shards: list[list[StoredTensor]] = []
    used = 0
    for tensor in tensors:
        size = _num_bytes(tensor, dtype)
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _write_shard(file: BinaryIO, tensors: list[StoredTensor], dtype: torch.dtype | None) -> None:
    """The safetensors format: the header's length (8 bytes, little-endian), a JSON header, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _num_bytes(tensor, dtype)
        header[hf_name(_native(tensor))] = {
            "dtype": _SAFETENSORS_DTYPES[dtype or tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        values = tensor.read()
        file.write(values.to(dtype or tensor.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number (powers of ten, as Hugging Face counts)."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 200MB")
    return int(match[1]) * {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(arguments: list[str]) -> int:
    """0; 2 for a mistake on the command line; 1 for a checkpoint that cannot be converted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="a step-* directory, or a run's output_dir (its newest step)")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "keep"), default="bfloat16")
    parser.add_argument("--max-shard-size", type=parse_size, default=parse_size("5GB"), metavar="SIZE")
    options = parser.parse_args(arguments)
    if options.out.exists() or not options.checkpoint.is_dir():
        wrong = f"{options.out} exists" if options.out.exists() else f"{options.checkpoint} is no directory"
        print(f"convert_to_hf: {wrong}", file=sys.stderr)
        return 2
    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    try:
        convert_to_hf(options.checkpoint, options.out, dtype, options.max_shard_size)
    except (ValueError, OSError) as error:
        print(f"convert_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
