"""Samples: the endless, shuffled stream of epochs over the sources, each sample as tokens and what is trained on."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from config.options import Config, Data
from data.batch import Sample
from data.chat import ChatTemplate, texts_in
from data.files import find_files, is_dataset
from data.held_out import ALL, Side, ends_of
from data.layouts import in_words, read_layout
from data.media import Media, MediaReader, MediaSettings, has_fields, has_media, show_all
from data.packing import BadSample
from data.records import Record, Source, TokenisedChat, mapped_numbers
from data.shuffle import permutation, permute
from data.sources import declared_sources, open_sources
from data.tokenizer import template_in
from errors import UserError
from models.ops.labels import IGNORED

if TYPE_CHECKING:  # seconds to import, and of no use to workers that read text
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[Record], Sample]
T = TypeVar("T")

_BLOCK = 8191  # a prime: whatever the number of slots, each of them meets all places
_AHEAD = 1024  # samples
_NUM_CHECKED = 100
_MOST_NAMED = 8  # entries
_NUM_FILES, _NUM_OF_EACH = 16, 10  # looked into for images: a Parquet file's first group of rows may be large
_NUM_SAMPLED, _SAMPLED_LENGTH = 20, 2000
_OTHER_SEEDS = 2**64  # seeds are below


class Samples:
    """Sample v is document perm(v % N) of the sources' N, with the permutation of epoch v // N.

    With weights, each source has its own epochs, and every _BLOCK samples take from each source its share, in an order
    drawn once. Small to pickle: a worker process opens the sources' files itself.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        encode: Encode,
        seed: int | None,
        made_by: tuple[Any, ...] = (),
        media: MediaReader | None = None,
    ) -> None:
        """`weights`: of the sources, or none. `seed`: None for the documents' own order. `made_by`: beside [data] and
        the tokenizer, what decides how many tokens a sample has. `media`: what `encode` reads images and videos by."""
        self.made_by = made_by
        self._deal: Path | None = None
        self._sources, self._encode, self.seed, self.media = sources, encode, seed, media
        self._starts = np.array(list(itertools.accumulate(map(len, sources), initial=0)), np.int64)
        self.num_documents = int(self._starts[-1])
        """N."""
        bounds = np.rint(np.cumsum(weights) / (sum(weights) or 1) * _BLOCK)
        order = permutation(_BLOCK if weights else 0, (seed or 0) + _OTHER_SEEDS, 0)
        self._source_of = np.searchsorted(bounds, order, side="right")  # place in a block -> source
        self._counts = np.bincount(self._source_of, minlength=len(sources))
        self._rank = np.zeros(len(order), np.int64)  # place in a block -> how many samples of the same source before
        for number, count in enumerate(self._counts):
            self._rank[self._source_of == number] = np.arange(count)

    def in_order(self) -> "Samples":
        """The same documents in their own order."""
        return Samples(self._sources, (), self._encode, None, media=self.media)

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """[N], the documents of the samples of an epoch; without weights."""
        if self.seed is None:
            return np.arange(self.num_documents)
        return permutation(self.num_documents, self.seed, epoch)

    def dealt(self, deal: Path) -> "Samples":
        """The same documents in an order of some epochs that a file has: int64, the document of each sample."""
        samples = copy.copy(self)
        samples._deal = deal
        return samples

    def documents(self, samples: range) -> NDArray[np.int64]:
        """Which of the N each of these is, as far as they are dealt; without weights."""
        if self._deal is not None:
            return mapped_numbers(self._deal)[samples.start : samples.stop : samples.step]
        return self._permuted(_array(samples), self.num_documents)

    def find(self, samples: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each of these, as far as they are dealt: which source has it, and the record's number there."""
        if not len(self._rank):
            documents = self.documents(samples)
            owners = np.searchsorted(self._starts, documents, side="right") - 1
            return owners, documents - self._starts[owners]
        blocks, places = np.divmod(_array(samples), _BLOCK)
        owners = self._source_of[places]
        indices = blocks * self._counts[owners] + self._rank[places]
        for owner in np.unique(owners).tolist():
            own = owners == owner
            indices[own] = self._permuted(indices[own], len(self._sources[owner]), owner)
        return owners, indices

    def _permuted(self, indices: NDArray[np.int64], size: int, owner: int = 0) -> NDArray[np.int64]:
        epochs, indices = np.divmod(indices, size)
        return indices if self.seed is None else permute(indices, size, self.seed + 2 * owner * _OTHER_SEEDS, epochs)

    def reader(self, stride: int = 1) -> Callable[[int], Sample]:
        """`read` for one who reads each sample `stride` behind the one before: where they are is worked out for many at
        once. Nothing is read ahead."""
        begin, (owners, indices) = 0, self.find(range(0))

        def read(sample: int) -> Sample:
            nonlocal begin, owners, indices
            place, rest = divmod(sample - begin, stride)
            if rest or not 0 <= place < len(owners):
                begin, place = sample, 0
                owners, indices = self.find(range(begin, begin + _AHEAD * stride, stride))
            return self._read(self._sources[owners[place]], int(indices[place]))

        return read

    def read(self, sample: int) -> Sample:
        """Raises BadSample, which names the place of the record."""
        (owner,), (index,) = self.find(range(sample, sample + 1))
        return self._read(self._sources[owner], int(index))

    def _read(self, source: Source, index: int) -> Sample:
        where = functools.partial(source.where, index)
        read = read_sample(functools.partial(source.__getitem__, index), self._encode, where)
        if read.media:
            decoders = [functools.partial(_decode, medium.decode, where) for medium in read.media]
            read = read._replace(media=[m._replace(decode=decode) for m, decode in zip(read.media, decoders)])
        if read.note is None:
            return read
        reason, message = read.note
        return read._replace(note=(reason, f"{where()}: {message}"))


def _array(numbers: range) -> NDArray[np.int64]:
    return np.arange(numbers.start, numbers.stop, numbers.step, dtype=np.int64)


def _decode(decode: Callable[[], T], where: Callable[[], str]) -> T:
    """What `decode` makes of an image or a video. Whatever it raises is the record's fault, as in `read_sample`."""
    return read_sample(dict, lambda _: decode(), where)


def read_sample(record: Callable[[], Record], encode: Callable[[Record], T], where: Callable[[], str]) -> T:
    """A record as a sample. Whatever its reading or its encoding raise is the record's fault: it ends as BadSample with
    its place. What the system refuses, such as a file that is gone, ends the run as UserError."""
    try:
        return encode(record())
    except BadSample as error:
        raise BadSample(error.reason, f"{where()}: {error}") from None
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except RecursionError:
        raise BadSample("wrong_type", f"{where()}: is nested too deeply") from None
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{where()} cannot be read: {error.strerror}") from error
        raise BadSample("failed", f"{where()}: {type(error).__name__}: {error}") from error


def check_source(source: Source, encode: Callable[[Record], object]) -> bool:
    """Whether a source has records. Raises UserError if nothing can be used, judging from the first of them."""
    errors: list[BadSample] = []
    for where, record in itertools.islice(source.head(), _NUM_CHECKED):
        try:
            read_sample(record, encode, functools.partial(str, where))
            return True
        except BadSample as error:
            errors.append(error)
    if errors:
        raise UserError(f"{errors[0]} (and none of the first {len(errors)} samples can be used)")
    return False


def shows_media(config: Config) -> bool:
    """Whether any of the first records of the data, or of what is validated with, has images or videos. Looks into each
    file, or into some of many: those of one entry may be texts here and images there."""
    shows = functools.partial(has_media, data=config.data)
    for entry in (*config.data.path, *itertools.chain(*config.validation.entries.values())):
        if is_dataset(entry):
            files = [entry] if os.path.isdir(entry) else []  # what is on the Hub may have to be fetched
        else:
            files = find_files(entry, split=config.data.split)
            files = files[:: -(-len(files) // _NUM_FILES)]
        for _, source in declared_sources(dataclasses.replace(config.data, path=tuple(files))):
            for _, record in itertools.islice(source.head(), max(_NUM_CHECKED // len(files), _NUM_OF_EACH)):
                with contextlib.suppress(BadSample):
                    if read_sample(record, shows, str):
                        return True
    return False


def data_in_words(data: Data) -> str:
    """What each entry of `data.path` is, by the fields of its first records, in one line."""
    entries, declared = [], list(declared_sources(data))
    for entry, source in declared[:_MOST_NAMED]:
        found: dict[str, None] = {}  # in order
        for _, record in itertools.islice(source.head(), _NUM_CHECKED):
            with contextlib.suppress(BadSample):
                found[read_sample(record, lambda fields: in_words(fields, data), str)] = None
        entries.append(f"{entry}: {' and '.join(found) or 'nothing that can be used'}")
    others = [f"{len(declared) - _MOST_NAMED} other entries"] if len(declared) > _MOST_NAMED else []
    return "data: " + "; ".join(entries + others)


def sample_texts(data: Data) -> list[str]:
    """Some texts of the first records of each source, cut, by which tokenizers are compared. Whatever cannot be read is
    left out; a tokenised corpus has none."""
    texts: list[str] = []
    for _, source in declared_sources(data):
        for _, record in itertools.islice(source.head(), _NUM_SAMPLED):
            with contextlib.suppress(BadSample):
                fields = read_sample(record, lambda fields: fields, str)
                texts += [text[:_SAMPLED_LENGTH] for text in texts_in(fields)] if isinstance(fields, dict) else []
    return texts


class EncodeText:
    """A document: every token is trained on but the first, and those of images and videos."""

    def __init__(
        self,
        data: Data,
        tokenizer: Tokenizer,
        end_of_document: int | None,
        max_tokens: int,
        reader: MediaReader | None = None,
    ) -> None:
        """`end_of_document`: the token to append to each document. `max_tokens`: of an image or a video, which
        `reader` reads."""
        self._data, self._tokenizer, self._max_tokens, self._reader = data, tokenizer, max_tokens, reader
        self._ending = np.array([] if end_of_document is None else [end_of_document], np.int32)
        self._special = {n: token.content for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        """Those that no note has named yet."""

    def __call__(self, record: Record) -> Sample:
        if isinstance(record, dict):
            is_shown = self._reader is not None and has_fields(record, self._data)  # else they are nobody's business
            if is_shown or has_media(record, self._data):
                return self._with_media(record)
        assert not isinstance(record, TokenisedChat)
        text = self._tokenise(text_of(record, self._data.text_key)) if isinstance(record, dict) else record
        if not len(text):
            raise BadSample("empty", "has no text")
        tokens = np.concatenate([text, self._ending], dtype=np.int32, casting="unsafe")
        if self._reader is not None:
            self._reader.check_placeholders(tokens, 0)
        sample = Sample(tokens, np.ones(len(tokens), bool))
        if isinstance(record, dict) and self._special and not self._special.keys().isdisjoint(text):
            found = {number: name for number, name in self._special.items() if number in text}
            # Not in place: the copy with which sources are checked names its own.
            self._special = {number: name for number, name in self._special.items() if number not in found}
            message = f"has {', '.join(found.values())} in its text: taken for these special tokens in all documents"
            return sample._replace(note=("special_in_text", message))
        return sample

    def _tokenise(self, text: str) -> list[int]:
        with _refusing_surrogates():
            # The batch method because it alone leaves out the offsets into the text, a third of the time.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def _with_media(self, record: dict[str, Any]) -> Sample:
        media = Media(record, self._data)
        parts = media.in_text(text_of(record, self._data.text_key))
        reader, shown = show_all(media.finish(), self._reader)
        text, ranges = reader.join(parts, shown)
        with _refusing_surrogates():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = np.array([*encoding.ids, *self._ending], np.int32)
        offsets = np.array([*encoding.offsets, *[(len(text), len(text))] * len(self._ending)], np.int64).T
        sample = reader.sample(tokens, offsets, np.ones(len(tokens), bool), ranges, shown)
        longest = max(medium.end - medium.begin for medium in sample.media)
        if longest > self._max_tokens:
            raise BadSample("too_long", f"has an image or a video of {longest} tokens, a row has {self._max_tokens}")
        return sample


@contextlib.contextmanager
def _refusing_surrogates() -> Iterator[None]:
    try:
        yield
    except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair
        raise BadSample("undecodable", f"is no text: {error}") from None


def text_of(record: Record, key: str) -> str:
    """The text of a document. Raises BadSample."""
    assert isinstance(record, dict)
    text = record.get(key)
    if not isinstance(text, str):
        found = f"is {text!r:.60}" if key in record else f"is missing among {', '.join(record)}"
        hint = ""
        with contextlib.suppress(BadSample):
            hint = f", or data.format = 'chat' for its {in_words(record, Data(format='chat'))}"
        raise BadSample("wrong_type", f"data.text_key = {key!r} {found}: expected a string{hint}")
    return text


class EncodeChat:
    """A conversation that fits into `max_tokens`: the assistant's turns are trained on."""

    def __init__(
        self, data: Data, tokenizer: "PreTrainedTokenizerFast", max_tokens: int, reader: MediaReader | None = None
    ) -> None:
        """`reader`: of images and videos."""
        self._data, self._max_tokens = data, max_tokens
        self._template = ChatTemplate(
            tokenizer,
            reader,
            train_on=data.train_on,
            train_empty_thinking=data.train_empty_thinking,
            options=data.template_options,
            template=template_in(data.chat_template),
        )
        self._named = frozenset[str]()  # the ignored fields that a note has named

    def __call__(self, record: Record) -> Sample:
        if isinstance(record, TokenisedChat):
            if record.cut_to not in (None, self._max_tokens):
                raise UserError(
                    f"training.sequence_length = {self._max_tokens}: expected {record.cut_to}, to which data.too_long "
                    "= 'truncate_left' cut the conversations when they were tokenised"
                )
            if not len(record.tokens):
                raise BadSample("empty", "has no tokens")
            if not np.count_nonzero(record.is_trained[1:]):  # a third of the time of any()
                raise BadSample("nothing_to_train", "has no token that is to be trained on")
            sample = Sample(record.tokens, record.is_trained)
        else:
            assert isinstance(record, dict)
            keep = self._max_tokens if self._data.too_long == "truncate_left" else None
            chat = read_layout(record, self._data)
            sample = self._template.sample(chat.messages, chat.tools, Media(record, self._data), chat.options, keep)
        if len(sample.tokens) <= self._max_tokens:
            if sample.note is None and self._template.ignored != self._named:
                new = sorted(self._template.ignored - self._named)
                self._named |= self._template.ignored
                return sample._replace(note=("ignored_field", f"has {', '.join(new)}: ignored in all messages"))
            return sample
        message = f"has {len(sample.tokens)} tokens, more than the {self._max_tokens} of a row"
        if self._data.too_long != "truncate":
            raise BadSample("too_long", message)
        sample = sample.piece(0, self._max_tokens)
        if (sample.labels == IGNORED).all():
            raise BadSample("too_long", f"{message}, and none to train on among the first")
        return sample._replace(note=("truncated", message))


def open_samples(
    data: Data,
    tokenizer: "PreTrainedTokenizerFast",
    max_tokens: int,
    seed: int,
    media: MediaSettings | None = None,
    side: Side = ALL,
) -> Samples:
    """What [data] describes, in rows of `max_tokens`; of it one `side`, if some is held out. Raises UserError, one
    line, if it cannot be used."""
    encode: Encode
    reader = media and MediaReader(media, data.image_folder, tokenizer)
    if data.format == "chat":
        encode = EncodeChat(data, tokenizer, max_tokens, reader)
    else:
        if data.end_of_document and tokenizer.eos_token_id is None:
            raise UserError(f"data.end_of_document = True: expected an eos_token in {data.tokenizer!r}, or false")
        ending = tokenizer.eos_token_id if data.end_of_document else None
        encode = EncodeText(data, tokenizer.backend_tokenizer, ending, max_tokens, reader)
    sources = open_sources(data, side)
    for source in sources:
        check_source(source, copy.copy(encode))  # a copy, so that the workers name ignored fields themselves
    made_by = (max_tokens, side, media and media.rules, [ends_of(source, data) for source in sources if len(source)])
    return Samples(sources, data.weights, encode, seed if data.shuffle else None, made_by, reader)
