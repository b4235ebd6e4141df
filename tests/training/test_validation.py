"""Validation: the exact mean over all tokens on any mesh, and a training that is the same without it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from models.ops.documents import Documents
from tests.models.qwen35_moe.shapes import run_model
from tests.test_train import SMALL, native_model, run, stored_tensors, without_times
from tests.test_train import metrics as read_metrics

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
