"""How fast one rank's data comes, and what a large corpus costs at the start and in memory.

    python -m benchmarks.data_throughput [--seconds 10] [--workers 2] [--documents 10000000]

Prints one line a measurement. The embedded text and tokenizer, copied to about 100 MB; rows of 4,096 tokens, 8 slots.
The large corpus is generated in a temporary folder (about 40 bytes a document), and read with the index made anew and
then with the index of before.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from config.options import Data, Training
from data import tokenize
from data.loader import TokenLoader
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
    start, num_tokens = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        num_tokens += len(next(batches).tokens)
    rate = num_tokens / (time.perf_counter() - start)
    loader.close()
    counts = loader.counts
    return f"{rate:>12,.0f} tokens/s, rows {counts['real_tokens'] / counts['tokens']:.2%} full"


def start_of(path: str) -> None:
    """In a process of its own: the seconds to the first micro-batch, and the peak memory."""
    start = time.perf_counter()
    loader = open_loader(Path(path), 0)
    next(loader)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{time.perf_counter() - start:.2f} s to the first micro-batch, peak memory {peak:,.0f} MiB")


def main() -> None:
    parser = OneLineParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--start-of", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.cache or name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        if options.start_of:
            start_of(options.start_of)
            return
        text = (TINY / "python_reference.jsonl").read_bytes()
        (folder / "text.jsonl").write_bytes(text * 100)
        chats = (TINY / "chat" / "conversations.jsonl").read_bytes()
        (folder / "chats.jsonl").write_bytes(chats * 100)
        config = ["--config", "qwen35moe_tiny.toml", "--data.path", str(folder / "text.jsonl")]
        start = time.perf_counter()
        tokenize.main(["--out", str(folder / "tokens"), *config])
        print(f"tokenised ahead in {time.perf_counter() - start:.1f} s")
        for what, path, data_format in (
            ("text", "text.jsonl", "text"),
            ("tokenised", "tokens", "text"),
            ("chat", "chats.jsonl", "chat"),
        ):
            for workers in (0, options.workers):
                rate = tokens_per_second(folder / path, workers, options.seconds, data_format)
                print(f"{what:<10} {workers} workers: {rate}", flush=True)
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
