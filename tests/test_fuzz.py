"""Damage of every kind, made afresh from a seed: each input is refused in one line, or used for what it says.

The promise: exit status 2 (1 for a set of tensors that differs from what a class needs), one line on stderr that names
the file or the key, nothing written; a sample of data is used or refused, and the next one is read. No hang: a case has
a time limit. Another seed, and more of it:

    FUZZ_SEED=7 FUZZ_CASES=2000 pytest tests/test_fuzz.py

A failure names class, seed and number: the case is made again from these alone.
"""

import copy
import faulthandler
import gzip
import io
import json
import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tomli
import tomli_w
import torch

from checkpoint import convert_from_hf, convert_to_hf
from checkpoint.directories import MANIFEST, write_manifest
from checkpoint.tensors.safetensors import read_safetensors
from config import checks
from config.options import Data
from data.packing import BadSample
from data.samples import open_samples
from data.tokenize import main as tokenize
from data.tokenizer import load_tokenizer
from errors import UserError
from models.qwen35_moe.hf_weights import hf_name
from tests.checkpoint.test_convert_to_hf import TOKENIZER, random_weights, write_hf
from tests.commands import status_of
from tests.config.runs import write_folder
from training.metrics import MetricsWriter

SEED = int(os.environ.get("FUZZ_SEED", "20261128"))
NUM_CASES = int(os.environ.get("FUZZ_CASES", "600"))
SECONDS = 20.0  # a case; most take less than a tenth of one
NUM_CLASSES = 15
CASES_OF_EACH = -(-NUM_CASES // NUM_CLASSES)


# Damage


FOREIGN = (b"\xff\xfe", b"\xef\xbb\xbf", b"\0" * 9, b"[" * 3000, b'{"a":' * 3000, b"\xed\xa0\x80")


def damaged_bytes(data: bytes, dice: random.Random) -> bytes:
    """Flipped bits, cut ends, zeroed, doubled, removed or foreign blocks."""
    out, size = bytearray(data), len(data)
    kind = dice.randrange(7)
    start = dice.randrange(size) if size else 0
    length = min(dice.choice((1, 2, 8, 64, 512, 4096)), size - start)
    if kind == 0:
        for _ in range(dice.choice((1, 1, 3, 20))):
            out[dice.randrange(size)] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del out[start:]
    elif kind == 2:
        out[start : start + length] = bytes(length)
    elif kind == 3:
        out[start:start] = out[start : start + length]
    elif kind == 4:
        del out[start : start + length]
    elif kind == 5:
        out[start : start + length] = dice.randbytes(length)
    else:
        out[start:start] = dice.choice(
            (b"\xff\xfe", b"\xef\xbb\xbf", b"\0" * 9, b"[" * 3000, b'{"a":' * 3000, b"\xed\xa0\x80")
        )
    return bytes(out)


def odd_value(dice: random.Random) -> Any:
    deep: Any = 0
    for _ in range(200):
        deep = [deep]
    return dice.choice(
        [None, True, False, 0, -1, 1, 10**9, 10**30, -(2**63), 0.5, 1e308, "", "x", "false", "3", "../x", "/dev/zero",
         "a\nb", "\0", "é" * 300, [], {}, [[]], [None], {"a": None}, deep, ["x"] * 3, {"": {}}]
    )  # fmt: skip


def damaged_tree(tree: Any, dice: random.Random) -> Any:
    """A copy in which one node, anywhere, has become something else, has left, or has another name."""
    tree = copy.deepcopy(tree)
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        for key, value in items if len(items) < 200 else dice.sample(items, 200):
            nodes.append((node, key))
            walk(value)

    walk(tree)
    if not nodes or dice.random() < 0.03:
        return odd_value(dice)
    for _ in range(dice.choice((1, 1, 1, 2))):
        node, key = dice.choice(nodes)
        kind = dice.randrange(4)
        if isinstance(node, dict) and key in node and kind == 0:
            del node[key]
        elif isinstance(node, dict) and key in node and kind == 1:
            node[dice.choice((f"{key}_", str(key).upper(), "x"))] = node.pop(key)
        elif isinstance(node, dict) or key < len(node):
            node[key] = odd_value(dice)
    return tree


def dumped(tree: Any, dice: random.Random) -> bytes:
    """JSON, now and then with a name twice, and with what JSON does not have."""
    text = json.dumps(tree)
    if dice.random() < 0.05:
        text = text.replace("null", "NaN")
    return text.encode("utf-8", "surrogatepass")


# Good inputs, each made once


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    weights = {hf_name(name): tensor for name, tensor in random_weights().items()}
    write_hf(folder / "hf", weights, num_files=2)
    convert_from_hf.convert_from_hf(folder / "hf", folder / "step-00000001", torch.float32)
    (folder / "ranks").mkdir()
    torch.save(dict(weights), folder / "ranks/model_world_size_1_rank_0.pt")
    shutil.copy(folder / "hf/config.json", folder / "ranks")
    (folder / "config").mkdir()
    write_folder(folder / "config")
    texts = [{"text": f"document {number} " * (number % 7)} for number in range(24)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": f"Answer {number}.", "weight": number % 2},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "Nothing."},
            ],
            "tools": None,
        }
        for number in range(24)
    ]
    data = folder / "data"
    data.mkdir()
    for name, records in (("texts", texts), ("chats", chats)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (data / "texts.jsonl.gz").write_bytes(gzip.compress((data / "texts.jsonl").read_bytes()))
    pa.parquet.write_table(pa.Table.from_pylist(texts), data / "texts.parquet", row_group_size=7)
    with redirect_stdout(io.StringIO()):
        options = ["--config", "qwen35moe_tiny.toml", "--data.path", str(data / "texts.jsonl"), "--workers", "1"]
        tokenize(["--out", str(data / "tokens"), *options])
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(TOKENIZER))


