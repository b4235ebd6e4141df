"""What is refused before a run: kernels, data, paths; and the command that run_train.sh runs first."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models

from config.checks import check_config
from config.reading import ROOT, load_config, model_config, resolved_toml
from errors import UserError
from tests.config.runs import error_of, load


def test_what_a_run_starts_from_is_one_thing(folder: Path) -> None:
    start = ["--config", "base.toml", "--checkpoint.start_from=text"]
    assert "start_from and checkpoint.resume = " in error_of(*start, "--checkpoint.resume=text")
    assert "exclude each other" in error_of(*start, "--model.initial_load=hf")


@pytest.mark.parametrize("key", ["resume", "start_from"])
def test_a_folder_that_is_no_checkpoint(folder: Path, key: str) -> None:
    option = f"--checkpoint.{key}=text"
    assert f"checkpoint.{key} = {folder}/text: expected a checkpoint, or a run's output_dir with a" in error_of(option)
    (folder / "text" / "checkpoints" / "step-00000003").mkdir(parents=True)
    check_config(load(option), 2)
    check_config(load(f"{option}/checkpoints/../"), 2)
    (folder / "plain").mkdir()
    (folder / "plain" / ".metadata").touch()
    check_config(load(f"--checkpoint.{key}=plain"), 2)


def test_a_fresh_run_in_a_folder_with_checkpoints(folder: Path) -> None:
    check_config(load("--checkpoint.resume=never"), 2)
    (folder / "out" / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert error_of("--checkpoint.resume=never") == (
        f"checkpoint.resume = 'never': '{folder}/out/checkpoints' holds step-00000003 of an earlier run: expected "
        "another job.output_dir"
    )


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    for path in ("/proc/none", "/proc/none/run", f"{folder}/base.toml/run", f"{folder}/lost", f"{folder}/lost/run"):
        Path("lost").unlink(missing_ok=True)
        Path("lost").symlink_to("none")
        expected = rf"job.output_dir = '{path}': .*: expected a folder that can be written in '"
        assert re.fullmatch(f"{expected}.*'", error_of(f"--job.output_dir={path}"))
    before = sorted(folder.rglob("*"))
    check_config(load("--job.output_dir=a/b"), 2)
    assert sorted(folder.rglob("*")) == before  # the check leaves nothing behind


def test_weights_of_another_format(folder: Path) -> None:
    model = ["--model.initial_load=hf", "--model.path=text"]
    (folder / "text/config.json").write_text(json.dumps(model_config(load()).to_dict()))
    base = (folder / "base.toml").read_text()
    (folder / "base.toml").write_text("[data]" + base.partition("[data]")[2] + '[job]\noutput_dir = "out"\n')
    assert error_of(*model).endswith("to hold safetensors files")
    (folder / "text/pytorch_model.bin").touch()
    assert error_of(*model).endswith("to hold safetensors files; pytorch_model.bin is there and is not read")


def test_multi_token_prediction(folder: Path) -> None:
    assert [model_config(load(f"--mtp.train={train}")).mtp_num_hidden_layers for train in ("off", "head", "joint")] == [
        0,
        1,
        1,
    ]
    frozen = error_of("--mtp.train=head", "--model.freeze=mtp")
    assert frozen == (
        "model.freeze = ['mtp']: with mtp.train = 'head' nothing is left to train: expected it without 'mtp'"
    )
    assert "no part 'mtp' (mtp.train = 'off')" in error_of("--model.freeze=mtp")
    check_config(load("--mtp.train=joint", "--model.freeze=mtp,head"), 2)
    assert error_of("--mtp.train=joint", "--lora.rank=8") == (
        "mtp.train = 'joint': lora.rank = 8 trains adapters alone: expected 'off'"
    )
    assert "mtp.train" in error_of("--mtp.train=both")
    assert "mtp.loss_weight" in error_of("--mtp.loss_weight=0")
    assert "model.config.mtp_num_hidden_layers" in error_of("--model.config.mtp_num_hidden_layers=1")
    (folder / "model").mkdir()
    shape = model_config(load()).to_dict() | {"mtp_num_hidden_layers": 2}
    (folder / "model/config.json").write_text(json.dumps(shape))
    paths = ("--model.path=model", "--data.tokenizer=tokenizer")
    assert model_config(load(*paths)).mtp_num_hidden_layers == 0
    assert "mtp_num_hidden_layers = 2 cannot be trained: expected 1, or mtp.train = 'off'" in error_of(
        *paths, "--mtp.train=head"
    )


def test_files_that_are_no_text(folder: Path) -> None:
    (folder / "binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml is not TOML" in error_of("--config", "binary.toml")
    assert "'none' does not exist: expected a file's path, or one of" in error_of("--config", "none")
    assert "'text' is a folder: expected a file's path, or one of" in error_of("--config", "text")
    os.mkfifo("pipe")
    for name in ("pipe", "/dev/null"):
        assert f"'{name}' is a pipe or a device, and each process of a run has to read it" in error_of("--config", name)
    (folder / "tokenizer" / "tokenizer.json").write_text("[]")
    assert "tokenizer.json cannot be read: " in error_of()


def test_text_that_cannot_be_read(folder: Path) -> None:
    assert "data.text_key = 'txt' is missing among text, id: expected a string" in error_of("--data.text_key=txt")
    (folder / "a.md").write_text("a")
    assert "a.md' ends in '.md': expected .jsonl, .jsonl.gz," in error_of("--data.path=text/a.jsonl,a.md")
    (folder / "text" / "a.jsonl").write_text("[3]")
    assert "a.jsonl, line 1: is [3], expected a JSON object (and none of the first 1 samples" in error_of()
    (folder / "a.txt").write_text("a")
    check_config(load("--data.path=a.txt"), 2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "a.parquet")
    check_config(load("--data.path=a.parquet"), 2)
    assert "data.text_key = 'id': expected one of text, as in" in error_of(
        "--data.path=a.parquet", "--data.text_key=id"
    )
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    assert "a.parquet cannot be read: " in error_of("--data.path=a.parquet")


def test_conversations_that_cannot_be_read(folder: Path) -> None:
    chat = "--data.format=chat"
    assert "expected one with a chat template" in error_of(chat)
    tiny = f"--data.tokenizer={ROOT}/data/tiny/tokenizer"
    assert "data.messages_key = 'messages': expected one of text, id" in error_of(chat, tiny)
    (folder / "a.txt").write_text("a")
    assert "'chat': expected conversations, not text files" in error_of(chat, "--data.path=a.txt")
    (folder / "text" / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    check_config(load(chat, tiny), 2)


def test_weights_of_sources(folder: Path) -> None:
    assert "data.weights = [1.0, 2.0]: expected 1, one for each of data.path" in error_of("--data.weights=1,2")
    two = "--data.path=text/a.jsonl,text/*.jsonl"
    assert "expected none below a thousandth of their sum" in error_of(two, "--data.weights=1,0.0001")
    assert "expected a list of any length, each a positive number" in error_of(two, "--data.weights=1,0")
    check_config(load(two, "--data.weights=1,0.1"), 2)


def test_validation_data(folder: Path) -> None:
    assert "validation.path = []: expected at least one file" in error_of("--validation.enable")
    assert "validation.path = '" in error_of("--validation.enable", "--validation.path=none.jsonl")
    check_config(load("--validation.enable", "--validation.path=text/a.jsonl"), 2)
    on, sets = "--validation.enable", "--validation.sets.code=text/a.jsonl"
    check_config(load(on, "--validation.share=0.1", sets), 2)
    check_config(load(on, sets), 2)
    both = error_of(on, "--validation.share=0.1", "--validation.path=text/a.jsonl")
    assert "validation.share = 0.1 and validation.path = [" in both
    assert "expected one of them" in both
    assert "--validation.share = 1: expected a number from 0 to below 1" in error_of("--validation.share=1")
    assert "validation.sets.code = '" in error_of(on, "--validation.sets.code=none.jsonl")
    assert "--validation.sets.a/b = 'x' is unknown" in error_of("--validation.sets.a/b=x")
    assert "--validation.sets = 3: expected a table" in error_of("--validation.sets=3")
    assert "--validation.sets.code = [3]: expected a list" in error_of("--validation.sets.code=[3]")


def test_epochs_and_what_they_exclude(folder: Path) -> None:
    check_config(load("--training.epochs=2"), 2)
    two = "--data.path=text/a.jsonl,text/*.jsonl"
    weights = error_of("--training.epochs=2", two, "--data.weights=1,2")
    assert "training.epochs = 2.0 and data.weights: each entry has epochs of its own" in weights
    assert "training.steps = 3 and training.epochs = 2.0: expected one" in error_of(
        "--training.epochs=2", "--training.steps=3"
    )
    for value in ("0", "-1", "nan", "inf", "1001", "two"):
        assert "expected a positive number of at most 1000" in error_of(f"--training.epochs={value}")


def test_wandb_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "metrics.wandb = true: the package wandb is missing" in error_of("--metrics.wandb")
    assert "--metrics.wandb_project = '': expected a name" in error_of("--metrics.wandb_project=")


@pytest.mark.parametrize("marker", ["dataset_info.json", "dataset_dict.json", "tokens.json"])
def test_folders_and_names_of_datasets(folder: Path, marker: str) -> None:
    (folder / "saved").mkdir()
    (folder / "saved" / marker).write_text("{}")
    config = load("--data.path=saved,owner/name:part,text/a.jsonl")
    assert config.data.path == (f"{folder}/saved", "owner/name:part", f"{folder}/text/a.jsonl")
    assert "saved" in error_of("--data.path=saved,text/a.jsonl")  # it is a folder of theirs, but an empty one
    check_config(load("--data.path=owner/name:part,text/a.jsonl"), 2)  # the Hub is not asked


def test_a_tokenizer_without_an_end_token(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert "data.end_of_document = True: expected an eos_token in" in error_of()
    check_config(load("--data.end_of_document=false"), 2)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert "expected a directory with tokenizer_config.json" in error_of()


def test_a_tokenizer_without_a_vocabulary(folder: Path) -> None:
    Tokenizer(models.BPE({}, [])).save(str(folder / "tokenizer" / "tokenizer.json"))
    assert "expected a tokenizer with a vocabulary" in error_of()


def test_kernels_that_this_machine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for choice in ("varlen", "fa4"):
        assert f"kernels.attention = '{choice}' needs a CUDA GPU" in error_of(f"--kernels.attention={choice}")
    check_config(load("--kernels.attention=sdpa"), 2)


@pytest.mark.parametrize(
    "contents",
    [
        "[]",
        "{",
        '{"text_config": 3}',
        '{"rope_parameters": 3}',
        '{"model_type": "llama"}',
        '{"full_attention_interval": 0}',
        '{"rms_norm_eps": -1}',
        '{"rope_parameters": {"rope_theta": "x"}}',
        '{"num_experts": true}',
    ],
)
def test_an_unusable_config_json(folder: Path, contents: str) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(contents)
    assert f"model.path = '{folder}/hf'" in error_of("--model.path=hf")


def test_bare_command_line_ends_in_one_line() -> None:
    """The command that run_train.sh runs first, and that it does not import torch."""
    code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    code += "runpy.run_module('config.checks', run_name='__main__')"

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    assert run("--world-size", "2", "--config", "base.toml") == (0, "False\n", "")
    wrong = "--training.steps = 0: expected a positive integer below 2**31\n"
    assert run("--world-size", "2", "--config", "base.toml", "--training.steps=0") == (2, "False\n", wrong)
    assert run("--config", "base.toml")[0] == 2


@pytest.mark.parametrize(
    "options", [("--lr_scheduler.warmup_steps=11",), ("--lr_scheduler.decay=wsd", "--lr_scheduler.decay_steps=11")]
)
def test_a_short_first_try_is_no_mistake(options: tuple[str, ...]) -> None:
    check_config(load(*options), 2)


TOWER = "--model.config={vision_config = {depth = 1}, image_token_id = 1, video_token_id = 2, "
TOWER += "vision_start_token_id = 3, vision_end_token_id = 4}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model.freeze=vison",), "--model.freeze = ['vison']: expected a list of some of text, vision, merger,"),
        (("--model.freeze=[3]",), "expected a list of some of text, vision, merger,"),
        (
            ("--optimizer.state_dtype=float32", "--training.master_dtype=bfloat16"),
            "expected 'auto' with training.master",
        ),
        (
            ("--optimizer.state_dtype=bfloat16", "--optimizer.betas=[0.9, 0.999]"),
            "optimizer.betas = [0.9, 0.999]: with optimizer.state_dtype = 'bfloat16' expected at most 0.99",
        ),
        (("--optimizer.state_dtype=float16",), "optimizer.state_dtype = 'float16'"),
        (("--model.freeze=vision",), "model.freeze = ['vision']: the model has no part 'vision'"),
        (("--model.freeze=text",), "model.freeze = ['text']: nothing is left to train"),
        ((TOWER, "--model.freeze=text,vision,merger"), "nothing is left to train"),
        (("--optimizer.merger_lr_ratio=0.5",), "optimizer.merger_lr_ratio = 0.5: the model has no tower: expected 1.0"),
        (("--optimizer.vision_lr_ratio=2",), "optimizer.vision_lr_ratio = 2.0: the model has no tower: expected 1.0"),
        (("--optimizer.vision_lr_ratio=0",), "optimizer.vision_lr_ratio = 0: expected a positive number"),
    ],
)
def test_what_trains(folder: Path, options: tuple[str, ...], expected: str) -> None:
    assert expected in error_of(*options)
    options = ["--model.freeze=text,vision", "--optimizer.merger_lr_ratio=0.5", f"--job.output_dir={folder}/run"]
    check_config(load_config(["--config", "qwen35moe_vision_tiny.toml", *options]), 2)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.config.vision_config.dept=3", "is unknown: did you mean model.config.vision_config.depth?"),
        ("--model.config.image_token=3", "is unknown: did you mean model.config.image_token_id?"),
        ("--model.config.vision=3", "--model.config.vision = '3' is unknown"),
        ("--model.config.vision_config=3", "--model.config.vision_config = 3: expected a table"),
        ("--model.config.vision_config.depth=1.5", "vision_config.depth = 1.5: expected an integer"),
        ("--model.config.vision_config.depth=0", "model.config: vision_config.depth = 0 must be"),
        (
            "--model.config.vision_config.out_hidden_size=7",
            "model.config: vision_config.out_hidden_size = 7 must be hid",
        ),
        ("--model.config.vision_config.hidden_act=gelu", "model.config: vision_config.hidden_act = 'gelu' is not supp"),
        ("--model.config.video_token_id=99999", "up to 99999, must be below vocab_size = 4096"),
        ("--model.config.vision_config.rope_parameters.rope_type=yarn", "rope_type = 'yarn' is not supported"),
    ],
)
def test_a_tower_in_the_inline_table(folder: Path, option: str, expected: str) -> None:
    (folder / "tower.toml").write_text(
        'extends = "base.toml"\n[model.config]\nimage_token_id = 1\nvideo_token_id = 2\nvision_start_token_id = 3\n'
        "vision_end_token_id = 4\n[model.config.vision_config]\ndepth = 1\n"
    )
    config = load_config(["--config", "tower.toml"])
    shape = model_config(config)
    assert shape.vision is not None
    assert (shape.vision.depth, shape.vision.out_hidden_size, shape.vision.video_token_id) == (1, shape.hidden_size, 2)
    (folder / "resolved.toml").write_text(resolved_toml(config))
    assert load_config(["--config", "resolved.toml"]) == config
    assert expected in error_of("--config", "tower.toml", option)


LORA = ("--lora.rank=8", "--checkpoint.enable=false")
EXPERTS = "--lora.targets=experts,attention"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((*LORA[:1],), "model.initial_load = 'none': lora.rank = 8 saves adapters alone, and refers to the weights"),
        ((*LORA, "--lora.rank=-1"), "lora.rank = -1: expected an integer of at least 0"),
        ((*LORA, "--lora.rank=100000"), "lora.rank = 100000: expected at most the model's hidden_size = "),
        ((*LORA, "--lora.alpha=0"), "lora.alpha = 0: expected a positive number"),
        (
            (*LORA, "--lora.targets=experts,norms"),
            "expected a list of some of attention, linear_attention, shared_expert",
        ),
        ((*LORA, "--lora.targets=head,head"), "lora.targets = ['head', 'head']: expected a list of some of"),
        (
            ("--lora.rank=4", "--checkpoint.enable=false", EXPERTS),
            "lora.rank = 4: expected a multiple of 8 with 'experts'",
        ),
        (
            (*LORA, "--model.config.tie_word_embeddings=true", "--lora.targets=head"),
            "the model has no part 'head': its head is its embeddings: expected some of attention, linear_",
        ),
        ((*LORA, "--model.freeze=router"), "model.freeze = ['router']: lora.rank = 8 freezes all weights already"),
        ((*LORA, "--optimizer.merger_lr_ratio=0.5"), "optimizer.merger_lr_ratio = 0.5: "),
        ((*LORA, "--lora.dropout=0.1"), "lora.dropout"),
    ],
)
def test_adapters_that_cannot_be(folder: Path, options: tuple[str, ...], expected: str) -> None:
    options = tuple({option.partition("=")[0]: option for option in options}.values())
    assert expected in error_of(*options)


def test_adapters_of_experts_on_degrees_that_do_not_divide_them(folder: Path) -> None:
    options = (*LORA, EXPERTS, "--parallelism.expert_parallel_degree=2", "--model.config.moe_intermediate_size=6")
    with pytest.raises(UserError, match="shard degree 8 / 2 = 4 does not divide the model's moe_intermediate_size = 6"):
        check_config(load(*options), 8)
    check_config(load(*options), 4)
    check_config(load(*LORA), 2)
