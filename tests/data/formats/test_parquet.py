import datetime
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcl.data.formats import Part, find_records, parquet
from jaxcl.errors import UserError

MESSAGES = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "é"}] for n in range(20)]


@pytest.fixture
def path(tmp_path):
    table = pa.table(
        {
            "messages": MESSAGES,
            "raw": pa.array([b"\xff%d" % n for n in range(20)]),
            "kind": pa.array(["one", "two"] * 10).dictionary_encode(),
            "number": [None, *range(19)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("batch", [1, 3, 1024])
def test_values_become_values_of_python(path, placed, batch):
    with mock.patch.object(parquet, "_BATCH_ROWS", batch):
        found = placed("parquet", path)
    assert [where for where, _ in found] == [f"a.parquet row {n}" for n in range(1, 21)]
    assert [record for _, record in found] == [
        {"messages": one, "raw": b"\xff%d" % n, "kind": ("one", "two")[n % 2], "number": n - 1 if n else None}
        for n, one in enumerate(MESSAGES)
    ]


@pytest.mark.parametrize("size", [1, 2000, 2**25])
def test_parts_are_row_groups(path, size):
    sizes = [pq.ParquetFile(path).metadata.row_group(n).total_byte_size for n in range(5)]
    with mock.patch.object(parquet, "RANGE", size):
        records = find_records("parquet", str(path), text_field="text").splits["all"]
        parts = records.parts()
    ends = [*(part.start for part in parts[1:]), 5]
    assert [part.start for part in parts] == [0, *ends[:-1]]
    for part, end in zip(parts, ends, strict=True):
        assert part.stop == (None if end == 5 else end)
        assert sum(sizes[part.start : end]) <= size or end == part.start + 1
        if end < 5:
            assert sum(sizes[part.start : end + 1]) > size
    found = [(str(where), record["number"]) for part in parts for where, record in records.read(part)]
    assert found == [(f"{path} row {n + 1}", n - 1 if n else None) for n in range(20)]


def test_only_the_row_groups_of_the_part_are_read(path):
    records = find_records("parquet", str(path), text_field="text").splits["all"]
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found = [(str(where), record["number"]) for where, record in records.read(Part(str(path), 1, 2))]
    assert found == [(f"{path} row {n + 1}", n - 1) for n in range(4, 8)]
    with pytest.raises(UserError, match=r"a\.parquet is a damaged parquet file"):
        list(records.read(Part(str(path), 0, 1)))


def test_batches_are_small_where_rows_are_large(path):
    sizes = []
    plain = parquet._dictionaries
    with (
        mock.patch.object(parquet, "_BATCH_BYTES", 300),
        mock.patch.object(parquet, "_dictionaries", lambda batch: sizes.append(len(batch)) or plain(batch)),
    ):
        records = find_records("parquet", str(path), text_field="text").splits["all"]
        assert len(list(records.read(Part(str(path))))) == 20
    assert 1 <= max(sizes) < 4


def test_times_become_text(tmp_path, rows):
    table = pa.table(
        {
            "precise": pa.array([1_000_000_001], pa.timestamp("ns")),
            "day": pa.array([datetime.date(2020, 1, 2)]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows("parquet", tmp_path / "a.parquet") == [
        {"precise": "1970-01-01 00:00:01.000000001", "day": "2020-01-02"}
    ]


def test_a_file_without_rows(tmp_path, rows):
    pq.write_table(pa.table({"a": pa.array([], "string")}), tmp_path / "a.parquet")
    assert rows("parquet", tmp_path / "a.parquet") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], "is a damaged parquet file"),
        (lambda content: b"PAR1", "is a damaged parquet file"),
        (lambda content: b"{}" + content, "is not a parquet file, or is damaged: its first bytes are not PAR1"),
        (lambda content: b"", "is not a parquet file, or is damaged"),
    ],
)
def test_damaged_files_are_named(path, rows, change, message):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"a\.parquet {message}"):
        rows("parquet", path)


@pytest.mark.parametrize("where", ["value", "name"])
def test_text_that_is_not_utf_8_is_damage(tmp_path, rows, where):
    value = b"\xff" if where == "value" else b"x"
    column = pa.array([value], "binary").view("string")
    pq.write_table(pa.table({"question": column}), tmp_path / "a.parquet", store_schema=False)
    if where == "name":
        content = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(content.replace(b"question", b"\xff" * 8))
    with pytest.raises(UserError, match=r"a\.parquet is a damaged parquet file: its text is not UTF-8"):
        rows("parquet", tmp_path / "a.parquet")


def test_parquet_is_compressed_inside(path, rows):
    path.rename(path.with_name("a.parquet.gz"))
    with pytest.raises(UserError, match=r"a\.parquet\.gz: a parquet file is compressed inside"):
        rows("parquet", path.parent)
