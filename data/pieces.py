"""JSON, in lines or over lines, CSV and TSV: records that are pieces of files, each found by its place in an index.

The index has four numbers a record (file, offset, length, line), int64, and is made once, in one pass that holds no
more than the record at hand. A file is never read whole, whatever its kind.
"""

import contextlib
import csv
import functools
import io
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from data.files import cached, each_read, plain_suffix, suffix_of
from data.packing import BadSample
from data.records import Record, mapped_numbers, parse_json
from errors import UserError, reading

_MAX_LINE = 1 << 26  # bytes: what is longer is no document, and would not fit into memory as tokens
_CHUNK = 1 << 20
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\],]', re.DOTALL)
_QUOTE, _COMMA, _OPENING, _CLOSING = ord('"'), ord(","), b"{[", b"}]"
_BOM = b"\xef\xbb\xbf"
csv.field_size_limit(_MAX_LINE)  # the library's own is 128 KiB, for all readers of the process


class Piece(NamedTuple):
    """A record as its file has it."""

    offset: int
    line: int  # from 1, of its first byte
    content: bytes  # at most _MAX_LINE + 1 of it


class Pieces:
    """Files of which each is a sequence of pieces. Small to pickle."""

    def __init__(self, files: list[str]) -> None:
        self._files = files

    def pieces(self, stream: BinaryIO, file: str) -> Iterator[Piece]:
        """The records of a file that is open."""
        raise NotImplementedError

    def parse(self, piece: Piece, file: str) -> Record:
        """Raises BadSample."""
        return _parsed(piece.content)

    def naming(self, file: str) -> str:
        """What people call a record, by its `line` and its `number` in the file, both from 1."""
        return "line {line}"

    @functools.cached_property
    def _plain(self) -> list[str]:
        return [_unpacked(file) for file in self._files]

    @functools.cached_property
    def _index(self) -> Path:
        def make(path: Path) -> None:
            with open(path, "wb") as index:
                for number, file in enumerate(self._plain):
                    with _open_packed(file) as stream:
                        for offset, line, content in self.pieces(stream, file):
                            index.write(struct.pack("<4q", number, offset, len(content), line))

        return cached(self._plain, f"{type(self).__name__}, 2", ".index", make)  # 1: of lines alone

    def _place(self, index: int) -> tuple[int, int, int, int]:
        number, offset, length, line = mapped_numbers(self._index)[4 * index : 4 * index + 4].tolist()
        return number, offset, length, line

    def __len__(self) -> int:
        return self._index.stat().st_size // 32

    def __getitem__(self, index: int) -> Record:
        number, offset, length, line = self._place(index)
        with open(self._plain[number], "rb") as file:  # kept open, many files would be too many
            file.seek(offset)
            content = file.read(length)
        return self._read(Piece(offset, line, content), self._plain[number])

    def where(self, index: int) -> str:
        number, _, _, line = self._place(index)
        first = np.searchsorted(mapped_numbers(self._index)[::4], number)
        name = self.naming(self._files[number]).format(line=line, number=index - int(first) + 1)
        return f"{self._files[number]}, {name}"

    def head(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        for file in self._files:
            naming = self.naming(file)
            with _open_packed(file) as stream:
                for number, piece in enumerate(self.pieces(stream, file), start=1):
                    where = f"{file}, {naming.format(line=piece.line, number=number)}"
                    yield where, functools.partial(self._read, piece, file)

    def _read(self, piece: Piece, file: str) -> Record:
        try:
            if len(piece.content) > _MAX_LINE:
                raise BadSample("too_long", f"has more than {_MAX_LINE:,} bytes")
            return self.parse(piece, file)
        except BadSample as error:
            error.raw = piece.content
            raise


class JsonLines(Pieces):
    """`.jsonl`: an object a line, empty lines aside; or, under that name, a list of objects or objects over several
    lines."""

    def pieces(self, stream: BinaryIO, file: str) -> Iterator[Piece]:
        form = _form(stream, file)
        return _lines(stream, file) if form == "lines" else _elements(stream, file, int(form == "list"))

    def naming(self, file: str) -> str:
        with contextlib.suppress(UserError), _open_packed(file) as stream:  # it may be gone by now
            if _form(stream, file) == "list":
                return "line {line} (element {number})"
        return super().naming(file)


class JsonFiles(JsonLines):
    """The same, of which some are `.json`. A checkpoint has the name of what it read."""


class CsvFiles(Pieces):
    """`.csv` and `.tsv`: a row a record, whose fields the first row names. Every value is a text."""

    def pieces(self, stream: BinaryIO, file: str) -> Iterator[Piece]:
        rows = _rows(stream, file)
        _names(next(rows, None), file)
        return rows

    def parse(self, piece: Piece, file: str) -> Record:
        names, values = _header(file, os.stat(file).st_mtime_ns), _cells(piece.content, file)
        if len(values) != len(names):
            raise BadSample("not_csv", f"has {len(values)} values, the first line names {len(names)} fields")
        return {name: value for name, value in zip(names, values) if name}


@functools.lru_cache(maxsize=1024)
def _header(file: str, changed: int) -> list[str]:
    """The names of a file's fields, as it is since `changed`."""
    with _open_packed(file) as stream:
        return _names(next(_rows(stream, file), None), file)


def _names(first: Piece | None, file: str) -> list[str]:
    """What the first row of a file names; one name may be empty, as of an index that was written too. Raises
    UserError."""
    if first is None:
        return []
    try:
        names = [name.strip() for name in _cells(first.content.removeprefix(_BOM), file)]
    except BadSample as error:
        raise UserError(f"{file}, line 1: {error}: expected the names of the fields") from None
    if len(set(names)) < len(names) or not any(names):
        raise UserError(f"{file}, line 1: {', '.join(names)!r:.200}: expected the names of the fields, each once")
    return names


def _cells(content: bytes, file: str) -> list[str]:
    """The values of a row. Raises BadSample."""
    try:
        rows = list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter=_delimiter(file), strict=True))
    except UnicodeDecodeError as error:
        raise BadSample("undecodable", f"is not UTF-8: {error}") from None
    except (csv.Error, ValueError) as error:
        raise BadSample("not_csv", f"is no row of CSV: {error}") from None
    if len(rows) != 1:
        raise BadSample("not_csv", "is no row of CSV: it has CR without LF outside of quotes")
    return rows[0]


