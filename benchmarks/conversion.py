"""Measures conversion to Hugging Face against a copy of the same bytes on the same disk, and memory; needs no GPU.

    python -m benchmarks.conversion [--folder DIR] [--gigabytes 8.5] [--load]

Makes a synthetic DCP checkpoint whose experts are cut on two axes (8 files, as of 2 x 4 ranks), at the layer shapes of
35B-A3B. Then, each with nothing of it in the page cache and everything flushed to the disk at the end: copies its
files; converts it with --dtype keep, and with --dtype bfloat16. Peak memory is the converter's whole process. With
--load, two processes (expert parallel) then start from the result as `model.initial_load = "hf"` does.
"""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from errors import OneLineParser, exit_on_error
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.parameters import parameters
from torch_private import StorageInfo

ROOT = Path(__file__).resolve().parents[1]
EFSDP, EP = 2, 4


def make_config(gigabytes: float) -> ModelConfig:
    """Layers of 35B-A3B, as many as it takes; fewer experts below 7 GB."""
    per_expert = 4 * 3 * 512 * 2048
    experts = 256 if gigabytes >= 7 else 32
    layers = max(2, round(gigabytes * 1e9 / (experts * per_expert)))
    return ModelConfig(
        vocab_size=32768, num_hidden_layers=layers, layer_types=(LINEAR,) * (layers - 1) + (FULL,), num_experts=experts
    )


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Numbers that repeat after 64 MiB; chunks as FSDP2 and expert parallelism cut them."""
    (folder / "hf").mkdir(parents=True)
    (folder / "hf/config.json").write_text(json.dumps(config.to_dict()))
    numbers = torch.randn(2**24)
    names = [f"__{rank}_0.distcp" for rank in range(EFSDP * EP)]
    files = [(folder / name).open("wb") for name in names]
    entries: dict = {}
    places: dict = {}
    for name, (shape, *_) in parameters(config).items():
        cuts = (EP, EFSDP) if ".experts." in name else (min(len(files), shape[0]),)
        sizes = [-(-size // cut) for size, cut in zip(shape, cuts)]
        chunks = []
        for rank, position in enumerate(product(*(range(cut) for cut in cuts))):
            starts = [index * size for index, size in zip(position, sizes)]
            lengths = [min(size, whole - start) for size, whole, start in zip(sizes, shape, starts)]
            if min(lengths) <= 0:
                continue
            size = torch.Size([*lengths, *shape[len(cuts) :]])
            offsets = torch.Size([*starts, *[0] * (len(shape) - len(cuts))])
            file, before = files[rank % len(files)], files[rank % len(files)].tell()
            torch.save(numbers.repeat(-(-size.numel() // len(numbers)))[: size.numel()].clone().view(size), file)
            places[MetadataIndex(f"model.{name}", offsets, len(chunks))] = StorageInfo(
                names[rank], before, file.tell() - before
            )
            chunks.append(ChunkStorageMetadata(offsets, size))
        entries[f"model.{name}"] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)
    for file in files:
        os.fsync(file.fileno())
        file.close()
    metadata = Metadata(entries, storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in folder.glob("*.distcp"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds."""
    forget(source)
    target.mkdir()
    buffer = memoryview(bytearray(2**26))
    started = time.perf_counter()
    for path in sorted(source.glob("*.distcp")):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as write:
            while count := read.readinto(buffer):
                done = 0
                while done < count:
                    done += write.write(buffer[done:count])
            os.fsync(write.fileno())
    return time.perf_counter() - started


def convert(source: Path, out: Path, dtype: str) -> tuple[float, float]:
    """Seconds and peak memory in GiB, of a process of its own."""
    forget(source)
    command = [sys.executable, str(ROOT / "checkpoint/convert_to_hf.py"), str(source), str(out), f"--dtype={dtype}"]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def load(folder: Path) -> None:
    """One rank of two: what `model.initial_load = "hf"` does, in bfloat16."""
    import torch.distributed as dist

    from checkpoint.hf_reader import load_hf_weights
    from models.ops.kernels import Kernels
    from parallelisms.degrees import Degrees
    from parallelisms.mesh import build_meshes
    from parallelisms.parallelize import local_region, parallelize_fn
    from train import build_on_meta

    dist.init_process_group("gloo")
    model = build_on_meta(ModelConfig.from_pretrained(folder), Kernels(attention="sdpa"), torch.bfloat16)
    parallelize_fn(model, build_meshes("cpu", Degrees(1, 2, 2)), compute_dtype=torch.bfloat16)
    before, started = peak_memory(), time.perf_counter()
    model.to_empty(device="cpu")
    load_hf_weights(model, folder, 0, local_region)
    seconds, used = time.perf_counter() - started, peak_memory() - before
    share = sum(local_region(p)[0].nbytes for p in model.parameters()) / 2**30
    print(
        f"rank {dist.get_rank()}: {share:.2f} GiB are its share; peak {used:.2f} GiB more than before; {seconds:.0f} s"
    )


def peak_memory() -> float:
    """Of this process so far, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=8.5)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        load(options.rank_of)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        source = folder / "dcp"
        write_checkpoint(source, make_config(options.gigabytes))
        size = sum(path.stat().st_size for path in source.glob("*.distcp")) / 1e9
        print(f"checkpoint: {size:.2f} GB in 8 files, experts in {EP} x {EFSDP} chunks", flush=True)
        seconds = copy(source, folder / "copy")
        shutil.rmtree(folder / "copy")
        print(f"copy: {seconds:.1f} s, {size / seconds:.3f} GB/s", flush=True)
        for dtype in ("keep", "bfloat16"):
            taken, peak = convert(source, folder / dtype, dtype)
            ratio = seconds / taken
            print(f"--dtype {dtype}: {taken:.1f} s, {ratio:.0%} of the copy's speed, peak {peak:.2f} GiB", flush=True)
            if dtype == "keep":
                shutil.rmtree(folder / dtype)
        if options.load:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            subprocess.run([*torchrun, "-m", "benchmarks.conversion", f"--rank-of={folder / 'bfloat16'}"], check=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
