"""Precedence, the command line, one-line errors, the round trip through TOML."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from config.checks import check_config
from config.options import Model
from config.reading import ROOT, SECTIONS, load_config, model_config, resolved_toml
from errors import UserError
from tests.config.runs import MINIMAL, error_of, load, write_tokenizer

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


def test_epochs_and_steps_take_the_place_of_each_other(folder: Path) -> None:
    (folder / "child.toml").write_text('extends = "base.toml"\n[training]\nepochs = 1.5\n')
    training = load_config(["--config", "child.toml"]).training
    assert (training.steps, training.epochs) == (None, 1.5)
    training = load_config(["--config", "child.toml", "--training.steps=7"]).training
    assert (training.steps, training.epochs) == (7, None)
    stored = load("--training.epochs=3")
    (folder / "stored.toml").write_text(resolved_toml(stored))
    assert load_config(["--config", "stored.toml"]) == stored
    (folder / "both.toml").write_text('extends = "base.toml"\n[training]\nepochs = 1.5\nsteps = 7\n')
    assert "training.steps = 7 and training.epochs = 1.5" in error_of("--config", "both.toml")


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
    assert config.model == Model(path=str(directory))
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
    assert load_config(["--config", name]).parallelism.expert_parallel_degree == -1


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
    config = dataclasses.replace(config, validation=load("--validation.sets.a-B=text/a.jsonl").validation)
    (folder / "stored.toml").write_text(resolved_toml(config))
    monkeypatch.chdir("/")
    assert load_config(["--config", str(folder / "stored.toml")]) == config
    assert set(tomli.loads(resolved_toml(config))) == set(SECTIONS)


LAYERS = '["linear_attention", "full_attention", "linear_attention", "full_attention"]'


@settings(deadline=None)  # a machine in use is no fault
@given(
    text_key=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(1e-300),
)
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
        ("--zzz=3", "--zzz = '3' is unknown: expected one of config, job, model, data,"),
        ("--cofnig=x", "--cofnig = 'x' is unknown: did you mean config?"),
        (
            "--moe.capacity_factor=x",
            "--moe.capacity_factor = 'x' is unknown: expected one of aux_loss_coef, aux_loss_scope,",
        ),
        ("--metrics.interval=3", "did you mean metrics.log_interval?"),  # not another section's interval
        ("--validation.set=3", "did you mean validation.sets?"),
        ("--validation.sets.a b=x", "unknown: expected a name of 1 to 64 letters, digits, _ and -"),
        ("--model.config.rope_parameters.rope_thet=3", "did you mean model.config.rope_parameters.rope_theta?"),
        ("--model.config.rope_paramters.rope_theta=3", "did you mean model.config.rope_parameters.rope_theta?"),
        ("--traning={}", "--traning = '{}' is unknown: did you mean training?"),
        ("--compile.training={}", "did you mean training?"),
        (f"--training.steps={2**31}", "--training.steps = 2147483648: expected a positive integer below 2**31"),
        (f"--metrics.log_interval={10**4000}", "000: expected a positive integer below 2**31"),
        (f"--checkpoint.keep={10**30}", "expected an integer of at least 0, below 2**31"),
        ("--training.global_batch_size=2000000", "expected a positive integer of at most 2**20"),
        ("--data.num_workers=1000000", "--data.num_workers = 1000000: expected an integer from 0 to 1024"),
        ("--optimizer.lr=1e-3\nx = 3", "--optimizer.lr = '1e-3\\nx = 3': expected a positive number"),
        ("--data.zzz=3", "expected one of format, path, weights,"),
        ("--training.steps.x=3", "'3' is unknown: training.steps is no table, but a positive integer below 2**31"),
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
        ("--model.config.num_experts=0", "model.config: num_experts = 0 must be a positive integer"),
        ("--model.config.num_experts=1", "num_experts_per_tok = 2 must be at most num_experts = 1"),
        ("--model.config.rms_norm_eps=-1", "model.config: rms_norm_eps = -1.0 must be a positive number"),
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
        ("--lr_scheduler.decay_steps=3", "decay_steps = 3: expected 0 with lr_scheduler.decay = 'cosine'"),
        ("--lr_scheduler.decay=wsd", "decay_steps = 0: with decay = 'wsd' expected at least 1"),
        ("--data.path=[]", "data.path = []: expected at least one file or glob"),
        ("--data.path=text/a.jsonl,text/*.txt", "text/*.txt' matches no file"),
        ("--data.path=models", "models': expected a folder with files that end in .jsonl, "),
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


def test_a_micro_batch_whose_tokens_no_boundary_can_count() -> None:
    message = error_of("--training.sequence_length=1073741824", "--training.local_batch_size=2")
    assert "training.local_batch_size * sequence_length = 2147483648: expected less than 2**31 tokens" in message


def test_an_option_given_twice() -> None:
    assert "--training.steps = '4' is given a second time" in error_of("--training.steps", "3", "--training.steps", "4")


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[training]\nsteps = \n", "mistake.toml is not TOML: Invalid value (at line 2, column 9)"),
        ("[training]\nstpes = 3", "mistake.toml: training.stpes = 3 is unknown: did you mean training.steps?"),
        ("[trainin]\nsteps = 3", "mistake.toml: trainin = {'steps': 3} is unknown: did you mean training"),
        ("[training]\nsteps = '3'", "mistake.toml: training.steps = '3': expected a positive integer"),
        ('"a\\nb" = 3', "mistake.toml: a b = 3 is unknown: expected one of job, model"),
        ("[validation]\nsets = {'a b' = ['x']}", "sets.a b = ['x'] is unknown: expected a name of 1 to 64 letters,"),
        ("training = 3", "mistake.toml: training = 3: expected a table"),
        ("extends = 3", "extends = 3: expected a TOML file's path"),
        ("extends = 'none.toml'", "extends = 'none.toml': expected a TOML file's path, relative to this file"),
        ("extends = 'mistake.toml'", "is a cycle"),
        ("extends = 'base.toml'\n[data]\npath = [1]", "data.path = [1]: expected a list of any length, each a string"),
        ("extends = 'base.toml'\n[data]\npath = 1979-05-27", "expected a list"),
        ("[model]\npath = 'text'\nconfig = {num_experts = 4}", "model.config exclude each other"),
        ("", "mistake.toml: model.path = '' and model.config is empty: expected a Hugging Face directory or a table"),
        ("[training]\nsteps = 3", "mistake.toml: model.path = '' and model.config is empty"),
        (MINIMAL.replace("steps = 10", ""), "mistake.toml: training.steps is missing: expected a positive integer"),
        (
            MINIMAL.replace("[optimizer]\nlr = 1e-3", ""),
            "mistake.toml: optimizer.lr is missing: expected a positive number",
        ),
    ],
)
def test_a_mistake_in_a_file(toml: str, expected: str) -> None:
    assert expected in error_of(toml=toml)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ([], "model.path = '' and model.config is empty"),
        (["--model.path=hf"], "training.sequence_length is missing: expected a positive"),
        (
            ["--model.path=hf", "--optimizer.lr=1", "--training.sequence_length=8", "--training.global_batch_size=8"],
            "training.steps is missing: expected a positive",
        ),
    ],
)
def test_a_configuration_that_is_not_named(options: list[str], missing: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(options)
    assert str(caught.value).startswith("--config is missing: expected a file's path, or one of qwen35moe_100m.toml, ")
    assert f"; without it {missing}" in str(caught.value)


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text])
def test_files_that_windows_wrote(folder: Path, change: Callable[[str], str]) -> None:
    (folder / "windows.toml").write_bytes(change(MINIMAL).encode())
    assert load_config(["--config", "windows.toml"]) == load()


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


def test_model_path_and_options_of_model_config_contradict(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "with_path.toml").write_text(MINIMAL.replace("[model.config]", "[model]\npath = 'hf'\n[model.config]"))
    assert "exclude each other" in error_of("--config", "with_path.toml")
    message = error_of("--model.path=hf", "--model.config.num_experts=4")
    assert "model.path = 'hf' and model.config exclude each other: expected one of them" in message


# --help and documentation


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "/".join(["y" * 200] * 30), "\udcff"])
def test_what_no_system_takes_as_a_path(path: str) -> None:
    assert "expected a string that can be a path" in error_of(f"--data.tokenizer={path}")
    assert "job.output_dir = " in error_of(f"--job.output_dir={path}")
    assert "expected a string that can be a path" in error_of("--config", path)


def test_nesting_without_end(folder: Path) -> None:
    assert "is not TOML" in error_of(toml=MINIMAL + "x = " + "[" * 5000)
    assert "--optimizer.betas = '[[" in error_of(f"--optimizer.betas={'[' * 5000}")
