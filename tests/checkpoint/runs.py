"""Starts train.py's main in real processes that a test can watch and kill; a start takes a second or two."""

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed import free_port, on_cpus, shorten_chunks, start_server
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

_on_gpus = multiprocessing.get_context("spawn")  # imports have touched CUDA, which does not outlive a fork

# The tiny recipe with less of everything but kinds of layers. Adam's eps: with the default, weights drift by noise
# divided by noise, and layouts could not be compared.
OPTIONS = [
    "--config=qwen35moe_tiny.toml",
    "--model.config.hidden_size=32",
    "--model.config.num_hidden_layers=2",
    "--model.config.full_attention_interval=2",
    "--model.config.moe_intermediate_size=32",
    "--training.sequence_length=32",
    "--training.local_batch_size=1",
    "--training.global_batch_size=4",
    "--optimizer.eps=1e-4",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.decay=constant",
    "--data.num_workers=0",
    "--metrics.log_interval=1",
    "--metrics.tensorboard=false",
]


def _rank_main(
    rank: int, world_size: int, port: int, log: str, arguments: list[str], on_gpus: bool, short_chunks: bool
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from errors import exit_on_error
    from train import main

    torch.set_num_threads(1)
    if short_chunks:
        shorten_chunks()
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1)  # shows where a rank hangs
    with exit_on_error():
        main(arguments)


class Run:
    """A run of `world_size` processes under way, on CPUs or each with a GPU; what they print goes to `folder`/log."""

    def __init__(
        self,
        folder: Path,
        world_size: int,
        *options: str,
        on_gpus: bool = False,
        defaults: Sequence[str] = tuple(OPTIONS),
    ) -> None:
        self.folder, self.log = folder, folder / "log"
        folder.mkdir(exist_ok=True, parents=True)
        self.log.write_text("")
        given = {option.split("=")[0] for option in options}  # each may stand there once
        kept = [option for option in defaults if option.split("=")[0] not in given]
        arguments = [*kept, f"--job.output_dir={folder}", *options]
        port = free_port()
        # Runs without defaults are compared with run_train.sh's, or with losses on record.
        short_chunks = bool(defaults) and not on_gpus
        if not on_gpus:
            start_server()
        start = _on_gpus.Process if on_gpus else on_cpus.Process
        self.ranks: list[BaseProcess] = [
            start(target=_rank_main, args=(rank, world_size, port, str(self.log), arguments, on_gpus, short_chunks))
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.ranks[rank].kill()

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """The exit codes; whoever is still there after `seconds` is killed, and has None."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGUSR1)
                time.sleep(0.5)
            process.kill()
            process.join()
        return codes

    def finish(self, seconds: float = PATIENCE) -> list[dict]:
        """Waits for a good end; the lines of metrics.jsonl."""
        codes = self.wait(seconds)
        assert set(codes) == {0}, (codes, self.log.read_text())
        return self.metrics()

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]