def cases(name: str, tmp_path: Path, case: Callable[[random.Random, Path], None]) -> None:
    """Runs one class: each case from its own seed, in its own folder, within its time."""
    for number in range(CASES_OF_EACH):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
        started = time.perf_counter()
        try:
            case(random.Random(f"{SEED} {name} {number}"), folder)
        except BaseException as error:
            raise AssertionError(f"{name}, seed {SEED}, case {number}: {type(error).__name__}: {error}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert time.perf_counter() - started < SECONDS, f"{name}, seed {SEED}, case {number}: took too long"
        shutil.rmtree(folder)


def promised(main: Callable[[list[str]], Any], arguments: list[str], out: Path | None = None) -> int:
    """The exit status of a command, with what is promised of one that is not 0."""
    names = {path.name for path in out.parent.iterdir()} if out else set()
    stderr = io.StringIO()
    with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
        status = status_of(main, arguments)
    said = stderr.getvalue()
    assert status in (0, 1, 2), status
    if status:
        assert len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        assert len(said) < 3000, len(said)
        if out:
            assert {path.name for path in out.parent.iterdir()} == names, "something was written"
    return status


# Configurations


def check(folder: Path, *options: str) -> int:
    return promised(checks.main, ["--world-size", "2", "--config", str(folder / "base.toml"), *options])


@pytest.fixture
def in_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    def enter(folder: Path) -> Path:
        shutil.copytree(good / "config", folder, dirs_exist_ok=True)
        monkeypatch.chdir(folder)
        return folder

    return enter


def test_the_good_ones_are_accepted(good: Path, tmp_path: Path, in_folder: Callable[[Path], Path]) -> None:
    assert check(in_folder(tmp_path / "a")) == 0
    assert check(in_folder(tmp_path / "b"), f"--model.path={good / 'hf'}", "--data.tokenizer=") == 0
    assert promised(convert_to_hf.main, [str(good / "step-00000001"), str(tmp_path / "to")]) == 0
    assert promised(convert_to_hf.main, [str(good / "ranks"), str(tmp_path / "ranks")]) == 0
    assert promised(convert_from_hf.main, [str(good / "hf"), str(tmp_path / "from")]) == 0


def test_toml(tmp_path: Path, in_folder: Callable[[Path], Path]) -> None:
    def case(dice: random.Random, folder: Path) -> None:
        path = in_folder(folder) / "base.toml"
        path.write_bytes(damaged_bytes(path.read_bytes(), dice))
        check(folder)  # what is accepted is TOML with known keys and fitting values

    cases("toml", tmp_path, case)


def test_toml_of_other_values(tmp_path: Path, in_folder: Callable[[Path], Path]) -> None:
    def without_none(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {str(k): without_none(v) for k, v in tree.items() if v is not None}
        return [without_none(v) for v in tree if v is not None] if isinstance(tree, list) else tree

    def case(dice: random.Random, folder: Path) -> None:
        path = in_folder(folder) / "base.toml"
        tree = without_none(damaged_tree(tomli.loads(path.read_text()), dice))
        path.write_bytes(tomli_w.dumps(tree if isinstance(tree, dict) else {"x": "y"}).encode("utf-8", "replace"))
        check(folder)

    cases("toml values", tmp_path, case)


def test_config_json(good: Path, tmp_path: Path, in_folder: Callable[[Path], Path]) -> None:
    text = json.loads((good / "hf/config.json").read_text())
    nested = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 1}}

    def case(dice: random.Random, folder: Path) -> None:
        (in_folder(folder) / "hf").mkdir()
        tree = dice.choice((text, nested))
        data = dumped(tree, dice)
        data = damaged_bytes(data, dice) if dice.random() < 0.4 else dumped(damaged_tree(tree, dice), dice)
        (folder / "hf/config.json").write_bytes(data)
        check(folder, f"--model.path={folder / 'hf'}", f"--data.tokenizer={TOKENIZER}")

    cases("config.json", tmp_path, case)


