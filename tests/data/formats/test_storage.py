import gzip
import sys
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcl.data.formats import find_records, lines, storage
from jaxcl.errors import UserError

fsspec = pytest.importorskip("fsspec")


def put(url, content):
    with fsspec.open(url, "wb") as file:
        file.write(content)


def test_folders_globs_and_files_behind_urls(memory, rows):
    put(f"{memory}/x/train-0.jsonl", b'{"a": 1}\n')
    put(f"{memory}/x/train-1.jsonl.gz", gzip.compress(b'{"a": 2}\n'))
    put(f"{memory}/x/test.jsonl", b'[{"a": 3}]')
    put(f"{memory}/x/labels.json", b'["b", "a"]')
    found = find_records("jsonl", f"{memory}/x", text_field="text")
    assert found.labels == ("b", "a")
    assert {
        split: [record["a"] for part in records.parts() for _, record in records.read(part)]
        for split, records in found.splits.items()
    } == {"train": [1, 2], "test": [3]}
    assert found.splits["test"].where.endswith("/x/test.jsonl")
    assert found.splits["test"].where.startswith("memory://")
    assert rows("jsonl", f"{memory}/x/train-*") == [{"a": 1}, {"a": 2}]
    assert rows("jsonl", f"{memory}/x/train-0.jsonl") == [{"a": 1}]


def test_folders_of_splits_behind_urls(memory):
    put(f"{memory}/train/a.txt", b"one")
    put(f"{memory}/test/a.txt", b"two")
    assert list(find_records("text", memory, text_field="text").splits) == ["train", "test"]


def test_files_behind_urls_are_read_in_ranges(memory):
    content = "".join(f"line {number} é\r\n" for number in range(50)).encode()
    put(f"{memory}/a.txt", content)
    with mock.patch.object(lines, "RANGE", 100):
        records = find_records("text", f"{memory}/a.txt", text_field="text").splits["all"]
        # In this file system, files that are open at the same time share one position.
        found = [pair for part in records.parts() for pair in list(records.read(part))]
        assert len(records.parts()) == -(-len(content) // 100)
    found = [(str(where), record["text"]) for where, record in found]
    assert found == [(f"{memory}/a.txt line {number + 1}", f"line {number} é") for number in range(50)]


def test_local_files_behind_urls(tmp_path, rows):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
    assert rows("parquet", f"file://{tmp_path}/a.parquet") == [{"a": 1}, {"a": 2}]
    assert rows("parquet", f"file://{tmp_path}/*.parquet") == [{"a": 1}, {"a": 2}]
    assert rows("parquet", f"file://{tmp_path}") == [{"a": 1}, {"a": 2}]


def test_what_is_not_there_is_named_by_its_url(memory, rows):
    put(f"{memory}/a.txt", b"one\n\xff\n")
    with pytest.raises(UserError, match=rf"^{memory}/b.txt does not exist$"):
        rows("text", f"{memory}/b.txt")
    with pytest.raises(UserError, match=rf"{memory}/b\*.txt matches no file"):
        rows("text", f"{memory}/b*.txt")
    with pytest.raises(UserError, match=rf"^{memory}/a.txt line 2 is not UTF-8 text$"):
        rows("text", f"{memory}/a.txt")


def test_a_missing_driver_is_one_line_that_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://bucket/a.jsonl needs the package gcsfs: "):
        find_records("jsonl", "gs://bucket/a.jsonl", text_field="text")
    with pytest.raises(UserError, match=r"^cannot read nosuch://a: Protocol not known: nosuch"):
        find_records("jsonl", "nosuch://a", text_field="text")


def test_errors_of_a_file_system_are_one_line(memory, rows):
    put(f"{memory}/a.txt", b"one")

    class Refused(Exception):
        pass

    system, _ = fsspec.core.url_to_fs(memory)
    for method in ("info", "open"):
        with (
            mock.patch.object(type(system), method, side_effect=Refused("no token\nat all")),
            pytest.raises(UserError, match=rf"^cannot read {memory}/a.txt: Refused: no token at all$"),
        ):
            rows("text", f"{memory}/a.txt")


def test_a_marker_of_a_folder_is_not_a_file_in_it(memory, rows):
    put(f"{memory}/a.txt", b"one")
    system, inner = fsspec.core.url_to_fs(memory)
    listed = [{"name": f"{inner.strip('/')}/", "type": "directory", "size": 0}, *system.ls(inner, detail=True)]
    with mock.patch.object(type(system), "ls", return_value=listed):
        assert [entry.name for entry in storage.entries(memory)] == ["a.txt"]


def test_bugs_are_not_taken_for_unreadable_files():
    with pytest.raises(ZeroDivisionError), storage.naming("a"):
        _ = 1 / 0
