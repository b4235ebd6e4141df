"""Folders: which files belong to the split, by a README as on the Hub or by their names; nothing is guessed."""

import gzip
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet
import pytest

from checkpoint.identity import describe_run
from config.options import Data
from config.reading import load_config, model_config
from data.files import find_files, is_dataset
from data.folders import folder_of
from data.sources import open_sources
from errors import UserError


def make(folder, *names, readme=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    if readme is not None:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A data set\n")
    return str(folder)


def texts_of(entry, split="train"):
    (source,) = open_sources(Data(path=(entry,), split=split))
    return [source[index]["text"] for index in range(len(source))]


def test_a_folder_is_its_files_at_any_depth(tmp_path):
    names = ("a.jsonl", "deep/er/b.jsonl", "deep/c.json")
    folder = make(tmp_path, *names, ".git/x.jsonl", ".hidden.jsonl", "LICENSE", "README.md", "dataset_infos.json")
    assert texts_of(folder) == ["a.jsonl", "deep/c.json", "deep/er/b.jsonl"]
    assert texts_of(folder + "/") == texts_of(folder)


def test_what_lies_behind_links_is_read_once(tmp_path):
    folder = make(tmp_path / "a", "a.jsonl")
    make(tmp_path / "b", "b.jsonl", "deep/c.jsonl")
    (tmp_path / "a" / "one").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "two").symlink_to(tmp_path / "b" / "deep")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "a")
    for entry in (folder, folder + "/**/*.jsonl"):
        assert sorted(texts_of(entry)) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    (tmp_path / "a" / "z.jsonl").symlink_to(tmp_path / "nowhere")
    for entry in (folder, folder + "/*.jsonl", folder + "/z.jsonl"):
        with pytest.raises(UserError, match=r"'.*/a/z\.jsonl' is no file, or a link to none|z\.jsonl' matches no file"):
            texts_of(entry)


def test_nothing_that_looks_like_data_is_left_out_unsaid(tmp_path):
    folder = make(tmp_path / "a", "a.jsonl", "B.JSONL", "notes.md", "plot.png", "a.json.bak")
    assert texts_of(folder) == ["B.JSONL", "a.jsonl"]
    (tmp_path / "a" / "C.jsonl.GZ").write_bytes(gzip.compress(b'{"text": "c"}'))
    assert texts_of(folder) == ["B.JSONL", "c", "a.jsonl"]
    for name in ("c.ndjson", "c.arrow", "c.jsonl.bz2", "c.csv.xz", "C.TXT.gz"):
        other = make(tmp_path / name[2:].replace(".", "-"), "a.jsonl", name)
        with pytest.raises(UserError, match=rf"has '{re.escape(name)}', which is not read: expected \.jsonl, "):
            texts_of(other)


def test_a_file_with_a_link_beside_it_is_read_once(tmp_path):
    folder = make(tmp_path, "a.jsonl", "shard-7.jsonl")
    (tmp_path / "latest.jsonl").symlink_to("shard-7.jsonl")
    assert texts_of(folder) == texts_of(f"{folder}/*.jsonl") == ["a.jsonl", "shard-7.jsonl"]


def test_a_glob_that_matches_folders_says_so(tmp_path):
    folder = make(tmp_path, "a.jsonl", "deep/b.jsonl", "images/c.png")
    assert texts_of(folder + "/**/*.jsonl") == ["a.jsonl", "deep/b.jsonl"]
    with pytest.raises(UserError, match=r"/\*' matches the folder '.*/deep' too, in which there are data: expected a"):
        texts_of(folder + "/*")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl", "valid.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl", "my-dev.jsonl"], "validation", ["my-dev.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "eval/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"], "train_sft",
         ["data/train_sft-00000-of-00001.jsonl"]),
        (["contest.jsonl", "trains.jsonl"], "train", ["contest.jsonl", "trains.jsonl"]),  # no words of their own
        (["test/train-00000-of-00001.jsonl"], "train", ["test/train-00000-of-00001.jsonl"]),
    ],
)  # fmt: skip
def test_splits_by_names(tmp_path, names, split, expected):
    assert texts_of(make(tmp_path, *names), split) == expected


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["test.jsonl"], "train", r"data\.split = 'train': expected one of test, as in "),
        (["train_sft-00000-of-00001.jsonl"], "train", r"data\.split = 'train': expected one of train_sft, as in "),
        (["train.jsonl", "more.jsonl"], "train", r"has files of train, and 'more\.jsonl', whose name tells no split"),
        (["a.jsonl", "b.parquet"], "train", r"\.jsonl and \.parquet files in one entry: expected one kind"),
        (["notes.md"], "train", r"data\.path = .*: expected a folder with files that end in \.jsonl, "),
    ],
)
def test_what_names_do_not_tell_is_refused(tmp_path, names, split, message):
    with pytest.raises(UserError, match=message):
        texts_of(make(tmp_path, *names), split)


