"""Which files an entry of data.path stands for, and the cache of what is made of them."""

import os
from pathlib import Path

import pytest

from data.files import cached, find_files, is_dataset, suffix_of
from errors import UserError


def test_suffixes() -> None:
    names = ("a.jsonl", "a.b.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.csv.gz", "a.xml", "a")
    assert [suffix_of(name) for name in names] == [
        ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".csv.gz", ".xml", "",
    ]  # fmt: skip


def test_globs_are_sorted_and_a_path_that_exists_is_none(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "[ab].jsonl"):
        (tmp_path / name).write_text("")
    assert [os.path.basename(path) for path in find_files(f"{tmp_path}/*.jsonl")] == [
        "[ab].jsonl",
        "a.jsonl",
        "b.jsonl",
    ]
    assert find_files(f"{tmp_path}/[ab].jsonl") == [f"{tmp_path}/[ab].jsonl"]


def test_a_slip_is_told_with_what_may_have_been_meant(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"matches no file.*did you mean '.*train\.jsonl'\?"):
        find_files(f"{tmp_path}/trian.jsonl")
    (tmp_path / "x.xml").write_text("")
    with pytest.raises(UserError, match=r"ends in '\.xml': expected \.jsonl"):
        find_files(f"{tmp_path}/x.xml")


@pytest.mark.parametrize("marker", ["tokens.json", "dataset_info.json", "dataset_dict.json"])
def test_datasets(tmp_path: Path, marker: str) -> None:
    assert not is_dataset(str(tmp_path))
    (tmp_path / marker).write_text("")
    assert is_dataset(str(tmp_path))
    assert is_dataset("owner/name:subset")
    assert not is_dataset("folder/file.jsonl")


def test_the_cache_is_made_once_for_the_same_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "a"
    source.write_text("1")
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text(source.read_text())

    first = cached([str(source)], "", ".x", make)
    assert cached([str(source)], "", ".x", make) == first
    assert len(made) == 1
    source.write_text("22")
    assert cached([str(source)], "", ".x", make).read_text() == "22"
    assert cached([str(source)], "other", ".x", make) != first
