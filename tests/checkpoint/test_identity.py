"""A resume knows what it resumes: other data and another model are named, and new data can be asked for."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.identity import describe_run, difference
from config.options import Config, Data, Job
from errors import UserError
from tests.checkpoint import test_checkpointer
from tests.checkpoint.test_checkpointer import CONFIG, TOKENIZER, build, run_config
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision


def write_lines(path: Path, num: int, text: str = "a document") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps({"text": f"{text} {number:04}"}) + "\n" for number in range(num)))
    return path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a run whose checkpoint of step 2 lies in tmp_path/run."""
    data = Data(path=(str(write_lines(tmp_path / "data/a.jsonl", 40)),), tokenizer=str(TOKENIZER))
    config = dataclasses.replace(run_config(tmp_path / "run"), data=data)
    use(monkeypatch, config)
    checkpointer = build(str(tmp_path / "run"), 1, 1, seed=0)[2]
    checkpointer.save(2, 64, CURSORS)
    assert checkpointer.wait()
    return config


CURSORS = torch.tensor([[slot + 8, 0] for slot in range(4)])


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    def configured(folder: str, **checkpoint: object) -> Config:
        return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **checkpoint))

    monkeypatch.setattr(test_checkpointer, "run_config", configured)


def with_data(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def appended(config: Config) -> Config:
    write_lines(Path(config.data.path[0]), 53)
    return config


def of_the_same_size(config: Config) -> Config:
    write_lines(Path(config.data.path[0]), 40, "b document")
    return config


def another_source(config: Config) -> Config:
    more = write_lines(Path(config.data.path[0]).with_name("b.jsonl"), 5)
    return with_data(config, path=(*config.data.path, str(more)))


DATA = {
    "more lines": (appended, r"a\.jsonl in entry 1 .* bytes|entry 1 .*: .*40 documents.*53 documents"),
    "the same size": (of_the_same_size, r"a\.jsonl in entry 1 of data\.path"),
    "another source": (another_source, r"b\.jsonl in entry 2 .* absent when|entry 2 of data\.path"),
    "order": (lambda config: with_data(config, shuffle=False), "data.shuffle: true when it was saved, false now"),
    "weights": (lambda config: with_data(config, weights=(2.0,)), "data.weights"),
    "end of document": (lambda config: with_data(config, end_of_document=False), "data.end_of_document"),
    "seed": (lambda config: dataclasses.replace(config, job=Job(output_dir="x", seed=43)), "job.seed"),
    "row": (
        lambda config: dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=16)),
        "training.sequence_length: 8 when it was saved, 16 now",
    ),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", DATA)
def test_other_data_are_named_or_read_from_their_beginning(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, message = DATA[kind]
    run = str(tmp_path / "run/checkpoints/step-00000002")
    changed = dataclasses.replace(change(config), job=dataclasses.replace(change(config).job, output_dir=str(tmp_path)))
    use(monkeypatch, changed)
    with pytest.raises(UserError, match=message) as raised:
        build("", 1, 1, seed=1, resume=run)[2].resume()
    assert "checkpoint.data = 'from_start'" in str(raised.value)
    checkpointer = build("", 1, 1, seed=1, resume=run, data="from_start")[2]
    progress = checkpointer.resume()
    assert (progress.step, progress.tokens_seen, progress.data_cursors) == (2, 64, None)
    # What is saved from now on is of the new data, so the same command goes on in them.
    checkpointer.save(3, 96, CURSORS)
    assert checkpointer.wait()
    run = str(tmp_path / "checkpoints/step-00000003")
    assert torch.equal(build("", 1, 1, seed=1, resume=run, data="from_start")[2].resume().data_cursors, CURSORS)


@pytest.mark.usefixtures("one_rank")
def test_data_may_be_moved_and_read_by_other_workers(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    use(monkeypatch, with_data(config, path=(str(tmp_path / "moved/a.jsonl"),), num_workers=0, on_bad_sample="error"))
    assert torch.equal(build("", 1, 1, seed=1)[2].resume().data_cursors, CURSORS)


@pytest.mark.usefixtures("one_rank")
def test_another_model_of_the_same_tensors_is_named(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(CONFIG, num_experts_per_tok=CONFIG.num_experts_per_tok + 1)
    monkeypatch.setattr(test_checkpointer, "CONFIG", other)
    with pytest.raises(UserError, match=r"the model's num_experts_per_tok: .*checkpoint\.start_from"):
        build("", 1, 1, seed=1, data="from_start")[2].resume()


@pytest.mark.usefixtures("one_rank")
def test_fewer_steps_than_were_done(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1)))
    with pytest.raises(UserError, match=r"training\.steps = 1: .* is at step 2 already"):
        build("", 1, 1, seed=1)[2].resume()


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_without_a_record_resumes_with_a_line_in_the_log(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run/checkpoints/step-00000002"
    (path / "run.json").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["run.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING, "train"):
        assert torch.equal(build("", 1, 1, seed=1)[2].resume().data_cursors, CURSORS)
    assert any("cannot be compared" in record.message for record in caplog.records)


def test_a_record_names_no_folder(tmp_path: Path) -> None:
    data = Data(path=(str(write_lines(tmp_path / "data/a.jsonl", 4)),), tokenizer=str(TOKENIZER))
    record = describe_run(dataclasses.replace(run_config(tmp_path), data=data), CONFIG)
    assert str(tmp_path) not in json.dumps(record)
    assert record["sources"]["entry 1 of data.path"] == "JsonLines of 4 documents"


@pytest.mark.usefixtures("one_rank")
def test_the_model_is_told_by_keys_in_a_row(config: Config) -> None:
    text = tiny_config()
    values = text.to_dict()
    rope = values.pop("rope_parameters")
    expected = values | {f"rope_parameters.{key}": value for key, value in rope.items()}
    assert describe_run(config, text)["model"] == json.loads(json.dumps(expected))  # as ever: older files compare
    with_tower = describe_run(config, tiny_config(vision=tiny_vision()))
    assert with_tower["model"]["vision_config.rope_parameters.rope_theta"] == 1e4
    assert with_tower["model"]["text_config.rope_parameters.rope_theta"] == text.rope_theta
    assert difference(with_tower, with_tower, "model") is None
    deeper = describe_run(config, tiny_config(vision=tiny_vision(depth=3)))
    assert difference(with_tower, deeper, "model") == "vision_config.depth: 2 when it was saved, 3 now"
    assert difference(describe_run(config, text), with_tower, "model") is not None


@pytest.mark.usefixtures("one_rank")
def test_images_may_be_moved_but_not_made_smaller(config: Config, tmp_path: Path) -> None:
    """What decides how many tokens an image has is told as it is, whether options or the processor's files say it."""
    see, read = tiny_config(vision=tiny_vision()), tiny_config()
    before = describe_run(config, see)
    moved = with_data(config, image_folder=str(tmp_path))
    assert describe_run(moved, see) == before
    smaller = with_data(config, max_pixels=100_000)
    expected = "pixels.max_pixels: 16777216 when it was saved, 100000 now"
    assert difference(before, describe_run(smaller, see), "options") == expected
    assert difference(describe_run(config, read), describe_run(smaller, read), "options") is None
    same = with_data(config, max_pixels=16_777_216)
    assert describe_run(same, see) == before
    folder = tmp_path / "model"
    shutil.copytree(config.data.tokenizer, folder)
    values = {"max_pixels": 100_000, "patch_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    there = with_data(config, tokenizer=str(folder))
    assert difference(before, describe_run(there, see), "options") == expected