def _delimiter(file: str) -> str:
    return "\t" if plain_suffix(file) == ".tsv" else ","


def _rows(stream: BinaryIO, file: str) -> Iterator[Piece]:
    """The rows, the first included, empty lines aside. One that is no CSV ends with its line; a quotation that is not
    ended would swallow all others, so it is a UserError."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in each_read(file, iter(lambda: stream.readline(_MAX_LINE + 1), b"")):
            taken.append(line)
            # The mark before a quote would make it a part of the text.
            line = line.removeprefix(_BOM) if len(taken) == 1 and not offset else line
            yield line.decode("latin-1")  # a character a byte: only quotes, delimiters and line ends matter

    offset, line = 0, 1
    reader = csv.reader(lines(), delimiter=_delimiter(file), strict=True)
    while True:
        try:
            row: list[str] | None = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = None
            if "end of data" in str(error) or "limit" in str(error):
                raise UserError(
                    f"{file}, line {line}: a quoted text is not ended, or has more than {_MAX_LINE:,} bytes: expected "
                    'a second "'
                ) from None
        content = b"".join(taken)
        if row != []:
            yield Piece(offset, line, content[: _MAX_LINE + 1])
        offset, line = offset + len(content), line + len(taken)
        taken.clear()


def _parsed(content: bytes) -> Record:
    """The object in a line, or in an element of a list."""
    try:
        text = content.decode("utf-8-sig")  # each of several files that were put together may have a mark
        record = parse_json(text)
    except UnicodeDecodeError as error:
        raise BadSample("undecodable", f"is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("not_json", f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadSample("not_json", f"is {record!r:.60}, expected a JSON object")
    return record


def _lines(stream: BinaryIO, file: str) -> Iterator[Piece]:
    """Each line of two characters or more: fewer make no object. Of one of more than _MAX_LINE bytes only the beginning
    is kept."""
    offset = number = 0
    is_rest = False  # of the line before
    for line in each_read(file, iter(lambda: stream.readline(_MAX_LINE + 1), b"")):
        if not is_rest:
            number += 1
            if len(line.strip()) > 1:
                yield Piece(offset, number, line)
        offset += len(line)
        is_rest = not line.endswith(b"\n")


def _form(stream: BinaryIO, file: str) -> Literal["lines", "list", "objects"]:
    """How a file holds its objects, by its first lines. Those of JSON Lines may be damaged, so what may be lines is."""
    with reading(file):
        assert isinstance(stream, io.BufferedReader)
        start = stream.peek(_CHUNK).removeprefix(_BOM).lstrip()
    first, _, rest = start.partition(b"\n")
    if start[:1] == b"[" and plain_suffix(file) == ".json":
        return "list"
    brackets = [token[0] for token in _TOKEN.finditer(first)]
    is_open = sum((token in (b"{", b"[")) - (token in (b"}", b"]")) for token in brackets) > 0
    following, end, _ = rest.lstrip().partition(b"\n")
    is_known = bool(rest) and (bool(end) or len(start) < _CHUNK // 2)
    goes_on = first.rstrip()[-1:] in (b"{", b"[", b",", b":") and following[:1] in (b'"', b"{", b"[")
    if (
        start[:1] not in (b"{", b"[")
        or not (is_open and is_known and goes_on)
        or b'"' in brackets
        or _is_object(following)
    ):
        return "lines"
    return "list" if start[:1] == b"[" else "objects"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _elements(stream: BinaryIO, file: str, inside: int) -> Iterator[Piece]:
    """The elements of a list (`inside` = 1), or objects one after the other (0), by their brackets and quotes alone:
    what is damaged inside of one is its own affair. Of one of more than _MAX_LINE bytes only the beginning is kept."""
    buffer, start = b"", 0  # what is looked at, and its offset in the file
    position = begin = 0  # in the buffer: what comes next, and where the element began
    depth = 1 - inside
    line, counted = 1, 0  # line ends before `counted`, in the buffer
    kept: Piece | None = None  # the beginning of an element that is too long
    is_over = False
    wanted = [_CHUNK]  # bytes to read: twice as many again where a text does not end, so that it is looked at few times
    for chunk in each_read(file, iter(lambda: stream.read(wanted[0]), b"")):
        buffer += chunk
        resume = len(buffer)
        if is_over and buffer.strip():
            raise _no_list(file, line, "has something behind its end")
        for token in () if is_over else _TOKEN.finditer(buffer, position):
            place = token.start()
            byte = buffer[place]
            if byte == _QUOTE:
                if token.end() == place + 1:  # its end is not in the buffer yet
                    resume = place
                    break
            elif byte in _OPENING:
                depth += 1
                begin = place + 1 if depth == inside else begin
            elif byte in _CLOSING:
                depth -= 1
            is_object = depth == 1 and not inside and byte in _CLOSING
            if depth == 0 or is_object or (byte == _COMMA and depth == 1):
                content = buffer[begin : place + is_object]
                first = begin + len(content) - len(content.lstrip())
                line, counted = line + buffer.count(b"\n", counted, first), max(first, counted)
                if kept or content.strip():
                    yield kept or Piece(start + first, line, content.strip()[: _MAX_LINE + 1])
                begin, kept = place + 1, None
            if depth == 0:
                is_over = True
                if buffer[begin:].strip():
                    raise _no_list(file, line, "has something behind its end")
                break
        if is_over:
            buffer, start, position, begin, counted = b"", start + len(buffer), 0, 0, 0
            continue
        if resume - begin > _MAX_LINE:
            first = begin + len(buffer[begin:resume]) - len(buffer[begin:resume].lstrip())
            if kept is None:
                line, counted = line + buffer.count(b"\n", counted, first), max(first, counted)
                kept = Piece(start + first, line, buffer[first : first + _MAX_LINE + 1])
            begin = resume
        if len(buffer) - resume > 16 * _MAX_LINE:
            raise _no_list(file, line, "has a text that is not ended")
        drop = min(begin, resume)
        line, counted = line + buffer.count(b"\n", counted, drop), max(counted - drop, 0)
        buffer, start, position, begin = buffer[drop:], start + drop, resume - drop, begin - drop
        wanted[0] = max(_CHUNK, len(buffer))
    if not is_over and (inside or depth > 1 or buffer[begin:].strip()):
        line += buffer.count(b"\n", counted, len(buffer) - len(buffer[begin:].lstrip()))
        raise _no_list(file, line, "is not ended")


def _no_list(file: str, line: int, why: str) -> UserError:
    return UserError(
        f"{file}, line {line}: what begins the file {why}: expected [{{...}}, {{...}}], or an object a line"
    )


def _open_packed(file: str) -> BinaryIO:
    """What a file holds, or what a `.gz` or `.zst` file does."""
    with reading(file):
        if suffix_of(file) == plain_suffix(file):
            return open(file, "rb", _CHUNK)
        import pyarrow as pa

        packing = "gzip" if suffix_of(file).endswith(".gz") else "zstd"
        if not os.path.getsize(file):  # what holds nothing still has a header
            raise UserError(f"{file} is empty: expected what {packing} packs, also of nothing")
        return io.BufferedReader(pa.input_stream(file, compression=packing), _CHUNK)


def _unpacked(file: str) -> str:
    """A file of the cache with what a `.gz` or `.zst` holds; any other as it is."""
    suffix = plain_suffix(file)
    if suffix_of(file) == suffix:
        return file

    def make(path: Path) -> None:
        with _open_packed(file) as packed, open(path, "wb") as plain:
            plain.writelines(each_read(file, iter(lambda: packed.read(1 << 20), b"")))

    return str(cached([file], "", suffix, make))
