"""The stream of epochs over sources: every record once an epoch, shares by weight, errors that name the place."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.options import Data
from data.batch import Sample
from data.packing import BadSample
from data.records import Whole
from data.samples import EncodeText, Samples, open_samples, read_sample
from data.tokenizer import load_tokenizer
from models.ops.labels import IGNORED


class Numbers(Whole):
    """Records whose number is `first` and on."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"number": self.first + index}

    def where(self, index: int) -> str:
        return f"numbers, record {index}"


def encode(record: object) -> Sample:
    if record["number"] == 13:  # type: ignore[index]
        raise BadSample("empty", "is unlucky")
    return Sample.of(np.array([record["number"], 0], np.int32))  # type: ignore[index]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4), st.sampled_from([None, 0, 2**63 - 1]), st.booleans(),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 7), st.data(),
)  # fmt: skip
def test_a_reader_gives_what_reading_one_sample_gives(sizes, seed, is_weighted, jumps, stride, data):
    """Wherever it is sent, and for longer than it looks ahead."""
    sources = [Numbers(100 * place, size) for place, size in enumerate(sizes)]
    weights = [float(place + 1) for place in range(len(sizes))] if is_weighted else ()
    samples = Samples(sources, weights, lambda record: Sample.of(np.array([record["number"]])), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.samples._AHEAD", data.draw(st.integers(1, 10)))
        read = samples.reader(stride)
        for first, number in jumps:
            for sample in range(first, first + number * stride, stride):
                assert read(sample).tokens.tolist() == samples.read(sample).tokens.tolist()


def numbers_of(samples: Samples, of: range) -> list[int]:
    return [int(samples.read(number).tokens[0]) for number in of]


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
def test_each_epoch_has_every_record_once(seed: int | None) -> None:
    samples = Samples([Numbers(20, 7), Numbers(50, 4)], (), encode, seed)
    assert samples.num_documents == 11
    epochs = [numbers_of(samples, range(epoch * 11, epoch * 11 + 11)) for epoch in range(3)]
    everything = [*range(20, 27), *range(50, 54)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert (epochs[0] == everything) == (seed is None)
    assert (epochs[0] == epochs[1]) == (seed is None)


def test_weights_are_shares_of_samples() -> None:
    samples = Samples([Numbers(20, 7), Numbers(50, 4)], (3.0, 1.0), encode, 0)
    counts = Counter(number >= 50 for number in numbers_of(samples, range(8191)))
    assert counts[True] == round(8191 / 4)


def test_special_tokens_in_documents_are_told_once_each() -> None:
    """What others prepared with a template is such a text on purpose, so it is trained on as it is."""
    tokenizer = load_tokenizer("data/tiny/tokenizer").backend_tokenizer
    encode = EncodeText(Data(), tokenizer, None, 1000)
    assert encode({"text": "plain, <think> and <|im|>"}).note is None
    assert encode(np.array([tokenizer.token_to_id("<|im_start|>")], "<u2")).note is None  # of a corpus made elsewhere
    sample = encode({"text": "a<|endoftext|>b<|im_start|>c"})
    assert sample.note is not None
    reason, message = sample.note
    assert reason == "special_in_text"
    assert message.startswith("has <|endoftext|>, <|im_start|> in its text: taken for these special tokens")
    assert (sample.labels != IGNORED).sum() == len(sample.tokens) - 1
    assert encode({"text": "<|im_start|>"}).note is None
    assert "<|im_end|>" in str(encode({"text": "x<|im_end|>"}).note)


def test_a_special_token_in_the_first_document_is_told_after_the_check_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x<|im_end|>"}) + "\n")
    data = Data(path=(str(tmp_path / "a.jsonl"),), tokenizer="data/tiny/tokenizer")
    note = open_samples(data, load_tokenizer(data.tokenizer), 64, 0).read(0).note
    assert note is not None
    assert note[0] == "special_in_text"


def test_a_refusal_names_the_place() -> None:
    samples = Samples([Numbers(10, 7)], (), encode, None)
    with pytest.raises(BadSample, match=r"^numbers, record 3: is unlucky$"):
        samples.read(3)


@pytest.mark.parametrize("error", [TypeError("x"), RecursionError(), KeyError("y"), ZeroDivisionError()])
def test_any_error_of_a_sample_is_its_refusal(error: Exception) -> None:
    def fail(record: object) -> Sample:
        raise error

    with pytest.raises(BadSample, match=r"^here: ") as raised:
        read_sample(dict, fail, lambda: "here")
    assert raised.value.reason
