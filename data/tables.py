"""Tables: Parquet files and what the library `datasets` keeps, of which only the needed columns are read."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from config.options import Data
from data.files import cached, each_read
from data.layouts import fields_of, optional_fields, preferences_in, preferences_refused
from data.media import media_keys
from data.packing import BadSample
from data.records import Record, Whole, part_of
from errors import UserError, reading

if TYPE_CHECKING:  # slow to import, and of no use where there are JSON Lines alone
    import datasets
    import pyarrow as pa


class Columns(NamedTuple):
    """Which columns of a table a sample needs."""

    key: str  # the option that names the first of them
    needed: tuple[tuple[str, ...], ...]  # all of one of these
    others: tuple[str, ...]  # it may have these too

    @classmethod
    def of(cls, data: Data) -> "Columns":
        media = [key for keys in media_keys(data).values() for key in keys]
        if data.format == "text":
            return cls("data.text_key", ((data.text_key,),), tuple(media))
        needed = tuple(fields_of(data).values())
        return cls("data.messages_key", needed, tuple(dict.fromkeys([*optional_fields(data), *media])))

    def among(self, present: list[str], where: str) -> list[str]:
        """Those that there are. Raises UserError for a table without what a sample needs."""
        if not any(set(names) <= set(present) for names in self.needed):
            if compared := preferences_in(present):
                raise UserError(f"{where} {preferences_refused(compared)}")
            others = "".join(f", or {' and '.join(map(repr, names))}" for names in self.needed[1:])
            raise UserError(
                f"{self.key} = {self.needed[0][0]!r}: expected one of {', '.join(present)}{others}, as in {where}"
            )
        return [name for name in self.names() if name in present]

    def names(self) -> list[str]:
        return list(dict.fromkeys([*itertools.chain(*self.needed), *self.others]))


def _row(table: "pa.Table | pa.RecordBatch") -> Record:
    """The one row of a table. Raises BadSample."""
    try:
        (record,) = table.to_pylist()
    except UnicodeDecodeError as error:
        raise BadSample("undecodable", f"is not UTF-8: {error}") from None
    return {key: _without_nulls(value) for key, value in record.items()}


def _without_nulls(value: Any) -> Any:
    """What was meant before a table gave each of its rows all fields of any: those that are null were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        if value and all(isinstance(inner, tuple) for inner in value):  # a map of Arrow's
            return {key: _without_nulls(inner) for key, inner in value if inner is not None}
        return [_without_nulls(inner) for inner in value]
    return value


class ParquetFiles:
    """`.parquet`: of each file the needed columns, once turned into an Arrow file in the cache. Files may differ in all
    else, and in the types of these."""

    def __init__(self, files: list[str], columns: Columns) -> None:
        self._files, self._columns = files, columns

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Of each file, which row is its first; and at the end how many there are."""
        rows = []
        for file in self._files:
            with reading(file), _parquet(file) as table:
                groups = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
                rows.append(table.metadata.num_rows)
            if sum(groups) != rows[-1] or min(groups, default=0) < 0:
                raise UserError(f"{file} is damaged: its footer counts {rows[-1]} rows, its groups {sum(groups)}")
        return list(itertools.accumulate(rows, initial=0))

    @functools.cached_property
    def _arrow(self) -> list[Path | None]:
        """Of each file that has rows, its Arrow file."""
        rows = [end - start for start, end in itertools.pairwise(self._starts)]
        return [_arrow_file(file, self._columns) if number else None for file, number in zip(self._files, rows)]

    def __len__(self) -> int:
        return len(self._arrow) and self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        file, row = part_of(index, self._starts)
        path = self._arrow[file]
        assert path is not None
        starts, batches = _batches(path)
        number, place = part_of(row, starts)
        return _row(batches.get_batch(number).slice(place, 1))

    def where(self, index: int) -> str:
        file, row = part_of(index, self._starts)
        return f"{self._files[file]}, row {row + 1}"

    def head(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        for file in self._files:
            for row, batch in enumerate(_parquet_batches(file, self._columns, size=1), start=1):
                yield f"{file}, row {row}", functools.partial(_row, batch)


def _parquet(file: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def _parquet_batches(file: str, wanted: Columns, size: int) -> Iterator["pa.RecordBatch"]:
    """The needed columns of a Parquet file."""
    import pyarrow as pa

    with reading(file):
        parquet = _parquet(file)
        present = parquet.schema_arrow.names
    with parquet:
        columns = wanted.among(present, file)
        with reading(file):
            schema = pa.schema([(column, _plain_type(parquet.schema_arrow.field(column).type)) for column in columns])
        # Each group of rows by itself: its nested dictionaries cannot be read together with those of others.
        num_rows = 0
        batches = itertools.chain.from_iterable(
            parquet.iter_batches(size, [group], columns) for group in range(parquet.num_row_groups)
        )
        for batch in each_read(file, (batch.cast(schema) for batch in batches)):
            num_rows += len(batch)
            yield batch
    if num_rows != parquet.metadata.num_rows:
        raise UserError(f"{file} is damaged: it has {num_rows} rows, not the {parquet.metadata.num_rows} of its footer")


def _plain_type(kind: "pa.DataType") -> "pa.DataType":
    """A type without dictionaries, at any depth: an Arrow file can hold but one dictionary for all its batches."""
    import pyarrow as pa

    def inner(field: "pa.Field") -> "pa.Field":
        return field.with_type(_plain_type(field.type))

    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(inner(kind.value_field))
    if pa.types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field))
    return kind


def _arrow_file(file: str, columns: Columns) -> Path:
    """The Arrow file with the needed columns of a Parquet file that has rows."""
    import pyarrow as pa

    def make(path: Path) -> None:
        batches = _parquet_batches(file, columns, size=1024)
        first = next(batches)
        with open(path, "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            for batch in itertools.chain([first], batches):
                writer.write_batch(batch)

    return cached([file], "-".join(columns.names()), ".arrow", make)


@functools.cache
def _batches(path: Path) -> tuple[list[int], Any]:
    """The first row of each batch of an Arrow file, and the file: mapped, once in each process."""
    import pyarrow as pa

    with reading(path):
        batches = pa.ipc.open_file(pa.memory_map(str(path)))
        sizes = [batches.get_batch(number).num_rows for number in range(batches.num_record_batches)]
    return list(itertools.accumulate(sizes, initial=0)), batches


class SavedDataset(Whole):
    """A folder that `datasets` saved, or a dataset's name on the Hub."""

    def __init__(self, entry: str, split: str, columns: Columns) -> None:
        self._entry, self._split, self._columns = entry, split, columns

    @functools.cached_property
    def _table(self) -> "datasets.Dataset":
        import datasets

        datasets.disable_progress_bars()
        name, _, subset = self._entry.partition(":")
        is_local = os.path.isdir(self._entry)
        with reading(f"data.path: {self._entry}"):
            table = datasets.load_from_disk(self._entry) if is_local else datasets.load_dataset(name, subset or None)
        if isinstance(table, dict):
            if self._split not in table:
                names = ", ".join(table)
                raise UserError(f"data.split = {self._split!r}: expected one of {names}, as in {self._entry!r}")
            table = table[self._split]
        columns = self._columns.among(list(table.features), self._entry)
        return table.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        return _row(self._table[index : index + 1])

    def where(self, index: int) -> str:
        return f"{self._entry}, row {index + 1}"
