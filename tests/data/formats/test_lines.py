import gzip
import json
import lzma
import re
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.formats import find_records, lines, streams
from jaxcl.errors import UserError

PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
ENDS = ["\n", "\r\n", "\r", "\n\n", "\r\r\n"]
WORDS = ["a", "two words", "é", "雪🙂", "\u2028", "\x0c", " ", "x" * 30]


def plain_reading(content):
    """Lines with their numbers, by the whole text at once."""
    text = content.decode("utf-8-sig")
    numbered = enumerate(re.split("\r\n|\r|\n", text), 1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def read_in_ranges(path, scheme, size, block):
    with mock.patch.object(lines, "RANGE", size), mock.patch.object(streams, "BLOCK", block):
        records = find_records(scheme, str(path), text_field="text").splits["all"]
        parts = records.parts()
        found = [
            (int(str(where).removeprefix(f"{path} line ")), record)
            for part in parts
            for where, record in records.read(part)
        ]
    return parts, found


@given(
    pieces=st.lists(st.sampled_from([*ENDS, *WORDS])),
    mark=st.booleans(),
    size=st.integers(1, 40),
    block=st.integers(1, 40),
)
def test_ranges_of_any_size_give_the_lines_of_the_file(pieces, mark, size, block):
    content = ("\ufeff" * mark + "".join(pieces)).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_bytes(content)
        parts, found = read_in_ranges(path, "text", size, block)
    assert len(parts) == max(1, -(-len(content) // size))
    assert [(number, record["text"]) for number, record in found] == plain_reading(content)


@given(
    records=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=9) | st.integers()), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n \n", " \n"]),
    ascii_only=st.booleans(),
    size=st.integers(1, 60),
    block=st.integers(1, 60),
)
def test_ranges_of_any_size_give_the_objects_of_the_file(records, end, ascii_only, size, block):
    written = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    try:
        content = end.join(written).encode()
    except UnicodeEncodeError:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        _, found = read_in_ranges(path, "jsonl", size, block)
    assert [record for _, record in found] == records
    assert [number for number, _ in found] == [number for number, _ in plain_reading(content)]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_compressed_files_are_known_by_their_first_bytes(tmp_path, placed, suffix, name):
    (tmp_path / name).write_bytes(PACK[suffix](b"one\ntwo\n") + PACK[suffix](b"three"))  # members are joined
    assert placed("text", tmp_path / name) == [
        (f"{name} line 1", {"text": "one"}),
        (f"{name} line 2", {"text": "two"}),
        (f"{name} line 3", {"text": "three"}),
    ]


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_that_only_is_called_compressed_is_read_as_it_is(tmp_path, rows, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(b"one\n")
    assert rows("text", tmp_path / f"a.txt{suffix}") == [{"text": "one"}]


def test_compressed_files_of_any_size_are_one_part(tmp_path):
    content = b"some words\n" * 99
    (tmp_path / "a.txt").write_bytes(PACK[".gz"](content))
    parts, found = read_in_ranges(tmp_path / "a.txt", "text", 5, 7)
    assert (len(parts), len(found)) == (1, 99)


@pytest.mark.parametrize(("suffix", "kind"), [(".gz", "gzip"), (".xz", "xz"), (".zst", "zstd")])
@pytest.mark.parametrize("left", [0, 1, 30])
def test_truncated_files_are_named(tmp_path, rows, suffix, kind, left):
    packed = PACK[suffix]("".join(f"{number * 7919}\n" for number in range(999)).encode())
    (tmp_path / f"a.txt{suffix}").write_bytes(packed[:left])
    with pytest.raises(UserError, match=rf"a\.txt\{suffix} is a damaged {kind} file: "):
        rows("text", tmp_path / f"a.txt{suffix}")


def test_a_broken_zstd_stream_is_named(tmp_path, rows):
    packed = bytearray(PACK[".zst"]("".join(f"{number * 7919}\n" for number in range(999)).encode()))
    packed[6:12] = b"\xff" * 6
    (tmp_path / "a.txt").write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.txt is a damaged zstd file"):
        rows("text", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\r\nnot \xff fine\n", "line 2 is not UTF-8 text$"),
        (b"fine\rfine\n\xe9", "line 3 is not UTF-8 text$"),
        (b"fine\n\xff\xfe", "line 2 is not UTF-8 text$"),
        ("text".encode("utf-16"), "line 1 is not UTF-8 text but UTF-16; convert the file"),
        (b"fine\nfine\nno\0t\n", "line 3 holds a NUL byte; expected UTF-8 text"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 2**20])
@pytest.mark.parametrize("scheme", ["text", "tsv"])
def test_what_is_not_text_is_named_by_its_line_in_the_file(tmp_path, content, message, size, scheme):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt {message}"):
        read_in_ranges(tmp_path / "a.txt", scheme, size, 3)


def test_places_are_only_counted_when_they_are_written(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree\nfour\n")
    with mock.patch.object(lines, "RANGE", 8):
        records = find_records("text", str(tmp_path / "a.txt"), text_field="text").splits["all"]
        with mock.patch.object(lines, "_lines_before", side_effect=lines._lines_before) as counted:
            found = list(records.read(records.parts()[1]))
            assert not counted.called
            assert [str(where) for where, _ in found] == [f"{tmp_path / 'a.txt'} line {n}" for n in (3, 4)]
            assert counted.call_count == 1


def test_the_field_of_text_has_the_name_that_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(" one ")
    records = find_records("text", str(tmp_path / "a.txt"), text_field="passage").splits["all"]
    assert [record for part in records.parts() for _, record in records.read(part)] == [{"passage": "one"}]


def test_only_blocks_are_read_at_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some words\n" * 1000)
    with mock.patch.object(streams, "BLOCK", 64):
        assert max(map(len, streams.blocks(str(tmp_path / "a.txt")))) == 64
        part = lines.Part(str(tmp_path / "a.txt"), 100, 9000)
        assert max(map(len, lines.part_blocks(part))) == 64
        numbering = lines.numbering_of(part)
        assert max(len("".join(found)) for found in lines.line_lists(part, numbering)) <= 74
