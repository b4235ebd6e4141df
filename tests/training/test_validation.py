"""Validation: the exact mean over all tokens on any mesh, and a training that is the same without it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from data.batch import MicroBatch
from data.packing import filler_row
from models.ops.documents import Documents
from models.qwen35_moe.model import Output
from models.qwen35_moe.moe import COUNTS_OF_ALL, Measure
from tests.models.qwen35_moe.shapes import run_model
from tests.test_train import SMALL, native_model, run, stored_tensors, without_times
from tests.test_train import metrics as read_metrics
from training import validation
from training.validation import Validator

ROOT = Path(__file__).resolve().parents[2]
# In rows of 64 tokens over 4 slots: the first document takes its slot far beyond the others, where three of the four
# have nothing but fillers and, with two processes, one of them nothing at all.
TEXTS = [
    "The with statement is used to wrap the execution of a block. " * 15,
    "if",
    "a = b + c " * 9,
    "x",
    "def f(): pass",
]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "validated.toml"
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    section = f'[validation]\nenable = true\npath = ["{tmp_path}/held_out.jsonl"]\ninterval = 2\n'
    path.write_text(SMALL.format(root=ROOT) + section)
    return path


def expected_loss(checkpoint):
    """Each slot's documents end to end, cut every 64 tokens, one forward a piece."""
    model, tokenizer = native_model(checkpoint), AutoTokenizer.from_pretrained(checkpoint / "hf")
    documents = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    total, count = 0.0, 0
    for slot in range(4):
        place = 0
        for document in documents[slot::4]:
            start = 0
            while start < len(document):
                end = min(start + 64 - place % 64, len(document))
                tokens = torch.tensor(document[start:end])
                labels = torch.tensor([*document[start + 1 : end + 1], *[-100] * (end == len(document))])
                with torch.no_grad():
                    piece = Documents.from_lengths([end - start])
                    loss, _ = run_model(model, tokens, torch.arange(end - start), piece, labels)
                total, count = total + loss.double().item(), count + int((labels != -100).sum())
                place, start = place + end - start, end
    assert count == sum(map(len, documents)) - len(documents)
    return total / count


def test_the_exact_mean_on_any_mesh_and_no_trace_in_the_training(config_file, tmp_path):
    options = ["--training.steps=4", "--checkpoint.interval=2", "--job.deterministic"]
    run(config_file, tmp_path / "two", *options)
    run(config_file, tmp_path / "one", *options, "--parallelism.expert_parallel_degree=1", ranks=1)
    run(config_file, tmp_path / "without", *options, "--validation.enable=false", "--data.num_workers=1")
    two, one, without = (read_metrics(tmp_path / name) for name in ("two", "one", "without"))

    assert [line["step"] for line in two if "validation_loss" in line] == [2, 4]
    for step in (2, 4):
        # One float32 sum of losses a micro-batch, so a few units in the last place of float32: 1e-6.
        expected = expected_loss(tmp_path / f"two/checkpoints/step-{step:08}")
        assert two[step - 1]["validation_loss"] == pytest.approx(expected, rel=1e-6)
    # Other weights, equal to rounding (see test_layouts.py).
    assert one[3]["validation_loss"] == pytest.approx(two[3]["validation_loss"], rel=1e-5)

    for line in two:
        line.pop("validation_loss", None)
    assert without_times(two) == without_times(without)
    states = [stored_tensors(tmp_path / name / "checkpoints/step-00000004") for name in ("two", "without")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert {"train.rng_state", "train.data_cursors"} <= states[0].keys()


class OneBatch:
    """A loader of one micro-batch, whose last row is fillers, and then of fillers."""

    num_micro_batches = 1

    def rewind(self) -> None:
        row = filler_row(8, 5)
        self.rows = iter([[row._replace(num_fillers=3), row], [row, row]])

    def __next__(self) -> MicroBatch:
        return MicroBatch.of(next(self.rows), may_fill=True)


class Routers(torch.nn.Module):
    """Keeps what routers are told."""

    def forward(self, batch: MicroBatch, measure: Measure = COUNTS_OF_ALL, counts_accepted: bool = False) -> Output:
        self.measure = measure
        return Output(torch.zeros(()), None)  # type: ignore[arg-type]


def test_routers_are_told_of_fillers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "sum_over_ranks", lambda values: values)
    validator, model = object.__new__(Validator), Routers()
    validator._max_steps, validator._context, validator._vision = 9, None, None
    validator._measure(model, torch.device("cpu"), OneBatch())  # type: ignore[arg-type]
    assert model.measure.is_real is not None
    assert model.measure.is_real.tolist() == [True] * 5 + [False] * 11
