"""Directories that are complete or not there: names, order, manifests, what is cleared."""

import json
from pathlib import Path

import pytest

from checkpoint.directories import (
    MANIFEST,
    check_is_free,
    complete_checkpoints,
    find_checkpoint,
    find_damage,
    publish,
    remove,
    tidy,
    write_manifest,
)
from errors import UserError


def make(folder: Path, content: str = "x") -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(content)
    (folder / ".metadata").write_text("")
    write_manifest(folder)
    return folder


def test_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in (
        "step-00000010",
        "step-00000009",
        "step-100000000",
        ".step-00000011",
        "step-7",
        "step-00000012.removed",
    ):
        (tmp_path / name).mkdir()
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["step-00000009", "step-00000010", "step-100000000"]


def test_the_newest_of_a_run_or_the_one_that_is_named(tmp_path: Path) -> None:
    steps = [make(tmp_path / "checkpoints" / f"step-{step:08}") for step in (3, 20)]
    assert find_checkpoint(tmp_path) == steps[1]
    assert find_checkpoint(steps[0]) == steps[0]
    with pytest.raises(UserError, match="expected a checkpoint"):
        find_checkpoint(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_text("xx"), "has 2 bytes instead of 1"),
        (lambda path: path.write_text("y"), "is corrupted"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: object, said: str) -> None:
    folder = make(tmp_path / "step-00000001")
    assert find_damage(folder) is None
    change(folder / "file")  # type: ignore[operator]
    assert said in str(find_damage(folder))


def test_a_manifest_cannot_name_what_lies_elsewhere(tmp_path: Path) -> None:
    folder = make(tmp_path / "step-00000001")
    (tmp_path / "other").write_text("x")
    said = json.loads((folder / MANIFEST).read_text())
    for name in ("../other", str(tmp_path / "other"), "/dev/zero"):
        files = {".metadata": said["files"][".metadata"], name: said["files"]["file"]}
        (folder / MANIFEST).write_text(json.dumps({"files": files}))
        assert find_damage(folder) is not None


def test_publishing_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    old, new = make(tmp_path / "step-00000001", "old"), make(tmp_path / ".step-00000001", "new")
    publish(new, old)
    assert (old / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    remove(old)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    make(tmp_path / ".step-00000001")  # complete, and had no name yet
    make(tmp_path / "step-00000002")
    make(tmp_path / ".step-00000002")  # was to replace it
    (tmp_path / ".step-00000003").mkdir()  # half written
    make(tmp_path / ".step-00000004.removed")
    (tmp_path / ".step-00000005").touch()
    (tmp_path / ".step-00000006").symlink_to("none")
    (tmp_path / ".step-00000007").symlink_to("step-00000002")  # it is not what it looks like
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert find_damage(tmp_path / "step-00000002") is None


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link"])
def test_a_name_that_no_directory_bears_is_a_damaged_checkpoint(tmp_path: Path, kind: str) -> None:
    """A run never begins afresh beside a checkpoint that is away."""
    path, elsewhere = tmp_path / "step-00000003", make(tmp_path / "elsewhere")
    path.touch() if kind == "a file" else path.symlink_to("elsewhere" if kind == "a link" else "none")
    assert complete_checkpoints(tmp_path) == [path]
    assert (find_damage(path) is None) == (kind == "a link")
    publish(make(tmp_path / ".step-00000003", "new"), path)  # the same step saved again
    assert (path / "file").read_text() == "new"
    assert not path.is_symlink()
    link = tmp_path / "step-00000004"
    link.symlink_to("elsewhere")
    remove(link)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "step-00000003"]
    assert find_damage(elsewhere) is None


def test_what_an_operating_system_leaves_beside_assets_is_no_damage(tmp_path: Path) -> None:
    folder = make(tmp_path / "step-00000001")
    (folder / "hf").mkdir()
    (folder / "hf/.DS_Store").touch()
    assert find_damage(folder) is None
    (folder / "hf/added_tokens.json").touch()
    assert "does not list 'hf/added_tokens.json'" in str(find_damage(folder))


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    check_is_free(tmp_path / "none")
    check_is_free(tmp_path / "empty")
    for taken in ("file", "."):
        with pytest.raises(UserError, match="exists: expected a new or an empty directory"):
            check_is_free(tmp_path / taken)