def test_tokenizer_files(good: Path, tmp_path: Path, in_folder: Callable[[Path], Path]) -> None:
    def case(dice: random.Random, folder: Path) -> None:
        path = in_folder(folder) / "tokenizer" / dice.choice(("tokenizer.json", "tokenizer_config.json"))
        data = path.read_bytes()
        data = damaged_bytes(data, dice) if dice.random() < 0.5 else dumped(damaged_tree(json.loads(data), dice), dice)
        path.write_bytes(data)
        if dice.random() < 0.2:
            (path.parent / "chat_template.jinja").write_text(dice.choice(("{% for %}", "{{ 1/0 }}", "\0", "{{")))
        check(folder)

    cases("tokenizer", tmp_path, case)


# Samples


def check_line(error: UserError) -> None:
    assert len(str(error).splitlines()) == 1
    assert "Traceback" not in str(error)


def read_all(data: Data, tokenizer: Any) -> None:
    """Opens and reads every sample twice over: each is one, or refused for a reason."""
    try:
        samples = open_samples(data, tokenizer, 64, seed=0)
    except UserError as error:
        check_line(error)
        return
    for number in range(2 * samples.num_documents):
        try:
            sample = samples.read(number)
        except BadSample as error:
            check_line(error)
            continue
        assert len(sample.tokens) == len(sample.labels) > 0
        assert 0 <= sample.tokens.min() <= sample.tokens.max() < 4096


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.gz", "texts.parquet"])
def test_files_of_texts(good: Path, tmp_path: Path, tokenizer: Any, name: str) -> None:
    original = (good / "data" / name).read_bytes()

    def case(dice: random.Random, folder: Path) -> None:
        (folder / name).write_bytes(damaged_bytes(original, dice))
        read_all(Data(path=(str(folder / name),), tokenizer=str(TOKENIZER)), tokenizer)

    cases(name, tmp_path, case)


def test_conversations(good: Path, tmp_path: Path, tokenizer: Any) -> None:
    lines = (good / "data/chats.jsonl").read_bytes().splitlines()

    def case(dice: random.Random, folder: Path) -> None:
        damaged = [dumped(damaged_tree(json.loads(line), dice), dice) for line in lines[:8]]
        (folder / "chats.jsonl").write_bytes(b"\n".join([*damaged, damaged_bytes(lines[8], dice), lines[9]]))
        read_all(Data(format="chat", path=(str(folder / "chats.jsonl"),), tokenizer=str(TOKENIZER)), tokenizer)

    cases("chats", tmp_path, case)


def test_tokenised_corpora(good: Path, tmp_path: Path, tokenizer: Any) -> None:
    def case(dice: random.Random, folder: Path) -> None:
        shutil.copytree(good / "data/tokens", folder / "tokens")
        path = dice.choice(sorted((folder / "tokens").iterdir()))
        data = path.read_bytes()
        if path.suffix == ".json" and dice.random() < 0.7:
            data = dumped(damaged_tree(json.loads(data), dice), dice)
        elif path.suffix == ".ends" and dice.random() < 0.5:
            ends = np.frombuffer(data, "<i8").copy()
            ends[dice.randrange(len(ends))] = dice.choice((-1, 0, 10**15, 3))
            data = ends.tobytes()
        else:
            data = damaged_bytes(data, dice)
        path.write_bytes(data)
        read_all(Data(path=(str(folder / "tokens"),), tokenizer=str(TOKENIZER)), tokenizer)

    cases("tokens", tmp_path, case)


# Checkpoints


def same_tensors(good: Path, out: Path) -> None:
    """What was written all the same has the names and shapes of what it was made from."""
    expected, found = (read_safetensors(folder) for folder in (good / "hf", out))
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in expected.items()}


def test_checkpoints_with_a_manifest(good: Path, tmp_path: Path) -> None:
    """No byte of them may differ from what the manifest says: always refused."""

    def case(dice: random.Random, folder: Path) -> None:
        step = Path(shutil.copytree(good / "step-00000001", folder / "step-00000001"))
        path = dice.choice(sorted(p for p in step.rglob("*") if p.is_file() and p.name != MANIFEST))
        data = path.read_bytes()
        damaged = damaged_bytes(data, dice)
        if dice.random() < 0.15:
            path.unlink()
        elif damaged == data:
            return
        else:
            path.write_bytes(damaged)
        assert promised(convert_to_hf.main, [str(step), str(folder / "out")], folder / "out") == 2

    cases("manifest", tmp_path, case)


