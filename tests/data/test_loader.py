"""The loader: the global batch depends on no layout, resuming is exact, and workers behave."""

import collections
import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from config.options import Data, Training
from data.loader import TokenLoader, _context, _init_worker
from data.packing import filler_row
from data.samples import open_samples
from data.shuffle import permutation
from data.tokenize import main
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "data" / "tiny" / "tokenizer")
END_OF_TEXT = 4093
TEXTS = ["word " * length for length in (3, 0, 1, 40, 7, 0, 0, 2, 90, 5, 13, 1, 21)] + ["a", ""]
NUM_SLOTS, SEQUENCE_LENGTH = 12, 16


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def _one_tokenizer():
    """Reads the tokenizer once, and not for each of hundreds of loaders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loader.load_tokenizer", functools.cache(load_tokenizer))
        yield


def make_loader(
    path, rank=0, ranks=1, *, workers=0, micro=1, seed=5, tokenizer=TOKENIZER, sequence_length=SEQUENCE_LENGTH,
    data_path=None, one_epoch=False, skipped_dir=None, **data,
):  # fmt: skip
    training = Training(steps=1, sequence_length=sequence_length, local_batch_size=micro, global_batch_size=NUM_SLOTS)
    data = {"path": data_path or (path,), "num_workers": workers, "tokenizer": tokenizer, **data}
    return TokenLoader(Data(**data), training, rank, ranks, seed, one_epoch=one_epoch, skipped_dir=skipped_dir)


# Of 12 slots: those that can be dealt evenly, and those where some ranks have rows of fillers, or no slot at all.
LAYOUTS = st.sampled_from([(ranks, micro) for ranks in (1, 2, 3, 4, 5, 13) for micro in (1, 2, 3, 5, 12)])


# The same promises for every kind of source. What makes each kind special is in its data: bad samples, samples of very
# different lengths, conversations longer than a row, sources of different sizes.

KINDS = ("text", "tokens", "mixture", "chat")


@pytest.fixture(scope="module")
def options_of(path, tmp_path_factory):
    """Kind -> the options of `make_loader`."""
    folder = tmp_path_factory.mktemp("kinds")
    main(["--out", str(folder / "tokens"), "--workers", "1", "--config", "qwen35moe_tiny.toml", "--data.path", path])
    second = folder / "second.jsonl"
    second.write_text("".join(json.dumps({"text": f"other {number} " * number}) + "\n" for number in range(5)))
    chats = folder / "chats.jsonl"
    lines = [json.dumps({"messages": conversation(number)}) for number in range(61)]
    lines[7], lines[20] = "{x", json.dumps({"messages": [{"role": "user", "content": "?"}]})
    chats.write_text("\n".join(lines))
    return {
        "text": {},
        "tokens": {"data_path": (str(folder / "tokens"),)},
        "mixture": {"data_path": (path, str(second)), "weights": (1.0, 3.0)},
        "chat": {"data_path": (str(chats),), "format": "chat", "sequence_length": 64},
    }


def conversation(number):
    answer = " ".join(f"{number} {word}" for word in range(1 + number * 7 % 11))
    turns = [{"role": "user", "content": f"Number {number}?"}, {"role": "assistant", "content": answer}]
    return turns * (1 + number % 2)


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("mixture", 2), ("chat", 2)])
def test_any_source_on_any_layout_and_resumed_in_the_middle(path, options_of, kind, workers):
    """Four steps in one process; two in another layout, and then two on three ranks: with 0 and with 2 workers."""
    options = options_of[kind]
    reference, cursors = run(path, 4, **options)
    first, first_cursors = run(path, 2, ranks=1, workers=workers, micro=3, **options)
    assert first == reference[:2]
    assert torch.equal(first_cursors[-1], cursors[2])
    rest, _ = run(path, 2, ranks=3, workers=workers, micro=2, cursors=first_cursors[-1], **options)
    assert rest == reference[2:]


@pytest.fixture(scope="module")
def undisturbed(path, options_of):
    """Kind -> its first five steps in one process."""
    return functools.cache(lambda kind: run(path, 5, **options_of[kind])[0])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(interruptions=st.lists(st.tuples(st.integers(0, 3), LAYOUTS), min_size=1, max_size=3), last=LAYOUTS)
def test_any_source_interrupted_anywhere(path, options_of, undisturbed, kind, interruptions, last):
    options = options_of[kind]
    steps, cursors = [], None
    for num_steps, (ranks, micro) in interruptions:
        more, all_cursors = run(path, num_steps, ranks, 0, micro, cursors, **options)
        steps, cursors = steps + more, all_cursors[-1]
    more, _ = run(path, max(0, 5 - len(steps)), last[0], 0, last[1], cursors, **options)
    assert (steps + more)[:5] == undisturbed(kind)


def test_tokens_ahead_of_time_are_the_tokens_of_the_text(path, options_of, reference):
    """Empty documents are skipped either way, but here they are no samples any more: so without them."""
    kept = Path(path).with_name("kept.jsonl")
    kept.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS if text))
    steps, _ = run(str(kept), 4)
    assert run(path, 4, **options_of["tokens"])[0] == steps


def test_a_mixture_takes_samples_by_their_weights(tmp_path):
    for name, size in (("a", 3), ("b", 700)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": name}) + "\n") * size)
    data = Data(path=(f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"), weights=(1, 3), tokenizer=TOKENIZER)
    samples = open_samples(data, load_tokenizer(TOKENIZER), 16, seed=3)
    owners, indices = samples.find(range(2 * 8191))
    names = ["ab"[owner] for owner in owners]
    for start in (0, 8191):  # to a sample in each block, and nearly so in each part of it, for each slot too
        assert names[start : start + 8191].count("a") == round(8191 / 4)
    assert 200 < names[:1000].count("a") < 300
    for slot in range(8):
        assert 200 < names[slot:8000:8].count("a") < 300
    # Each source in its own epochs: in the first 700 samples of b each of its documents once, and so on.
    of_b = [index for name, index in zip(names, indices) if name == "b"]
    for epoch in range(3):
        assert sorted(of_b[700 * epoch : 700 * (epoch + 1)]) == list(range(700))
    assert of_b[:700] != of_b[700:1400]


def test_chats_are_counted_filled_up_and_skipped(path, options_of, tmp_path):
    loader = make_loader(path, micro=12, skipped_dir=tmp_path / "skipped", shuffle=False, **options_of["chat"])
    for _ in range(4):
        batch = next(loader)
        assert batch.is_real.dtype == torch.bool
        assert set(batch.labels[~batch.is_real].tolist()) <= {-100}
        assert set(batch.tokens[~batch.is_real].tolist()) <= {END_OF_TEXT}
    counts = loader.counts
    assert 0 < counts["real_tokens"] < counts["tokens"] == 4 * 12 * 64
    assert counts["not_json"] > 0 < counts["nothing_to_train"]
    lines = [json.loads(line) for line in (tmp_path / "skipped" / "rank-00000.jsonl").read_text().splitlines()]
    assert collections.Counter(line["reason"] for line in lines) == {
        reason: number for reason, number in counts.items() if "tokens" not in reason
    }
    not_json = next(line["sample"] for line in lines if line["reason"] == "not_json")
    assert not_json.startswith(f"{options_of['chat']['data_path'][0]}, line 8: is not JSON")


def test_long_chats_are_dropped_or_cut(path, options_of):
    options = options_of["chat"] | {"sequence_length": 32}
    dropping, cutting = (make_loader(path, micro=12, too_long=choice, **options) for choice in ("drop", "truncate"))
    next(dropping), next(cutting)
    assert dropping.counts["too_long"] > 0 == dropping.counts["truncated"]
    assert cutting.counts["truncated"] > 0 == cutting.counts["too_long"]
    stopping = make_loader(path, micro=12, on_bad_sample="error", **options)
    with pytest.raises(ValueError, match=r"chats\.jsonl, line \d+: has \d+ tokens, more than the 32 of a row"):
        next(stopping)


def test_cursors_of_the_other_format_are_refused(path, options_of):
    loader = make_loader(path, **options_of["chat"])
    with pytest.raises(ValueError, match=r"data\.format = 'chat': expected the other, as in the checkpoint"):
        loader.load_cursors(make_loader(path).cursors)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (4, 3)])
def test_one_epoch_has_every_token_once_and_then_fillers(path, options_of, kind, ranks, micro):
    loaders = [make_loader(path, rank, ranks, micro=micro, one_epoch=True, **options_of[kind]) for rank in range(ranks)]
    found = []
    for loader in loaders:
        loader_tokens = None
        for _ in range(2):  # twice the same
            tokens, is_real = [], True
            while is_real:
                batches = [next(loader) for _ in range(NUM_SLOTS // ranks // micro)]
                tokens += [token for batch in batches for token in batch.tokens[batch.is_real].tolist()]
                is_real = any(batch.is_real.any() for batch in batches)
            assert loader_tokens in (None, tokens)
            loader_tokens = tokens
            loader.rewind()
        found += loader_tokens
    if kind != "mixture":
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        texts = [[*tokenizer(text, add_special_tokens=False).input_ids, END_OF_TEXT] for text in TEXTS if text]
        assert collections.Counter(found) == collections.Counter(token for text in texts for token in text)


def run(path, num_steps, ranks=1, workers=0, micro=1, cursors=None, **options):
    """The rows of each global batch, as (tokens, labels, positions, lengths) of one row, in slot order; and the cursors
    of all slots before the first step and after each."""
    loaders = [make_loader(path, rank, ranks, workers=workers, micro=micro, **options) for rank in range(ranks)]
    try:
        for loader in loaders:
            if cursors is not None:
                loader.load_cursors(cursors)
        steps, all_cursors = [], [torch.cat([loader.cursors for loader in loaders])]
        for _ in range(num_steps):
            rows = []
            for loader in loaders:
                batches = [next(loader) for _ in range(loader.num_micro_batches)]
                rows_of_step = [row for batch in batches for row in rows_of(batch, micro)]
                rows += rows_of_step[: len(loader.cursors)]
                for _, labels, _, lengths in rows_of_step[len(loader.cursors) :]:
                    assert set(labels) == {-100}
                    assert len(lengths) == 1
            assert len({loader.num_micro_batches for loader in loaders}) == 1
            num_rows = sum(loader.num_micro_batches * micro for loader in loaders)
            assert {loader.num_filler_rows for loader in loaders} == {num_rows - NUM_SLOTS}
            steps.append(rows)
            all_cursors.append(torch.cat([loader.cursors for loader in loaders]))
        return steps, all_cursors
    finally:
        for loader in loaders:
            loader.close()


def rows_of(batch, micro):
    """A micro-batch's rows. Checks what is true of each."""
    tensors = (batch.tokens, batch.labels, batch.positions)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    size = len(batch.tokens) // micro
    assert {tensor.shape for tensor in tensors} == {(micro * size,)}
    lengths, rows = batch.documents.lengths(), []
    for columns in zip(*(tensor.view(micro, size).tolist() for tensor in tensors)):
        own = []
        while sum(own) < size:
            own.append(lengths.pop(0))
        assert sum(own) == size, "a document reaches over the end of its row"
        rows.append((*columns, own))
    assert not lengths
    return rows


