"""config.py: precedence, the command line, one-line errors, round trip, --help, and that every field is read."""

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import config as config_module
from config import SECTIONS, Config, UserError, check_config, field_docs, load_config, model_config, resolved_toml

ROOT = Path(config_module.__file__).parent

MINIMAL = """
[job]
output_dir = "out"
[model.config]
num_hidden_layers = 4
vocab_size = 4096
num_experts = 8
num_experts_per_tok = 2
[data]
path = "text/*.jsonl"
tokenizer = "tokenizer"
[training]
steps = 10
sequence_length = 64
global_batch_size = 8
[optimizer]
lr = 1e-3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: base.toml (MINIMAL) and what it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(MINIMAL)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "a", "id": 3}\n')
    write_tokenizer(tmp_path / "tokenizer", {"a": 0, "b": 4094}, 4095)
    return tmp_path


def write_tokenizer(folder: Path, vocabulary: dict[str, int], added: int) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<|im_end|>": added}, []))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')


def load(*options: str) -> Config:
    return load_config(["--config", "base.toml", *options])


def error_of(*options: str, world_size: int = 2, toml: str | None = None) -> str:
    """The one line that a mistake gives."""
    if toml is not None:
        Path("mistake.toml").write_text(toml)
        options = ("--config", "mistake.toml", *options)
    elif "--config" not in options:
        options = ("--config", "base.toml", *options)
    with pytest.raises(UserError) as caught:
        check_config(load_config(list(options)), world_size)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# Precedence and merging


def test_defaults_then_base_then_file_then_command_line(folder: Path) -> None:
    (folder / "nested").mkdir()
    (folder / "nested" / "child.toml").write_text('extends = "../middle.toml"\n[training]\nsteps = 30\n')
    (folder / "middle.toml").write_text('extends = "base.toml"\n[training]\nsteps = 20\nlocal_batch_size = 2\n')
    config = load_config(["--config", "nested/child.toml", "--optimizer.lr=2e-3"])
    assert config.training == dataclasses.replace(load().training, steps=30, local_batch_size=2)
    assert config.optimizer == dataclasses.replace(load().optimizer, lr=2e-3)
    assert config.lr_scheduler.decay == "cosine"
    assert (
        load_config(["--config", "nested/child.toml", "--training.steps", "40", "--optimizer.lr=1"]).training.steps
        == 40
    )


def test_tables_merge_and_lists_replace(folder: Path) -> None:
    (folder / "child.toml").write_text(
        'extends = "base.toml"\n'
        "[model.config]\nnum_experts = 16\nrope_parameters = {rope_theta = 1e4}\n"
        '[data]\npath = ["text/a.jsonl"]\n'
    )
    config = load_config(["--config", "child.toml", "--model.config.rope_parameters.partial_rotary_factor=0.25"])
    assert config.model.config == {
        "num_hidden_layers": 4,
        "vocab_size": 4096,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    }
    assert config.data.path == (str(folder / "text/a.jsonl"),)
    assert model_config(config).rope_theta == 1e4


def test_a_later_model_path_takes_the_place_of_model_config(folder: Path) -> None:
    directory = folder / "hf"
    write_tokenizer(directory, {"a": 0}, 1)
    (directory / "config.json").write_text(json.dumps(model_config(load()).to_dict() | {"num_experts": 32}))
    config = load("--model.path", "hf", "--data.tokenizer=")
    assert config.model == config_module.Model(path=str(directory))
    assert config.data.tokenizer == str(directory)
    assert model_config(config).num_experts == 32
    check_config(config, 2)


@pytest.mark.parametrize(
    ("options", "section", "key", "value"),
    [
        (["--training.steps", "7"], "training", "steps", 7),
        (["--training.steps=7"], "training", "steps", 7),
        (["--optimizer.lr", "1"], "optimizer", "lr", 1.0),
        (["--training.max_grad_norm", "inf"], "training", "max_grad_norm", float("inf")),
        (["--parallelism.data_parallel_shard_degree", "-1"], "parallelism", "data_parallel_shard_degree", -1),
        (["--compile.enable"], "compile", "enable", True),
        (["--compile.enable", "--training.steps", "7"], "compile", "enable", True),
        (["--compile.enable", "true"], "compile", "enable", True),
        (["--data.shuffle=false"], "data", "shuffle", False),
        (["--data.path", '["/a,b", "/c"]'], "data", "path", ("/a,b", "/c")),
        (["--data.path", "/a,/c"], "data", "path", ("/a", "/c")),
        (["--data.path", "/a"], "data", "path", ("/a",)),
        (["--optimizer.betas", "0.8,0.9"], "optimizer", "betas", (0.8, 0.9)),
        (["--optimizer.betas=[0, 0.9]"], "optimizer", "betas", (0.0, 0.9)),
        (["--data.text_key", "3"], "data", "text_key", "3"),
        (["--data.text_key", "a=b"], "data", "text_key", "a=b"),
        (["--data.text_key=--"], "data", "text_key", "--"),
    ],
)
def test_command_line_values(options: list[str], section: str, key: str, value: object) -> None:
    found = getattr(getattr(load(*options), section), key)
    assert found == value
    assert type(found) is type(value)


def test_nested_tables_from_the_command_line() -> None:
    config = load("--model.config.num_experts", "4", "--model.config={moe_intermediate_size = 64}")
    assert config.model.config["num_experts"] == 4
    assert config.model.config["moe_intermediate_size"] == 64
    assert config.model.config["num_hidden_layers"] == 4


# Files and paths


@pytest.mark.parametrize("name", ["qwen35moe_tiny", "qwen35moe_tiny.toml", "train_configs/qwen35moe_tiny.toml"])
def test_shipped_configurations_are_found_from_any_directory(name: str) -> None:
    assert load_config(["--config", name]).parallelism.expert_parallel_degree == 2


def test_a_file_here_goes_before_a_shipped_one(folder: Path) -> None:
    (folder / "qwen35moe_tiny.toml").write_text(MINIMAL)
    assert load_config(["--config", "qwen35moe_tiny.toml"]).training.steps == 10


def test_paths_are_absolute_and_fall_back_to_the_repository(folder: Path) -> None:
    config = load("--data.path=text/*.jsonl,train_configs/*.toml,none", "--checkpoint.resume", "text")
    assert config.data.path == (f"{folder}/text/*.jsonl", f"{ROOT}/train_configs/*.toml", f"{folder}/none")
    assert config.job.output_dir == f"{folder}/out"
    assert config.checkpoint.resume == f"{folder}/text"
    assert load().checkpoint.resume == "auto"


def test_a_path_that_exists_is_no_glob(folder: Path) -> None:
    (folder / "text" / "[1].jsonl").write_text('{"text": "a"}')
    check_config(load("--data.path", "text/[1].jsonl"), 2)


def test_resolved_toml_loads_again_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("--optimizer.betas=0.5,0.6", "--training.max_grad_norm=inf", "--model.config.layer_types=" + LAYERS)
    (folder / "stored.toml").write_text(resolved_toml(config))
    monkeypatch.chdir("/")
    assert load_config(["--config", str(folder / "stored.toml")]) == config
    assert set(tomli.loads(resolved_toml(config))) == set(SECTIONS)


LAYERS = '["linear_attention", "full_attention", "linear_attention", "full_attention"]'


@given(text_key=st.text(st.characters(exclude_categories=["Cs"])), seed=st.integers(0, 2**63 - 1), lr=st.floats(1e-300))
def test_every_value_survives_the_round_trip(text_key: str, seed: int, lr: float) -> None:
    config = load(f"--data.text_key={text_key}", "--job.seed", str(seed))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=min(lr, 1e300)))
    Path("stored.toml").write_text(resolved_toml(config), encoding="utf-8")
    assert load_config(["--config", "stored.toml"]) == config


# Mistakes: options, then what is expected in the one line


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--training.stpes=3", "--training.stpes = '3' is unknown: did you mean training.steps?"),
        ("--trainin.steps=3", "--trainin.steps = '3' is unknown: did you mean training.steps?"),
        ("--training.lr=3", "--training.lr = '3' is unknown: did you mean optimizer.lr?"),
        ("--zzz=3", "--zzz = '3' is unknown: expected one of job, model, data,"),
        ("--data.zzz=3", "expected one of format, path, weights,"),
        ("--training.steps.x=3", "--training.steps.x = '3' is unknown"),
        ("--model.config.num_expert=3", "did you mean model.config.num_experts?"),
        ("--model.config={num_expert = 3}", "--model.config.num_expert = 3 is unknown: did you mean"),
        ("--training.steps", "--training.steps has no value: expected a positive integer"),
        ("--training.steps=", "--training.steps = '': expected a positive integer"),
        ("--training.steps=ten", "--training.steps = 'ten': expected a positive integer"),
        ("--training.steps=1.0", "--training.steps = 1.0: expected a positive integer"),
        ("--training.steps=true", "--training.steps = True: expected a positive integer"),
        ("--training.steps=-3", "--training.steps = -3: expected a positive integer"),
        ("--training=3", "--training = 3: expected a table"),
        ("--job.seed=-1", "--job.seed = -1: expected an integer from 0 to"),
        ("--job.deterministic=1", "--job.deterministic = 1: expected true or false"),
        ("--job.deterministic=True", "--job.deterministic = 'True': expected true or false"),
        ("--optimizer.lr=true", "--optimizer.lr = True: expected a positive number"),
        ("--optimizer.lr=nan", "--optimizer.lr = nan: expected a positive number"),
        ("--optimizer.lr=inf", "--optimizer.lr = inf: expected a positive number"),
        ("--optimizer.betas=0.9", "--optimizer.betas = [0.9]: expected a list of 2, each a number from 0 to below 1"),
        ("--optimizer.betas=0.9,1", "--optimizer.betas = [0.9, 1]: expected a list of 2"),
        ("--optimizer.weight_decay=-0.1", "--optimizer.weight_decay = -0.1: expected a number of at least 0"),
        ("--optimizer.name=adam", "--optimizer.name = 'adam': expected 'adamw'; did you mean 'adamw'?"),
        ("--lr_scheduler.decay=cosin", "'linear', 'wsd' or 'constant'; did you mean 'cosine'?"),
        ("--data.path=[text/*.jsonl]", "--data.path = '[text/*.jsonl]': expected a list of any length, each a string"),
        ("--parallelism.data_parallel_shard_degree=0", "expected a positive integer, or -1"),
        ("--config=other.toml", "--config = 'other.toml' is given a second time"),
        ("training.steps=3", "unexpected 'training.steps=3' on the command line: expected --section.key value"),
        ("-training.steps=3", "unexpected '-training.steps=3'"),
        ("--", "unexpected '--'"),
        ("--data.text_key=a\nb\x0cc", "--data.text_key"),
        ("--model.config.num_experts=0", "--model.config.num_experts = 0: expected a positive integer"),
        ("--model.config.num_experts=1", "num_experts_per_tok = 2 must be at most num_experts = 1"),
        ("--model.config.rms_norm_eps=-1", "--model.config.rms_norm_eps = -1: expected a positive number"),
        ("--model.config.hidden_act=gelu", "model.config: hidden_act = 'gelu'"),
        ("--model.config.rope_parameters=3", "--model.config.rope_parameters = 3: expected a table"),
        ("--model.config.rope_parameters.rope_type=yarn", "rope_type = 'yarn' is not supported"),
        ("--model.path=text", "text': expected a directory with a config.json"),
        ("--model.path=none", "none': expected a directory with a config.json"),
        ("--parallelism.data_parallel_replicate_degree=4", "expected a product of 2, the number of processes"),
        ("--parallelism.data_parallel_shard_degree=4", "expected a product of 2, the number of processes"),
        (
            "--parallelism.expert_parallel_degree=4",
            "expert_parallel_degree = 4: expected a divisor of the shard degree 2",
        ),
        ("--lr_scheduler.warmup_steps=11", "warmup_steps = 11: expected at most training.steps = 10"),
        ("--lr_scheduler.decay_steps=3", "decay_steps = 3: expected 0 with lr_scheduler.decay = 'cosine'"),
        ("--lr_scheduler.decay=wsd", "decay_steps = 0: with decay = 'wsd' expected 1 to training.steps"),
        ("--data.path=[]", "data.path = []: expected at least one file or glob"),
        ("--data.path=text/a.jsonl,text/*.txt", "text/*.txt' matches no file"),
        ("--data.path=text", "text' matches no file"),
        (
            "--data.tokenizer=",
            "data.tokenizer = '': expected a directory with tokenizer.json, as there is no model.path",
        ),
        ("--data.tokenizer=text", "text': expected a directory with tokenizer.json"),
        ("--model.config.vocab_size=4095", "has token 4095, expected all below the model's vocab_size = 4095"),
        ("--checkpoint.resume=latest", "latest': expected 'auto', 'never' or a directory"),
        ("--checkpoint.start_from=none", "none': expected a directory"),
        ("--model.initial_load=hf", "initial_load = 'hf': expected model.path = '' to hold safetensors files"),
        ("--checkpoint.export_hf=yes", "expected 'never', 'last' or 'all'"),
        ("--job.output_dir=text/a.jsonl/run", "expected a folder"),
        ("--job.output_dir=", "--job.output_dir = '': expected a folder"),
        (f"--optimizer.lr=1{'0' * 400}", "expected a positive number"),
    ],
)
def test_a_mistake_on_the_command_line(option: str, expected: str) -> None:
    if option == "--data.text_key=a\nb\x0cc":  # a line break in a value does not break the line
        assert "a\\nb\\x0cc" in error_of(option, option)
    else:
        assert expected in error_of(option)


def test_an_option_given_twice() -> None:
    assert "--training.steps = '4' is given a second time" in error_of("--training.steps", "3", "--training.steps", "4")


def test_experts_over_more_processes_than_divide_them() -> None:
    options = ("--model.config.num_experts=6", "--parallelism.expert_parallel_degree=4")
    assert "= 4: expected a divisor of the model's num_experts = 6" in error_of(*options, world_size=4)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("moe_intermediate_size", 33, "does not divide the model's 2 * moe_intermediate_size = 66"),
        ("hidden_size", 2046, "does not divide the model's hidden_size = 2046"),
    ],
)
def test_experts_that_fsdp_cannot_cut_evenly(key: str, value: int, expected: str) -> None:
    option = f"--model.config.{key}={value}"
    batch = "--training.global_batch_size=8"
    assert expected in error_of(option, batch, "--parallelism.expert_parallel_degree=2", world_size=8)
    check_config(
        load(option, batch), 8
    )  # without expert parallelism they are cut between experts, as evenly as it goes


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[training]\nsteps = \n", "mistake.toml is not TOML: Invalid value (at line 2, column 9)"),
        ("[training]\nstpes = 3", "mistake.toml: training.stpes = 3 is unknown: did you mean training.steps?"),
        ("[trainin]\nsteps = 3", "mistake.toml: trainin = {'steps': 3} is unknown: did you mean training"),
        ("[training]\nsteps = '3'", "mistake.toml: training.steps = '3': expected a positive integer"),
        ('"a\\nb" = 3', "mistake.toml: a b = 3 is unknown: expected one of job, model"),
        ("training = 3", "mistake.toml: training = 3: expected a table"),
        ("extends = 3", "extends = 3: expected a TOML file's path"),
        ("extends = 'none.toml'", "extends = 'none.toml': expected a TOML file's path, relative to this file"),
        ("extends = 'mistake.toml'", "is a cycle"),
        ("extends = 'base.toml'\n[data]\npath = [1]", "data.path = [1]: expected a list of any length, each a string"),
        ("extends = 'base.toml'\n[data]\npath = 1979-05-27", "expected a list"),
        ("[model]\npath = 'text'\nconfig = {num_experts = 4}", "model.config exclude each other"),
        ("[training]\nsteps = 3", "model.path = '' and model.config is empty"),
        (MINIMAL.replace("steps = 10", ""), "training.steps is missing: expected a positive integer"),
        (MINIMAL.replace("[optimizer]\nlr = 1e-3", ""), "optimizer.lr is missing: expected a positive number"),
    ],
)
def test_a_mistake_in_a_file(toml: str, expected: str) -> None:
    assert expected in error_of(toml=toml)


def test_what_a_run_starts_from_is_one_thing(folder: Path) -> None:
    start = ["--config", "base.toml", "--checkpoint.start_from=text"]
    assert "start_from and checkpoint.resume = " in error_of(*start, "--checkpoint.resume=text")
    assert "exclude each other" in error_of(*start, "--model.initial_load=hf")


def test_a_key_that_is_a_keyword_of_python(folder: Path) -> None:
    config = load("--checkpoint.async", "false")
    assert config.checkpoint.async_ is False
    assert "async = false" in resolved_toml(config)
    assert "--checkpoint.async_ = 'false' is unknown: did you mean checkpoint.async?" in error_of(
        "--config", "base.toml", "--checkpoint.async_=false"
    )


def test_a_cycle_of_two(folder: Path) -> None:
    (folder / "a.toml").write_text('extends = "b.toml"')
    (folder / "b.toml").write_text('extends = "a.toml"')
    message = error_of("--config", "a.toml")
    assert "b.toml: extends" in message
    assert "is a cycle" in message


def test_files_that_are_no_text(folder: Path) -> None:
    (folder / "binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml is not TOML" in error_of("--config", "binary.toml")
    assert "'text' does not exist: expected a file's path, or one of" in error_of("--config", "text")
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


def test_model_path_and_options_of_model_config_contradict(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "with_path.toml").write_text(MINIMAL.replace("[model.config]", "[model]\npath = 'hf'\n[model.config]"))
    assert "exclude each other" in error_of("--config", "with_path.toml")
    message = error_of("--model.path=hf", "--model.config.num_experts=4")
    assert "model.path = 'hf' and model.config exclude each other: expected one of them" in message


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
    code = "import sys, config; status = config.main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(status)"

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    assert run("--world-size", "2", "--config", "base.toml") == (0, "False\n", "")
    wrong = "--training.steps = 0: expected a positive integer\n"
    assert run("--world-size", "2", "--config", "base.toml", "--training.steps=0") == (2, "False\n", wrong)
    assert run("--config", "base.toml")[0] == 2


# --help and documentation


def test_help_lists_every_key_with_type_default_and_docstring(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--config", "none", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, cls in SECTIONS.items():
        assert f"[{section}] {inspect.getdoc(cls)}" in text
        for field in dataclasses.fields(cls):
            doc = " ".join(field_docs(cls)[field.name].split())
            assert doc.endswith((".", "?")), f"{section}.{field.name}"
            start = text.index(f"--{section}.{field.name.rstrip('_')}: ")
            assert doc in text[start : start + len(doc) + 250]
    assert "--optimizer.betas: a list of 2, each a number from 0 to below 1; default [0.9, 0.95]" in text
    assert "--optimizer.lr: a positive number; required" in text
    assert "--data.end_of_document: true or false; default true" in text


# A field that nothing reads is a lie to the user


def read_fields(sources: dict[str, str], sections: dict[str, type]) -> set[tuple[str, str]]:
    """The (section, key) pairs that the sources read from a configuration.

    Understood: `<anything>.section.key`; a variable or attribute assigned from `<anything>.section`, also by unpacking;
    a parameter annotated with a section's class that is imported from config; and `asdict(<anything>.section)`, for
    those keys that some source takes by name, as in `d["key"]` or `d.get("key")`.
    """
    names_of_class = {cls.__name__: name for name, cls in sections.items()}
    found: set[tuple[str, str]] = set()
    in_bulk: set[str] = set()  # sections turned into a dict
    by_name: set[str] = set()
    for source in sources.values():
        tree = ast.parse(source)
        imported = {
            alias.asname or alias.name: names_of_class[alias.name]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "config"
            for alias in node.names
            if alias.name in names_of_class
        }
        holders: dict[str, set[str]] = {}  # source text of a variable or attribute -> sections it may hold

        def sections_of(node: ast.expr, holders: dict[str, set[str]] = holders) -> set[str]:
            direct = {node.attr} if isinstance(node, ast.Attribute) and node.attr in sections else set()
            return direct | holders.get(ast.unparse(node), set())

        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation is not None:
                annotation = node.annotation
                name = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
                if name in imported:
                    holders.setdefault(node.arg, set()).add(imported[name])
        for _ in range(3):  # holders assigned from holders
            for node in ast.walk(tree):
                for target, value in assignments(node):
                    holders.setdefault(ast.unparse(target), set()).update(sections_of(value))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found |= {(section, node.attr) for section in sections_of(node.value)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "asdict":
                in_bulk |= set().union(*map(sections_of, node.args))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                by_name |= {str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)}
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                by_name.add(str(node.slice.value))
    return found | {(section, key) for section in in_bulk for key in by_name}


def assignments(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, with tuples taken apart."""
    if isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        return [(node.target, node.value)]
    pairs = []
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += list(zip(target.elts, node.value.elts))
        else:
            pairs.append((target, node.value))
    return pairs


