"""training.epochs: every sample so often, the last step known before, any layout, stopped and resumed anywhere."""

import collections
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from config.options import Data, Training
from data import epochs
from data.epochs import most_rows
from data.loader import TokenLoader
from data.tokenizer import load_tokenizer
from errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "data" / "tiny" / "tokenizer")
NUM_SLOTS, SEQUENCE_LENGTH = 6, 48


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """53 samples of each kind, of very different lengths; some cannot be used."""
    folder = tmp_path_factory.mktemp("epochs")
    lengths = [*np.random.default_rng(7).integers(1, 40, 50).tolist(), 300, 700, 20]
    lines = [json.dumps({"text": f"{number} " + "word " * length}) for number, length in enumerate(lengths)]
    (folder / "text.jsonl").write_text("\n".join([*lines[:9], "no JSON", *lines[9:]]))
    turns = [
        [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": "word " * (length % 17) + "."},
        ]
        for number, length in enumerate(lengths)
    ]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (folder / "chat.jsonl").write_text("\n".join([*lines[:9], "{}", *lines[9:]]))
    return {kind: str(folder / f"{kind}.jsonl") for kind in ("text", "chat")}


@pytest.fixture(autouse=True, scope="module")
def _one_tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loader.load_tokenizer", functools.cache(load_tokenizer))
        yield


def make_loader(paths, kind, epochs, rank=0, ranks=1, workers=0, **data):
    training = Training(epochs=epochs, sequence_length=SEQUENCE_LENGTH, global_batch_size=NUM_SLOTS)
    options = Data(path=(paths[kind],), format=kind, tokenizer=TOKENIZER, num_workers=workers, **data)
    return TokenLoader(options, training, rank, ranks, 5)


def read(loaders, num_steps):
    """The documents of the next steps, as tuples of tokens without fillers, and how many tokens each step has."""
    documents, tokens = [], []
    for _ in range(num_steps):
        tokens.append(0)
        for loader in loaders:
            for _ in range(loader.num_micro_batches):
                batch = next(loader)
                starts = batch.documents.cu_seqlens.tolist()
                for begin, end in itertools.pairwise(starts):
                    if batch.is_real[begin]:
                        documents.append(tuple(batch.tokens[begin:end].tolist()))
                        tokens[-1] += end - begin
    return documents, tokens


def all_tokens(documents):
    return collections.Counter(token for document in documents for token in document)


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_last_step_that_is_counted_has_the_last_sample(paths, kind, epochs):
    loader = make_loader(paths, kind, epochs)
    num_steps = loader.num_steps_left()
    documents, tokens = read([loader], num_steps)
    assert tokens[-1] > 0
    assert read([loader], 2) == ([], [0, 0])
    once = make_loader(paths, kind, 1)
    of_one_epoch, _ = read([once], once.num_steps_left())
    expected = all_tokens(of_one_epoch)
    assert all_tokens(documents) == collections.Counter({token: epochs * n for token, n in expected.items()})
    if kind == "chat":  # whole samples: each of the 53, so often
        assert set(collections.Counter(documents).values()) == {epochs}
        assert len(set(documents)) == 53


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize(("ranks", "stop"), [(1, 1), (2, 5), (3, 9), (4, 11)])
def test_it_goes_on_from_anywhere_on_any_layout_to_the_same_last_step(paths, kind, ranks, stop):
    first = make_loader(paths, kind, 2)
    num_steps = first.num_steps_left()
    before, _ = read([first], stop)
    loaders = [make_loader(paths, kind, 2, rank, ranks) for rank in range(ranks)]
    for loader in loaders:
        loader.load_cursors(first.cursors)
    assert max(loader.num_steps_left() for loader in loaders) == num_steps - stop
    after, _ = read(loaders, num_steps - stop)
    whole = make_loader(paths, kind, 2)
    assert collections.Counter(before + after) == collections.Counter(read([whole], num_steps)[0])
    assert read(loaders, 1)[0] == []


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_more_epochs_may_follow_and_fewer_are_refused(paths, kind):
    first = make_loader(paths, kind, 1)
    documents, _ = read([first], first.num_steps_left())
    more = make_loader(paths, kind, 2.5)
    more.load_cursors(first.cursors)
    documents += read([more], more.num_steps_left())[0]
    if kind == "chat":
        times = collections.Counter(documents)
        assert len(times) == 53
        assert set(times.values()) == {2, 3}
        assert abs(sum(times.values()) - 2.5 * 53) <= 2  # the unusable line is a sample too
    fewer = make_loader(paths, kind, 0.5)
    with pytest.raises(UserError, match=r"training\.epochs = 0\.5: the checkpoint has read more: expected more"):
        fewer.load_cursors(more.cursors)


def test_of_many_files_some_are_looked_at_again(monkeypatch):
    monkeypatch.setattr(epochs, "_MOST_FILES", 4)
    sizes = {f"{number}.png": number if number % 3 else -1 for number in range(100)}
    chosen = epochs._looked_at(sizes)
    assert chosen.items() <= sizes.items()
    for is_there in (False, True):
        assert 2 <= sum((size >= 0) == is_there for size in chosen.values()) <= 4
    assert epochs._looked_at({}) == {}
    assert epochs._looked_at(dict(list(sizes.items())[:4])) == dict(list(sizes.items())[:4])


def test_slots_end_at_about_the_same_step(paths):
    """No further apart than the longest sample, of 15 rows, is long; dealt in turn they would be."""
    loader = make_loader(paths, "text", 4)
    of_slots = [most_rows(loader._packer, [(slot, 0)], SEQUENCE_LENGTH) for slot in range(NUM_SLOTS)]
    packer = loader._packer._replace(samples=loader._packer.samples.in_order())
    in_turn = [most_rows(packer, [(slot, 0)], SEQUENCE_LENGTH) for slot in range(NUM_SLOTS)]
    print(of_slots, in_turn)
    assert max(of_slots) - min(of_slots) <= 15 < max(in_turn) - min(in_turn)


def test_a_bad_sample_is_told_before_the_run_if_it_is_an_error(paths):
    with pytest.raises(UserError, match=r"text\.jsonl, line 10: is not JSON"):
        make_loader(paths, "text", 1, on_bad_sample="error")


def test_with_workers_it_is_the_same(paths):
    alone, helped = make_loader(paths, "text", 1), make_loader(paths, "text", 1, workers=2)
    try:
        num_steps = alone.num_steps_left()
        assert helped.num_steps_left() == num_steps
        for _ in range(num_steps * alone.num_micro_batches):
            assert torch.equal(next(alone).tokens, next(helped).tokens)
    finally:
        helped.close()
