"""Chat through the whole recipe: real processes, fillers left out of the routers' counts, resumed on another layout."""

import json
from pathlib import Path

import pytest
import tomli
import torch

from config.options import Data, MoE, Training
from data.loader import TokenLoader
from data.packing import BadSample
from data.samples import open_samples
from data.tokenizer import load_tokenizer
from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from tests.test_train import SMALL, metrics, run, stored_tensors
from training.load_balancing import measure_for

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "data" / "tiny" / "tokenizer")
TINY_SHAPE = tomli.loads((ROOT / "train_configs" / "qwen35moe_tiny.toml").read_text())["model"]["config"]


def test_chat_runs_and_resumes_on_another_layout(tmp_path):
    lines = (ROOT / "data" / "tiny" / "chat" / "conversations.jsonl").read_text().splitlines()
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines, '{"messages": []}', "{broken"]))
    config_file = tmp_path / "chat.toml"
    text = SMALL.format(root=ROOT).replace("[data]", f'[data]\nformat = "chat"\npath = ["{tmp_path}/chat.jsonl"]')
    config_file.write_text(text)
    # Rows of 70: few sums of lengths reach it, so there are fillers.
    run(config_file, tmp_path / "two", "--training.sequence_length=70")
    two = metrics(tmp_path / "two")
    assert all(0.5 < line["fill_rate"] < 1 for line in two)
    assert two[-1]["samples_empty"] + two[-1]["samples_not_json"] > 0
    assert two[-1]["loss"] < two[0]["loss"]
    assert (tmp_path / "two" / "skipped").is_dir()

    middle = tmp_path / "two/checkpoints/step-00000003"
    options = ["--training.sequence_length=70", f"--checkpoint.resume={middle}"]
    run(config_file, tmp_path / "one", *options, "--parallelism.expert_parallel_degree=1", ranks=1)
    cursors = [
        stored_tensors(tmp_path / name / "checkpoints/step-00000006")["train.data_cursors"] for name in ("two", "one")
    ]
    assert cursors[0].shape == (4, 33)
    assert torch.equal(*cursors)
    # To rounding, as in test_train.py's test of text.
    expected = [line["loss"] for line in two[3:]]
    assert [line["loss"] for line in metrics(tmp_path / "one")] == pytest.approx(expected, rel=1e-5)


def test_fillers_stay_out_of_the_routers_statistics(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]}
    path.write_text(json.dumps(chat) + "\n")
    data = Data(format="chat", path=(str(path),), tokenizer=TOKENIZER, num_workers=0)
    training = Training(steps=1, sequence_length=50, local_batch_size=2, global_batch_size=2)
    batch = next(TokenLoader(data, training, 0, 1, 0))
    num_real = int(batch.is_real.sum())
    assert 0 < num_real < 100
    config = ModelConfig.from_dict({**TINY_SHAPE, "vocab_size": 4096})
    model = Qwen35Moe(config, Kernels(attention="sdpa"))
    init_weights(model, 0)
    _, statistics, *_ = model(batch, measure_for(MoE(aux_loss_coef=0.1), batch.is_real))
    assert statistics.expert_counts.sum(dim=1).tolist() == [num_real * config.num_experts_per_tok] * 4
    # Probabilities sum to one for each token that counts.
    assert statistics.probability_sums.sum(dim=1).tolist() == pytest.approx([num_real] * 4, rel=1e-5)


def test_conversations_that_are_shipped_are_all_used():
    path = str(ROOT / "data" / "tiny" / "chat" / "conversations.jsonl")
    data = Data(format="chat", path=(path,), tokenizer=TOKENIZER, shuffle=False)
    samples = open_samples(data, load_tokenizer(TOKENIZER), 256, seed=0)
    assert samples.num_documents == len(Path(path).read_text().splitlines()) > 100
    for number, line in enumerate(Path(path).read_text().splitlines()):
        try:
            sample = samples.read(number)
        except BadSample as error:
            pytest.fail(str(error))
        trained = sample.labels[sample.labels >= 0]
        answers = [turn["content"] for turn in json.loads(line)["messages"] if turn["role"] == "assistant"
                   and turn.get("weight", 1)]  # fmt: skip
        assert load_tokenizer(TOKENIZER).decode(trained.tolist()) == "".join(f"{text}<|im_end|>" for text in answers)
