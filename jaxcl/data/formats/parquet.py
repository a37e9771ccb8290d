"""Records in parquet files, by row groups and batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from jaxcl.data.formats import storage
from jaxcl.data.formats.base import Numbering, Part, Record, Where
from jaxcl.data.formats.lines import RANGE
from jaxcl.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Bytes and rows that are decoded at once, at most (about, for the bytes).
_BATCH_BYTES, _BATCH_ROWS = 2**21, 1024
_TEXTS = ("STRING", "NONE")


def parquet_parts(path: str) -> list[Part]:
    """The parts of a file: runs of row groups that hold about 32 MiB, uncompressed."""
    with _opened(path) as file:
        sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
    parts, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > RANGE:
            parts.append(Part(path, start, index))
            start, total = index, 0
        total += size
    return [*parts, Part(path, start, None)] if sizes else []


def read_parquet(part: Part) -> Iterator[tuple[Where, Record]]:
    """The rows of some row groups; lists and structs become lists and dictionaries, bytes stay bytes.

    Raises:
      UserError: the file cannot be read or is damaged.
    """
    with _opened(part.path) as file:
        groups = range(file.num_row_groups)
        rows = [file.metadata.row_group(index).num_rows for index in groups]
        size = sum(file.metadata.row_group(index).total_byte_size for index in groups)
        batch = max(1, min(_BATCH_ROWS, _BATCH_BYTES * sum(rows) // max(size, 1)))
        numbering = Numbering(part.path, "row", lambda: sum(rows[: part.start]))
        number = 0
        for found in file.iter_batches(batch, row_groups=list(groups[part.start : part.stop]), use_threads=False):
            for record in _dictionaries(found):
                number += 1
                yield Where((numbering, number)), record


def _dictionaries(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    for values in zip(*map(_values, batch.columns), strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """A column's values; times and dates as text: Python has no type for nanoseconds."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(column.type):  # the same object for equal values, of which there may be many long ones
        used = column.indices.unique().drop_null()
        known = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
        return [known.get(index) for index in column.indices.to_pylist()]
    if kinds.is_timestamp(column.type) or kinds.is_time(column.type) or kinds.is_date(column.type):
        column = column.cast("string")
    return column.to_pylist()


def _repeated(file: pq.ParquetFile) -> list[str]:
    """Columns of text or bytes that may be stored once and repeated: a small file could stand for gigabytes."""
    columns = [file.schema.column(index) for index in range(len(file.schema))]
    texts = [one for one in columns if one.physical_type == "BYTE_ARRAY" and one.logical_type.type in _TEXTS]
    return [one.path for one in texts if one.max_repetition_level == 0]


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.naming(path), closing(storage.open_binary(path)) as file:
        head = file.read(4)
        file.seek(0)
        try:
            if head != b"PAR1":
                raise UserError(f"{path} is not a parquet file, or is damaged: its first bytes are not PAR1")
            # Columns are read through a buffer of this size instead of whole.
            options: dict[str, Any] = {"buffer_size": 2**20, "pre_buffer": False}
            with pq.ParquetFile(file, **options) as opened:
                texts = _repeated(opened)
                if not texts:
                    yield opened
            if texts:
                file.seek(0)
                with pq.ParquetFile(file, read_dictionary=texts, **options) as opened:
                    yield opened
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is a damaged parquet file: its text is not UTF-8") from error
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is a damaged parquet file: {error}") from error
