"""How fast one rank's data comes, and what a large corpus costs at the start and in memory.

    python -m benchmarks.data_throughput [--seconds 10] [--workers 2] [--documents 10000000] [--only KIND]
    python -m benchmarks.data_throughput --images 10000 [--seconds 10]

Prints one line a measurement. The embedded text and tokenizer, copied to about 100 MB in every kind of file, and chats
in every layout; rows of 4,096 tokens, 8 slots. Beside each: how long the first start took, which makes its index or
Arrow file.
The large corpus is generated in a temporary folder (about 40 bytes a document), and read with the index made anew and
then with the index of before.

With --images: chats about so many photos of 1080 x 1920, hard links to a few that are drawn here. First what their
lengths cost, from headers alone, for all of them; then one worker that decodes, in rows of 16,384 tokens.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from config.options import Data, Training
from config.reading import load_config, model_config
from data import tokenize
from data.loader import TokenLoader
from data.media import media_settings
from data.samples import open_samples
from data.tokenizer import load_tokenizer
from errors import OneLineParser, exit_on_error

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
TRAINING = Training(steps=1, sequence_length=4096, local_batch_size=2, global_batch_size=8)


def open_loader(path: Path, workers: int, data_format: str = "text") -> TokenLoader:
    data = Data(path=(str(path),), format=data_format, tokenizer=str(TINY / "tokenizer"), num_workers=workers)
    return TokenLoader(data, TRAINING, 0, 1, 0)


def tokens_per_second(path: Path, workers: int, seconds: float, data_format: str = "text") -> str:
    """Measured after the first step, which starts the workers."""
    loader = open_loader(path, workers, data_format)
    batches = (next(loader) for _ in itertools.count())
    num_tokens = sum(len(batch.tokens) for batch in itertools.islice(batches, 8))
    start, cpu_start, num_tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        num_tokens += len(next(batches).tokens)
    rate = num_tokens / (time.perf_counter() - start)
    of_core = num_tokens / (time.process_time() - cpu_start)  # what other work on the machine takes is not in it
    loader.close()
    counts = loader.counts
    core = "" if workers else f" ({of_core:,.0f} a second of one core's)"
    return f"{rate:>12,.0f} tokens/s{core}, rows {counts['real_tokens'] / counts['tokens']:.2%} full"


def records_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def layouts_of(chats: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The chats in every layout, their system prompt in a field of its own but for messages."""
    turns = [[each for each in chat["messages"] if each["role"] != "system"] for chat in chats]
    system = [[each["content"] for each in chat["messages"] if each["role"] == "system"] for chat in chats]
    systems = [texts[0] if texts else "" for texts in system]
    senders = {"user": "human", "assistant": "gpt"}
    sharegpt = [[{"from": senders[each["role"]], "value": each["content"]} for each in turn] for turn in turns]
    pairs = [[[a["content"], b["content"]] for a, b in zip(turn[::2], turn[1::2])] for turn in turns]
    return {
        "messages": [{"messages": chat["messages"]} for chat in chats],
        "sharegpt": [{"conversations": turn, "system": text} for turn, text in zip(sharegpt, systems)],
        "alpaca": [
            {"instruction": pair[-1][0], "output": pair[-1][1], "history": pair[:-1], "system": text}
            for pair, text in zip(pairs, systems)
        ],
        "prompt_completion": [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats],
    }


def write_as(path: Path, records: list[dict[str, Any]], times: int, data_format: str) -> Path:
    """The records, so many times, in the kind of file that the path's ending says."""
    if path.suffix == ".tokens":
        lines = write_as(path.with_suffix(".jsonl"), records, times, data_format)
        arguments = ["--config", "qwen35moe_tiny.toml", "--data.path", str(lines), "--data.format", data_format]
        tokenize.main(["--out", str(path), *arguments])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records * times), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.writer(file)
                cells = [[v if isinstance(v, str) else json.dumps(v) for v in each.values()] for each in records]
                writer.writerows([list(records[0]), *cells * times])
            elif path.suffix == ".json":
                inside = ",\n".join(json.dumps(record) for record in records)
                file.write("[" + ",\n".join([inside] * times) + "]")
            else:
                file.writelines([json.dumps(record) + "\n" for record in records] * times)
    return path


def start_of(path: str) -> None:
    """In a process of its own: the seconds to the first micro-batch, and the peak memory."""
    start = time.perf_counter()
    loader = open_loader(Path(path), 0)
    next(loader)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{time.perf_counter() - start:.2f} s to the first micro-batch, peak memory {peak:,.0f} MiB")