FILES = ("data/a.jsonl", "data/b.jsonl", "held/c.jsonl", "other/d.jsonl", "more.txt")


@pytest.mark.parametrize(
    ("readme", "config", "split", "expected"),
    [
        ("configs:\n- config_name: default\n  data_files: data/*.jsonl", "", "train", ["data/a.jsonl", "data/b.jsonl"]),
        ("configs:\n- data_files: [held/c.jsonl, data/a.jsonl]", "", "train", ["data/a.jsonl", "held/c.jsonl"]),
        ("configs:\n- data_files:\n    train: data\n    test: held/*", "", "test", ["held/c.jsonl"]),
        ("configs:\n- data_files:\n  - split: train\n    path: [data/b*]\n  - split: test\n    path: held/**", "",
         "train", ["data/b.jsonl"]),
        ("configs:\n- config_name: x\n  data_dir: data\n- config_name: y\n  data_dir: held", "y", "train",
         ["held/c.jsonl"]),
        ("configs:\n- config_name: x\n  data_dir: data\n- config_name: y\n  default: true\n  data_files: other/*", "",
         "train", ["other/d.jsonl"]),
        ("configs:\n- config_name: x\n  data_files: data/*\n- config_name: default\n  data_files: held/*", "", "train",
         ["held/c.jsonl"]),
        ("license: mit", "", "train", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_the_readme_of_a_copy_from_the_hub(tmp_path, readme, config, split, expected):
    names = FILES if "configs" in readme else ("a.jsonl",)
    folder = make(tmp_path, *names, readme=readme)
    entry = f"{folder}:{config}" if config else folder
    assert texts_of(entry, split) == expected
    assert not is_dataset(entry)


@pytest.mark.parametrize(
    ("readme", "config", "message"),
    [
        ("configs:\n- config_name: x\n  data_files: data/*\n- config_name: y\n  data_files: held/*", "",
         r"expected one of '.*:x', '.*:y', as in its README\.md"),
        ("configs:\n- config_name: x\n  data_files: data/*", "z", r":z': expected one of '.*:x', as in its README"),
        ("configs:\n- data_files: none/*", "", r"README\.md: 'none/\*' in data_files: expected a path that matches"),
        ("configs:\n- data_files: ../*", "", r"README\.md: '\.\./\*' in configs: expected the path of files in this"),
        ("configs:\n- data_files: /etc/passwd", "", r"'/etc/passwd' in configs: expected the path of files in this"),
        ("configs:\n- data_files: hf://x/y", "", r"'hf://x/y' in configs: expected the path of files in this"),
        ("configs:\n- data_dir: 3", "", r"README\.md: 3 in configs: expected the path"),
        ("configs:\n- data_files:\n    test: held/*", "", r"data\.split = 'train': expected one of test, as in"),
        ("configs:\n- data_files:\n    train: 3", "", r"README\.md: data_files \{'train': 3\}: expected splits"),
        ("configs: 3", "", r"README\.md cannot be read: "),
        ("configs: [", "", r"README\.md cannot be read: "),
    ],
)  # fmt: skip
def test_readmes_that_cannot_be_followed(tmp_path, readme, config, message):
    folder = make(tmp_path, *FILES, readme=readme)
    with pytest.raises(UserError, match=message) as raised:
        texts_of(f"{folder}:{config}" if config else folder)
    assert "\n" not in str(raised.value)


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    folder = make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"b\.jsonl is a pointer of Git LFS: expected the file itself"):
        texts_of(folder)


def test_a_folder_in_a_configuration(tmp_path, monkeypatch):
    make(tmp_path / "set", *FILES, readme="configs:\n- config_name: x\n  data_dir: data")
    monkeypatch.chdir(tmp_path)
    config = load_config(["--config", "qwen35moe_tiny.toml", "--data.path", "set:x"])
    assert config.data.path == (f"{tmp_path}/set:x",)
    assert folder_of(config.data.path[0]) == (f"{tmp_path}/set", "x")
    run = describe_run(config, model_config(config))
    assert list(run["sources"]) == [
        "entry 1 of data.path", "a.jsonl in entry 1 of data.path", "b.jsonl in entry 1 of data.path",
    ]  # fmt: skip
    assert [os.path.basename(file) for file in find_files("set:x")] == ["a.jsonl", "b.jsonl"]
