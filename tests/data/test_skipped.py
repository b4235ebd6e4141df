"""The list of skipped samples becomes a file of them, which can be mended and trained on."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from config.options import Training
from config.reading import load_config, resolved_toml
from data.loader import TokenLoader
from data.packing import BadSample
from data.skipped import write_skipped
from data.sources import open_sources
from errors import UserError
from tests.data.media_shapes import contents, encode, picture

ROOT = Path(__file__).resolve().parents[2]
TRAINING = Training(steps=1, sequence_length=64, global_batch_size=2)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def run(tmp_path):
    """A run that has met all of its data, good and bad, in files of several kinds."""
    good, long = chat("One?", "Two."), chat("word " * 100, "x")
    (tmp_path / "a: b,  line 3:\tc.jsonl").write_text(
        "".join(f"{line}\n" for line in (json.dumps(good), "{broken", json.dumps(long), "", json.dumps({"x": 1})))
    )
    (tmp_path / "b.json").write_text(json.dumps([good, 3, chat("Three?", 4)], indent=1))
    (tmp_path / "c.csv").write_text('prompt,completion\nQ,A\n"Q"x,A\nQ,A<|im_end|>\n')
    pyarrow.parquet.write_table(pa.Table.from_pylist([good, chat("Five?", "")]), tmp_path / "d.parquet")
    names = ["a: b,  line 3:\tc.jsonl", "b.json", "c.csv", "d.parquet"]
    paths = json.dumps([str(tmp_path / name) for name in names])
    options = ["--data.format=chat", "--data.num_workers=0", "--data.path", paths]
    config = load_config(["--config=qwen35moe_tiny.toml", *options])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(resolved_toml(config))
    skipped = tmp_path / "run" / "skipped"
    for rank in range(2):
        data = replace(config.data, shuffle=False)
        loader = TokenLoader(data, TRAINING, rank, 2, 0, one_epoch=True, skipped_dir=skipped)
        for _ in range(3):
            next(loader)
    return config, skipped


def test_each_is_written_with_its_fields_and_what_is_wrong(tmp_path, run):
    config, skipped = run
    told = write_skipped(config, skipped, tmp_path / "out.jsonl")
    assert told == f"{tmp_path / 'out.jsonl'}: 8 of 8 samples"
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    about = [each.pop("skipped") for each in written]
    assert [(each["where"].removeprefix(f"{tmp_path}/"), each["reason"]) for each in about] == [
        ("a: b, line 3: c.jsonl, line 2", "not_json"),
        ("a: b, line 3: c.jsonl, line 3", "too_long"),
        ("a: b, line 3: c.jsonl, line 5", "wrong_type"),
        ("b.json, line 14 (element 2)", "not_json"),
        ("b.json, line 15 (element 3)", "wrong_type"),
        ("c.csv, line 3", "not_csv"),
        ("c.csv, line 4", "special_token"),
        ("d.parquet, row 2", "empty"),
    ]
    assert about[2]["message"].startswith("data.messages_key = 'messages': expected one of x, or")
    assert written == [
        {"raw": "{broken\n"}, chat("word " * 100, "x"), {"x": 1}, {"raw": "3"}, chat("Three?", 4),
        {"raw": '"Q"x,A\n'}, {"prompt": "Q", "completion": "A<|im_end|>"}, chat("Five?", ""),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"OUT = '.*out\.jsonl': File exists: expected a new file"):
        write_skipped(config, skipped, tmp_path / "out.jsonl")


def written_again(tmp_path, record, suffix=".parquet"):
    """A record of a file, and the line that is written of it."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record) + "\n")
    config = load_config(["--config=qwen35moe_tiny.toml", "--data.format=chat", f"--data.path={path}"])
    (source,) = open_sources(config.data)
    note = {"sample": f"{source.where(0)}: is bad", "reason": "special_token"}
    (tmp_path / "rank-00000.jsonl").write_text(json.dumps(note) + "\n")
    write_skipped(config, tmp_path, tmp_path / "out.jsonl")
    return source[0], json.loads((tmp_path / "out.jsonl").read_text())


def test_the_note_of_a_second_round_takes_the_place_of_the_first(tmp_path):
    _, line = written_again(tmp_path, {**chat("Q", "A"), "skipped": {"where": "a", "reason": "empty"}}, ".jsonl")
    assert list(line) == ["skipped", "messages"]
    assert line["skipped"] == {
        "where": f"{tmp_path / 'a.jsonl'}, line 1", "reason": "special_token", "message": "is bad"
    }  # fmt: skip


def test_what_is_not_in_the_data_any_more_is_told(tmp_path, run):
    config, skipped = run
    (tmp_path / "c.csv").write_text("prompt,completion\nQ,A\n")
    told = write_skipped(config, skipped, tmp_path / "out.jsonl")
    assert "6 of 8 samples; 2 are not in the data any more, the first: " in told
    (skipped / "rank-00000.jsonl").write_text("3\n")
    with pytest.raises(UserError, match=r"rank-00000\.jsonl cannot be read"):
        write_skipped(config, skipped, tmp_path / "other.jsonl")


PNG = picture()


@pytest.mark.parametrize(
    ("shown", "fields"),
    [
        *(({"type": "image"}, fields) for fields in (
            {"images": [PNG]}, {"images": [{"bytes": PNG, "path": "gone.png"}]}, {"image": PNG},
            {"image": {"bytes": PNG}},
        )),
        *((part, {}) for part in (
            {"image": PNG}, {"image": {"bytes": PNG, "path": "gone.png"}}, {"bytes": PNG, "type": "image"},
            {"base64": PNG, "type": "image"}, {"image_url": {"url": PNG}}, {"video": [PNG, PNG]},
            {"video": [{"bytes": PNG}, {"bytes": PNG}]},
        )),
        ({"text": "no picture"}, {"image": b""}),
    ],
)  # fmt: skip
def test_pictures_in_a_table_can_be_read_again(tmp_path, shown, fields):
    answer = {"role": "assistant", "content": [{"text": "Noise."}]}
    record, line = written_again(tmp_path, {"messages": [{"role": "user", "content": [shown]}, answer], **fields})
    assert contents(encode(line)) == contents(encode(record))


def test_bytes_in_the_place_of_a_text_do_not_become_one(tmp_path):
    _, line = written_again(tmp_path, chat("Q", b"\xff\x00"))
    with pytest.raises(BadSample, match="content"):
        encode(line)


def test_the_command_and_the_mended_file(tmp_path, run):
    config, skipped = run
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "data.preview", "--skipped", str(skipped), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}: 8 of 8 samples\n"), done.stderr
    mended = [{**json.loads(line), **chat("One?", "Two.")} for line in out.read_text().splitlines()]
    out.write_text("".join(json.dumps({**each, "prompt": None}) + "\n" for each in mended))
    data = replace(config.data, path=(str(out),))
    loader = TokenLoader(data, TRAINING, 0, 1, 0, one_epoch=True)
    next(loader)
    assert not {reason for reason in loader.counts if not reason.endswith("tokens")}
    for folder, message in ((tmp_path / "none" / "skipped", "expected config.toml"), (tmp_path / "run", "config.toml")):
        command[4] = str(folder)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