def draw_photos(folder: Path, number: int) -> Path:
    """So many files, of which each holds one of sixteen photos of noise on colours, and the chats about them."""
    random = np.random.default_rng(0)
    for place in range(16):
        colours = Image.fromarray(random.integers(0, 256, (9, 16, 3), np.uint8)).resize((1920, 1080))
        grain = random.integers(-12, 13, (1080, 1920, 1))
        photo = np.clip(np.asarray(colours, np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{place}.jpg", quality=85)
    with open(folder / "chats.jsonl", "w") as file:
        for place in range(number):
            if place >= 16:
                os.link(folder / f"{place % 16}.jpg", folder / f"{place}.jpg")
            content = [{"type": "image", "image": f"{place}.jpg"}, {"type": "text", "text": f"What is photo {place}?"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Colours and noise."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder / "chats.jsonl"


def peak_memory(process: int) -> str:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return f"{int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) / 2**10:,.0f} MiB"


def measure_images(folder: Path, number: int, seconds: float) -> None:
    """Lengths from headers, then rows from one worker: images a second, and the most memory it has had."""
    path = draw_photos(folder, number)
    arguments = ["--data.path", str(path), "--data.image_folder", str(folder), "--data.max_pixels=16777216"]
    arguments += ["--training.sequence_length=16384", "--training.global_batch_size=1", "--training.local_batch_size=1"]
    config = load_config(["--config", "qwen35moe_vision_tiny.toml", "--data.num_workers=1", *arguments])
    media = media_settings(config, model_config(config).vision)
    samples = open_samples(config.data, load_tokenizer(config.data.tokenizer), 16384, 0, media)
    before, start = peak_memory(os.getpid()), time.perf_counter()
    num_tokens = sum(len(samples.read(place).tokens) for place in range(number))
    rate = number / (time.perf_counter() - start)
    print(
        f"lengths of {number:,} photos: {rate:,.0f} a second, {num_tokens:,} tokens, peak memory {before} before, "
        f"{peak_memory(os.getpid())} after",
        flush=True,
    )
    loader = TokenLoader(config.data, config.training, 0, 1, 0, media=media, one_epoch=True)
    next(loader)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    num_images, next_line, start = 0, 1.0, time.perf_counter()
    while num_images < number:
        patches = next(loader).patches
        if patches is None or not len(patches.places):
            break
        num_images += len(patches.frames.lengths())
        passed = time.perf_counter() - start
        if passed > seconds * next_line / 5 or num_images >= number - 8:
            next_line += 1
            rate = num_images / passed
            print(f"{num_images:,} photos: {rate:.2f} a second, peak memory of the worker {peak_memory(worker.pid)}")
        if passed > seconds:
            break
    loader.close()


def main() -> None:
    parser = OneLineParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the large corpus; 0: none")
    parser.add_argument("--only", default="", help="kinds whose names have this: jsonl, alpaca, tokenised, ...")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--start-of", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.cache or name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        if options.start_of:
            start_of(options.start_of)
            return
        if options.images:
            measure_images(folder, options.images, options.seconds)
            return
        texts = records_in(TINY / "python_reference.jsonl")
        chats = records_in(TINY / "chat" / "conversations.jsonl")
        kinds = {f"text {kind}": ("text", kind, texts, 100) for kind in ("jsonl", "json", "csv", "parquet")}
        for layout, records in layouts_of(chats).items():
            kinds |= {f"{layout} {kind}": ("chat", kind, records, 2000) for kind in ("jsonl", "json", "csv", "parquet")}
        short = [{"text": "\n".join(each["content"] for each in chat["messages"])} for chat in chats]
        for name, records in (("text", texts), ("short text", short), ("chat", chats)):
            kinds[f"{name} tokenised"] = ("chat" if name == "chat" else "text", "tokens", records, 100)
        for name, (data_format, kind, records, times) in kinds.items():
            if options.only not in name:
                continue
            path = write_as(folder / f"{name.replace(' ', '_')}.{kind}", records, times, data_format)
            start = time.perf_counter()
            next(open_loader(path, 0, data_format))
            first = time.perf_counter() - start
            for workers in (0, options.workers):
                rate = tokens_per_second(path, workers, options.seconds, data_format)
                print(f"{name:<26} {workers} workers: {rate}; first start {first:.1f} s", flush=True)
        if options.only or not options.documents:
            return
        for num_documents in (options.documents // 100, options.documents):
            path = folder / f"{num_documents}.jsonl"
            numbers = range(min(num_documents, 100_000))
            lines = [json.dumps({"text": f"Document {number}, about {number % 97}."}) + "\n" for number in numbers]
            with open(path, "w") as file:
                for _ in range(num_documents // len(numbers)):
                    file.writelines(lines)
            for when in ("first", "second"):
                arguments = ["-m", "benchmarks.data_throughput", "--start-of", str(path), "--cache", str(folder)]
                command = [sys.executable, *arguments]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                print(f"{num_documents:>12,} documents, {when} start: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