def test_manifests_that_lie(good: Path, tmp_path: Path) -> None:
    def case(dice: random.Random, folder: Path) -> None:
        step = Path(shutil.copytree(good / "step-00000001", folder / "step-00000001"))
        tree = json.loads((step / MANIFEST).read_text())
        data = dumped(damaged_tree(tree, dice), dice)
        (step / MANIFEST).write_bytes(damaged_bytes(data, dice) if dice.random() < 0.3 else data)
        if promised(convert_to_hf.main, [str(step), str(folder / "out")], folder / "out") == 0:
            same_tensors(good, folder / "out")

    cases("lying manifest", tmp_path, case)


def test_checkpoints_whose_manifest_was_made_to_fit(good: Path, tmp_path: Path) -> None:
    """What a hostile hand would send: the index, the chunks' own pickles, the assets."""

    def case(dice: random.Random, folder: Path) -> None:
        step = Path(shutil.copytree(good / "step-00000001", folder / "step-00000001"))
        path = dice.choice((step / ".metadata", step / "__0_0.distcp", *sorted((step / "hf").iterdir())))
        data = path.read_bytes()
        if path.suffix == ".json" and dice.random() < 0.7:
            data = dumped(damaged_tree(json.loads(data), dice), dice)
        elif path.suffix == ".distcp":  # where the zip's own structure is, and not in the numbers
            data = data[:-900] + damaged_bytes(data[-900:], dice)
        else:
            data = damaged_bytes(data, dice)
        path.write_bytes(data)
        write_manifest(step)
        if promised(convert_to_hf.main, [str(step), str(folder / "out")], folder / "out") == 0:
            same_tensors(good, folder / "out")

    cases("fitting manifest", tmp_path, case)


def test_files_of_ranks(good: Path, tmp_path: Path) -> None:
    name = "model_world_size_1_rank_0.pt"

    def case(dice: random.Random, folder: Path) -> None:
        ranks = Path(shutil.copytree(good / "ranks", folder / "ranks"))
        data = (ranks / name).read_bytes()
        kind = dice.randrange(4)
        if kind == 0:  # the directory at the end of the zip
            (ranks / name).write_bytes(data[:-2000] + damaged_bytes(data[-2000:], dice))
        elif kind == 1:
            world_size = dice.choice((0, 2, 10**12))
            other = f"model_world_size_{world_size}_rank_0.pt"
            (ranks / name).rename(ranks / other)
        else:  # its pickle, or how its members are packed
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(ranks / name, "w") as new:
                for info in old.infolist():
                    content = old.read(info)
                    if info.filename.endswith("data.pkl") and kind == 2:
                        content = damaged_bytes(content, dice)
                    packed = zipfile.ZIP_DEFLATED if kind == 3 and dice.random() < 0.3 else zipfile.ZIP_STORED
                    new.writestr(info.filename, content, packed)
        if promised(convert_to_hf.main, [str(ranks), str(folder / "out")], folder / "out") == 0:
            same_tensors(good, folder / "out")

    cases("ranks", tmp_path, case)


def test_hugging_face_directories(good: Path, tmp_path: Path) -> None:
    def case(dice: random.Random, folder: Path) -> None:
        hf = Path(shutil.copytree(good / "hf", folder / "hf"))
        if dice.random() < 0.4:
            path = hf / "model.safetensors.index.json"
            data = path.read_bytes()
            path.write_bytes(
                damaged_bytes(data, dice) if dice.random() < 0.4 else dumped(damaged_tree(json.loads(data), dice), dice)
            )
        else:
            path = dice.choice(sorted(hf.glob("*.safetensors")))
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            kind = dice.randrange(4)
            if kind == 0:
                text = dumped(damaged_tree(header, dice), dice)
                data = len(text).to_bytes(8, "little") + text + data[8 + length :]
            elif kind == 1:
                data = dice.choice((0, 1, length - 1, length + 1, 2**40, 2**63)).to_bytes(8, "little") + data[8:]
            elif kind == 2:
                data = data[: dice.randrange(len(data))]
            else:
                data = data[:8] + damaged_bytes(data[8 : 8 + length], dice) + data[8 + length :]
            path.write_bytes(data)
        if promised(convert_from_hf.main, [str(hf), str(folder / "out")], folder / "out") == 0:
            assert promised(convert_to_hf.main, [str(folder / "out"), str(folder / "back")]) == 0
            same_tensors(good, folder / "back")

    cases("hf", tmp_path, case)


def test_metrics_of_an_earlier_run(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9)).encode()

    def case(dice: random.Random, folder: Path) -> None:
        (folder / "metrics.jsonl").write_bytes(damaged_bytes(lines, dice))
        writer = MetricsWriter(folder, tensorboard=False, start_step=5, total_steps=9)
        writer.close()
        for line in (folder / "metrics.jsonl").read_bytes().splitlines():
            assert json.loads(line)["step"] <= 5

    cases("metrics", tmp_path, case)
