"""The list of samples that a run skipped, turned back into a file of these samples, to be mended and trained on."""

import base64
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from config.options import Config
from data.packing import USED, BadSample, in_one_line
from data.records import Record
from data.sources import declared_sources
from errors import UserError, reading, regular_file


def write_skipped(config: Config, folder: Path, out: Path) -> str:
    """Writes each sample that the files in `folder` list to `out`, a line each: its fields, and under "skipped" where
    it is and what is wrong with it; of one that has no fields its text, under "raw". Returns what was done, in words.
    Raises UserError."""
    notes = _read_notes(folder)
    # The note begins with the place of its sample, then ": "; a place may have that inside as well.
    by_place = {text[:end]: text for text in notes for end in _ends(text)}
    found = Counter[str]()
    try:
        with open(out, "x", encoding="utf-8") as file:
            for where, record in _records(config):
                place = in_one_line(where)
                text = by_place.get(place)
                if text is None or found[text]:
                    continue
                found[text] += 1
                about = {"where": place, "reason": notes[text], "message": text[len(place) + 2 :]}
                note = {"skipped": about}  # first in its line, and in the place of one from before
                file.write(json.dumps(note | _fields(record) | note, default=_as_json) + "\n")
    except OSError as error:
        raise UserError(f"OUT = {str(out)!r}: {error.strerror}: expected a new file in a folder that exists") from None
    missing = [text for text in notes if not found[text]]
    more = f"; {len(missing)} are not in the data any more, the first: {missing[0]}" if missing else ""
    return f"{out}: {len(found):,} of {len(notes):,} samples{more}"


def _read_notes(folder: Path) -> dict[str, str]:
    """Of each sample that was skipped what the list says, with its reason."""
    files = sorted(folder.glob("rank-*.jsonl"))
    if not files:
        raise UserError(f"--skipped {str(folder)!r}: expected the folder skipped/ of a run that has skipped some")
    notes: dict[str, str] = {}
    for path in files:
        with reading(path):
            lines = [json.loads(line) for line in regular_file(path).read_text(encoding="utf-8").splitlines()]
            notes |= {line["sample"]: line["reason"] for line in lines if line["reason"] not in USED}
    return notes


def _ends(text: str) -> Iterator[int]:
    end = text.find(": ")
    while end >= 0:
        yield end
        end = text.find(": ", end + 1)


def _records(config: Config) -> Iterator[tuple[str, Any]]:
    """All records of training and validation, in the files' order."""
    paths = (*config.data.path, *itertools.chain(*config.validation.entries.values()))
    for _, source in declared_sources(replace(config.data, path=paths)):
        yield from source.head()


def _fields(read: Any) -> dict[str, Any]:
    """The fields of a record; or, of one that cannot be read, its text."""

    def fields(record: Record) -> dict[str, Any]:
        return record if isinstance(record, dict) else {}

    try:
        return fields(read())
    except BadSample as error:
        return {"raw": error.raw.decode(errors="backslashreplace")} if error.raw is not None else {}
    except RecursionError:
        return {}


def _as_json(value: object) -> object:
    """What JSON has no form for: bytes as a source of an image or a video may stand, and as no text could be taken for;
    and dates of a table."""
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)