def dead_fields(sources: dict[str, str], sections: dict[str, type]) -> set[str]:
    declared = {(section, field.name) for section, cls in sections.items() for field in dataclasses.fields(cls)}
    return {f"{section}.{key}" for section, key in declared - read_fields(sources, sections)}


def test_every_field_is_read() -> None:
    """config.py itself checks most fields, which is no use of them: only what it offers to the others counts."""
    folders = [ROOT / name for name in ("models", "parallelisms", "checkpoint", "data", "training")]
    paths = [ROOT / "train.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    sources = {str(path): path.read_text() for path in paths if path.exists()}
    sources["model_config"] = inspect.getsource(model_config)
    dead = dead_fields(sources, SECTIONS)
    if "shard_degree(" in sources[str(ROOT / "train.py")]:
        dead -= {"parallelism.data_parallel_shard_degree"}  # Parallelism.shard_degree() is how it is read
    assert not dead, f"nothing reads {sorted(dead)}: remove the keys, or put them to work"


def test_a_dead_field_is_found() -> None:
    @dataclasses.dataclass
    class Training:
        direct: int = 0
        local: int = 0
        unpacked: int = 0
        annotated: int = 0
        attribute: int = 0
        dead: int = 0
        written: int = 0
        other_section: int = 0
        other_class: int = 0

    @dataclasses.dataclass
    class Kernels:
        attention: str = ""
        conv: str = ""
        dead: str = ""

    source = """
from config import Config, Training as Settings
def main(config: Config, optimizer: torch.optim.Training):
    config.training.direct
    training = config.training
    again = training
    again.local
    seed, (a) = 3, config.training
    a.unpacked
    config.training.written = 3
    config.other.other_section
    optimizer.other_class
    select(dataclasses.asdict(config.kernels), requested["attention"], requested.get("conv", "auto"))
    "config.training.dead"  # config.training.dead
    dead = other.dead
class Loader:
    def __init__(self, settings: "Settings"):
        self.settings = settings
        settings.annotated
    def get(self):
        return self.settings.attribute
"""
    dead = dead_fields({"source": source}, {"training": Training, "kernels": Kernels})
    assert dead == {
        "training.dead",
        "training.written",
        "training.other_section",
        "training.other_class",
        "kernels.dead",
    }
