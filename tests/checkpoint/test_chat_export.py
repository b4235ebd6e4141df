"""A model fine-tuned on chats: its export answers and stops by itself."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.export import Options, export_to_hf
from tests.checkpoint.runs import ROOT, Run

QUESTION, ANSWER = "Who are you?", "I am Tiny."


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_generation_stops_at_the_end_of_a_trained_turn(chat_run: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    export_to_hf(chat_run, tmp_path / "hf", Options(dtype=dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == f"{ANSWER}<|im_end|>"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert tokenizer.eos_token == "<|endoftext|>"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == ends


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run that learned one answer."""
    folder = tmp_path_factory.mktemp("chat")
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    options = [
        "--data.format=chat",
        f"--data.path={folder / 'chats.jsonl'}",
        f"--data.tokenizer={ROOT / 'data/tiny/tokenizer'}",
        "--training.steps=60",
        "--optimizer.lr=1e-2",
        "--parallelism.expert_parallel_degree=1",
    ]
    Run(folder / "run", 1, *options).finish()
    return folder / "run"
