import csv
import gzip
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.formats import find_records, streams, tables
from jaxcl.errors import UserError

CELLS = st.text(st.sampled_from("ab,;\t\"'\n\ré\u2028\x0c "), max_size=6)


@given(
    cells=st.lists(st.lists(CELLS, min_size=2, max_size=2)),
    block=st.integers(1, 30),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_csv_is_read_as_it_was_written(cells, block, end):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(streams, "BLOCK", block):
        path = Path(folder, "a.csv")
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            # The writer leaves a line end of another kind without quotation marks.
            quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL
            csv.writer(file, lineterminator=end, quoting=quoting).writerows([["one", "two"], *cells])
        records = find_records("csv", str(path), text_field="text").splits["all"]
        found = [record for part in records.parts() for _, record in records.read(part)]
    assert found == [{"one": one, "two": two} for one, two in cells]


def test_rows_are_placed_by_their_first_line(tmp_path, placed):
    (tmp_path / "a.csv").write_bytes(gzip.compress(b'\r\n one ,two\r\n1,"x\r\ny"\r\n\r\n"2",z'))
    assert placed("csv", tmp_path / "a.csv") == [
        ("a.csv line 3", {"one": "1", "two": "x\r\ny"}),
        ("a.csv line 6", {"one": "2", "two": "z"}),
    ]


def test_quotation_marks_are_characters_in_tsv(tmp_path, placed):
    (tmp_path / "a.tsv").write_bytes('one\ttwo\r\n"x\t y "" \r\n\r\n\t"é,"\n'.encode())
    assert placed("tsv", tmp_path / "a.tsv") == [
        ("a.tsv line 2", {"one": '"x', "two": ' y "" '}),
        ("a.tsv line 4", {"one": "", "two": '"é,"'}),
    ]


def test_fields_may_be_long_documents(tmp_path, rows):
    text = "word " * 99_999
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n')
    assert rows("csv", tmp_path / "a.csv") == [{"text": text}]


@pytest.mark.parametrize(
    ("scheme", "content", "message"),
    [
        ("csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 fields; the header has 2: a, b"),
        ("csv", 'a,b\n"x\ny",2\n\n1\n', "line 5 has 1 field; the header has 2: a, b"),
        ("csv", 'a,b\n1,2\n1,"2\n3,4\n', "line 3 is not valid CSV: unexpected end of data; is a quotation mark not"),
        ("csv", 'a,b\n1,"2" x\n', "line 2 is not valid CSV: "),
        ("csv", "", "is empty; expected a header line"),
        ("csv", "\n\n", "is empty; expected a header line"),
        ("csv", "a,a \n1,2\n", "line 1 names the field 'a' twice; expected a header"),
        ("csv", ",\n1,2\n", "line 1 has fields without a name; expected a header"),
        ("csv", "a,b\n1,\ufffd\0\n", "line 2 holds a NUL byte"),
        ("tsv", "a\tb\n1\t2\t3\n", "line 2 has 3 fields; the header has 2: a, b"),
        ("tsv", "", "is empty; expected a header line"),
    ],
)
def test_unusable_tables_are_named_by_line(tmp_path, rows, scheme, content, message):
    (tmp_path / "a").write_text(content, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=f"a {message}"):
        rows(scheme, tmp_path / "a")


def test_the_column_of_row_numbers_needs_no_name(tmp_path, rows):
    (tmp_path / "a.csv").write_text(",text\n0,x\n")
    assert rows("csv", tmp_path / "a.csv") == [{"": "0", "text": "x"}]


def test_a_quotation_mark_that_is_never_closed_does_not_take_in_the_file(tmp_path, rows):
    (tmp_path / "a.csv").write_text('a\n1\n"2\n' + "3\n" * 5000)
    before = csv.field_size_limit(100)
    try:
        with (
            mock.patch.object(tables, "_LONGEST", 1000),
            pytest.raises(UserError, match=r"line 3 is not valid CSV: field larger than field limit .*not closed"),
        ):
            rows("csv", tmp_path / "a.csv")
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)