@pytest.fixture(scope="module")
def reference(path):
    """Eight steps in one process."""
    return run(path, 8)


def expected_rows(slot, num_rows, seed, shuffle=True, end_of_document=True):
    """A slot's rows as the design has them, written down another way: the whole stream first, then cut."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    stream, sample = [], slot  # (token, label, whether it is the first of its document)
    while len(stream) < num_rows * SEQUENCE_LENGTH:
        epoch, index = divmod(sample, len(TEXTS))
        text = TEXTS[permutation(len(TEXTS), seed, epoch)[index] if shuffle else index]
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        tokens += [END_OF_TEXT] if tokens and end_of_document else []
        stream += zip(tokens, [*tokens[1:], -100], [True] + [False] * len(tokens))
        sample += NUM_SLOTS
    rows = []
    for start in range(0, num_rows * SEQUENCE_LENGTH, SEQUENCE_LENGTH):
        tokens, labels, begins = map(list, zip(*stream[start : start + SEQUENCE_LENGTH]))
        positions = []
        for begin in begins:
            positions.append(0 if begin or not positions else positions[-1] + 1)
        borders = [place for place, position in enumerate(positions) if not position] + [SEQUENCE_LENGTH]
        rows.append((tokens, labels, positions, [b - a for a, b in itertools.pairwise(borders)]))
    return rows


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"end_of_document": False}], ids=str)
def test_rows_are_what_the_design_says(path, options):
    steps, _ = run(path, 6, seed=11, **options)
    for slot in range(NUM_SLOTS):
        assert [rows[slot] for rows in steps] == expected_rows(slot, 6, 11, **options)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (2, 3), (3, 1), (3, 4), (4, 3), (12, 1)])
def test_the_global_batch_is_the_same_on_any_layout(path, reference, ranks, micro):
    steps, cursors = run(path, 8, ranks, 0, micro)
    assert steps == reference[0]
    assert torch.equal(torch.stack(cursors), torch.stack(reference[1]))


@pytest.mark.parametrize(("ranks", "workers", "micro"), [(1, 2, 4), (2, 1, 1), (4, 2, 3)])
def test_the_global_batch_is_the_same_with_workers(path, reference, ranks, workers, micro):
    """In (4, 2, 3) a worker has two slots, the other one. What they prepare ahead must not move the cursors."""
    steps, cursors = run(path, 8, ranks, workers, micro)
    assert steps == reference[0]
    assert torch.equal(torch.stack(cursors), torch.stack(reference[1]))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), LAYOUTS), min_size=1, max_size=3), LAYOUTS)
def test_any_interruptions_and_changes_of_layout_change_nothing(path, reference, interruptions, last):
    steps, cursors = [], None
    for num_steps, (ranks, micro) in interruptions:
        more, all_cursors = run(path, num_steps, ranks, 0, micro, cursors)
        steps, cursors = steps + more, all_cursors[-1]
    more, _ = run(path, max(0, 8 - len(steps)), *(last[0], 0, last[1]), cursors)
    assert (steps + more)[:8] == reference[0]


def test_resuming_with_workers(path, reference):
    first, cursors = run(path, 3, ranks=2, workers=2, micro=2)
    assert first == reference[0][:3]
    rest, _ = run(path, 5, ranks=3, workers=1, micro=4, cursors=cursors[-1])
    assert rest == reference[0][3:]


@pytest.mark.parametrize("workers", [0, 1])
def test_cursors_are_those_of_the_returned_rows_and_stay_as_handed_out(path, workers):
    loader = make_loader(path, workers=workers, micro=2)
    for step in range(2):
        for place in range(0, NUM_SLOTS, 2):
            before = loader.cursors
            copy = before.clone()
            next(loader)
            moved = (loader.cursors != copy).any(dim=1).nonzero().flatten().tolist()
            assert moved == [place, place + 1], f"step {step}"
            assert torch.equal(before, copy)
    loader.close()


def test_cursors_of_another_batch_size_are_refused(path):
    loader = make_loader(path)
    with pytest.raises(ValueError, match=r"training\.global_batch_size = 12: expected 8, as in the checkpoint"):
        loader.load_cursors(torch.tensor([(slot, 0) for slot in range(8)]))


def test_seed_and_epoch_change_the_order(path, reference):
    other, _ = run(path, 1, seed=6)
    assert other[0] != reference[0][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(path, workers):
    state = torch.get_rng_state()
    loader = make_loader(path, workers=workers, micro=12)
    next(loader)
    loader.close()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_in_one_line(tmp_path, workers):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' * 30 + '{"text": null}\n' + '{"text": "good"}\n')
    loader = make_loader(str(path), workers=workers, shuffle=False, on_bad_sample="error")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 31: data\.text_key = 'text' is None: expected a string$"):
        collections.deque(itertools.islice(loader, 1000), maxlen=0)
    assert next(loader, None) is None


def test_close_does_not_wait_for_a_worker_in_the_middle_of_a_long_document(tmp_path):
    path = tmp_path / "long.jsonl"
    texts = ["word " * 20] * NUM_SLOTS + ["word " * 4_000_000]  # the last takes about seven seconds
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    loader = make_loader(str(path), workers=1, shuffle=False)
    next(loader)  # the rows of the first step; for the second, the worker needs the long document
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 4  # the library itself gives a worker 5 seconds
    assert not multiprocessing.active_children()


def hold_a_lock_for_a_moment(lifeline, lock, ready):
    _init_worker(lifeline, 0)
    with lock:
        ready.set()
        time.sleep(0.3)
    time.sleep(60)


def test_a_worker_that_ends_takes_no_lock_with_it():
    """The parent, which closes it, may need that lock: a run would hang at its end."""
    lock, ready = _context.Lock(), _context.Event()
    worker_end, lifeline = _context.Pipe(duplex=False)
    worker = _context.Process(target=hold_a_lock_for_a_moment, args=(worker_end, lock, ready))
    worker.start()
    assert ready.wait(60)
    lifeline.close()
    assert lock.acquire(timeout=10)
    worker.join(30)
    assert worker.exitcode == 0


def test_a_source_of_empty_texts_ends_in_an_error(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match=r"empty\.jsonl, line 1: has no text \(and none of the first 3 samples"):
        make_loader(str(path))


def test_a_slot_finds_the_one_text_there_is(tmp_path):
    """With two documents one slot may draw the empty one many times in a row; that is no reason to give up."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": ""}\n{"text": "x"}\n')
    for seed in range(5):
        tokens = next(make_loader(str(path), micro=12, seed=seed)).tokens.tolist()
        assert tokens == tokens[:2] * (12 * SEQUENCE_LENGTH // 2)
        assert tokens[1] == END_OF_TEXT


def test_a_tokenizer_without_an_ending_is_refused(path, tmp_path):
    settings = json.loads(Path(TOKENIZER, "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    # Truncation and padding that a file asks for are for inference: documents stay whole.
    tokenizer = json.loads(Path(TOKENIZER, "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"end_of_document = True: expected an eos_token in '.*'") as raised:
        make_loader(path, tokenizer=str(tmp_path))
    assert "\n" not in str(raised.value)
    other, whole = (
        next(make_loader(path, micro=12, tokenizer=folder, end_of_document=False))
        for folder in (str(tmp_path), TOKENIZER)
    )
    assert torch.equal(other.tokens, whole.tokens)


SCRIPT = """
import multiprocessing, os, signal, sys
from config.options import Data, Training
from data.loader import TokenLoader, _context, _init_worker
from data.packing import filler_row

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    training = Training(steps=1, sequence_length=64, local_batch_size=1, global_batch_size=4)
    loader = TokenLoader(Data(path=(sys.argv[1],), num_workers=2, tokenizer=sys.argv[2]), training, 0, 1, 0)
    next(loader)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    for command in sys.stdin:
        if command == "next\\n":
            for _ in range(40):  # more than is prepared ahead
                next(loader)
        elif command == "close\\n":
            loader.close()
            assert not multiprocessing.active_children()
        elif command == "fail\\n":
            raise RuntimeError("on purpose")
        print("done", flush=True)
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"workers still there after {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def script(path, tmp_path):
    """A process with two workers in a process group of its own, and the workers' numbers."""
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, str(file), path, TOKENIZER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    pids = []
    try:
        pids += map(int, process.stdout.readline().split())
        assert len(pids) == 2, process.stderr.read()
        yield process, pids
    finally:
        process.kill()
        for pid in filter(is_alive, pids):  # what a failed test left
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def tell(process, command):
    process.stdin.write(command + "\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_workers_outlive_stop_signals_to_the_group_and_end_with_close(script):
    process, pids = script
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    assert tell(process, "next") == "done\n"
    assert all(map(is_alive, pids))
    assert tell(process, "close") == "done\n"
    wait_until_ended(pids, 1)
    output, error = process.communicate(timeout=10)
    assert (process.returncode, output, error) == (0, "", "")


def test_workers_end_when_their_parent_is_killed(script):
    process, pids = script
    process.kill()
    wait_until_ended(pids, 5)


def test_a_run_that_fails_does_not_wait_for_its_workers(script):
    process, pids = script
    process.stdin.write("fail\n")
    process.stdin.flush()
    assert process.wait(timeout=10) == 1
    assert process.stderr.read().splitlines()[-1] == "RuntimeError: on purpose"
    wait_until_ended(pids, 5)


def test_rows_of_fillers_are_counted_nowhere(path):
    """Of 12 slots the last of 5 ranks has 3, the first has 2: in rows of 2 they have 2 micro-batches each."""
    first, last = (make_loader(path, rank, 5, micro=2) for rank in (0, 4))
    assert (first.num_micro_batches, first.num_filler_rows) == (2, 8)
    batches = [next(last) for _ in range(2)]
    assert [batch.is_real.tolist() for batch in batches] == [[True] * 32, [True] * 16 + [False] * 16]
    assert last.counts["tokens"] == 48


def test_a_micro_batch_of_another_size_goes_no_further(path, monkeypatch):
    """At ep > 1 buffers rely on it, and other ranks would wait for the rest."""
    short = filler_row(SEQUENCE_LENGTH - 1, 0)._replace(cursor=(0, 0))
    monkeypatch.setattr("data.packing.TextSlot.next_row", lambda *_: short)
    with pytest.raises(AssertionError):
        next(make_loader(path, one_epoch=True))
