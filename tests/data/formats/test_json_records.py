import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.formats import find_records, json_records, streams
from jaxcl.errors import UserError

OBJECTS = [{"a": 1, "b": "x"}, {"a": [1, {"c": None}]}, {}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("scheme", ["json", "jsonl"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_and_lines_are_told_apart_by_content(tmp_path, placed, scheme, name, mark):
    (tmp_path / name).write_bytes(mark + b" \r\n" + json.dumps(OBJECTS).encode())
    assert placed(scheme, tmp_path / name) == [(f"{name} row {n}", one) for n, one in enumerate(OBJECTS, 1)]
    (tmp_path / name).write_bytes(mark + b"\n" + "\r\n".join(map(json.dumps, OBJECTS)).encode())
    assert placed(scheme, tmp_path / name) == [(f"{name} line {n}", one) for n, one in enumerate(OBJECTS, 2)]


@given(
    objects=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=4),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    space=st.sampled_from(["", " ", "\r\n"]),
    block=st.integers(1, 50),
)
def test_lists_are_read_in_blocks_of_any_size(objects, indent, ascii_only, space, block):
    text = space + json.dumps(objects, indent=indent, ensure_ascii=ascii_only) + space
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(streams, "BLOCK", block):
        path = Path(folder, "a.json")
        path.write_text(text, encoding="utf-8", newline="", errors="surrogatepass")
        records = find_records("json", str(path), text_field="text").splits["all"]
        assert [one for part in records.parts() for _, one in records.read(part)] == json.loads(text)


def test_blank_lines_are_not_parsed(tmp_path, placed):
    # An attempt costs microseconds, and a little compressed file may stand for millions of them.
    (tmp_path / "a.jsonl").write_text('\n \n\t\n{"a": 1}\n\u2003\n \n{"a": 2} \n\n', encoding="utf-8")
    with mock.patch.object(json_records.json, "JSONDecoder", wraps=json.JSONDecoder) as decoder:
        counted = mock.Mock(wraps=json.JSONDecoder().raw_decode)
        decoder.side_effect = lambda: mock.Mock(raw_decode=counted)
        assert placed("jsonl", tmp_path / "a.jsonl") == [("a.jsonl line 4", {"a": 1}), ("a.jsonl line 7", {"a": 2})]
    assert counted.call_count == 2


def test_a_long_list_is_not_held_in_memory(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"a": "x" * 50}] * 1000))
    longest = 0
    more = json_records._Window._more

    def watch(window):
        nonlocal longest
        found = more(window)
        longest = max(longest, len(window._text))
        return found

    with mock.patch.object(streams, "BLOCK", 128), mock.patch.object(json_records._Window, "_more", watch):
        records = find_records("json", str(tmp_path / "a.json"), text_field="text").splits["all"]
        assert sum(1 for part in records.parts() for _ in records.read(part)) == 1000
    assert 128 <= longest <= 256


def test_a_long_list_is_one_part_and_lines_are_several(tmp_path):
    for name, content in (("list.jsonl", json.dumps(OBJECTS)), ("lines.json", "\n".join(map(json.dumps, OBJECTS)))):
        (tmp_path / name).write_text(content)
    with mock.patch("jaxcl.data.formats.lines.RANGE", 10):
        counts = [
            len(find_records("json", str(tmp_path / name), text_field="text").splits["all"].parts())
            for name in ("list.jsonl", "lines.json")
        ]
    assert counts == [1, 5]


@pytest.mark.parametrize("block", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": }]', "line 2 column 8 is not valid JSON: Expecting value"),
        ('[{"a": "é"},\r\n\r {"a": }]', "line 3 column 8 is not valid JSON: Expecting value"),
        ('[{"a": 1},\r\n {"a": 1}', "line 2 column 10 is not valid JSON: expected ',' or ']', but the file ends"),
        ('[{"a": 1}\n{"a": 1}]', "line 2 column 1 is not valid JSON: expected ',' or ']'$"),
        ('[{"a": 1},\n]', "line 2 column 1 is not valid JSON: Expecting value"),
        ('[{"a": 1}]\n[]', "line 2 column 1 is not valid JSON: extra data after the list"),
        ('[{"a": "x', "line 1 column 8 is not valid JSON: Unterminated string"),
        ('[{"a": 1}, {"a": 1', "line 1 column 19 is not valid JSON"),
        ("[", "line 1 column 2 is not valid JSON"),
        ('[{"a": 1}, 12]', "row 2: expected a JSON object, got int"),
        ('[{"a": 1}, 1.5]', "row 2: expected a JSON object, got float"),
        ('[{"a": 1}, ["x"]]', "row 2: expected a JSON object, got a list"),
        ('[{"a": 1}, {"a": 1' + "0" * 5000 + "}]", "row 2 is not usable JSON: a number has too many digits"),
        ('[{"a": 1}, {"a": ' + "[" * 99999 + "]]}]", "row 2 is not usable JSON: nested too deeply"),
        ('{"a": 1}\n\n{"a": }', "line 3 column 7 is not valid JSON: Expecting value"),
        ('{"a": 1} {"a": 2}', "line 1 column 10 is not valid JSON: Extra data"),
        ('{\n"a": 1}', "line 1 column 2 is not valid JSON: .*; expected an object per line, or one list of objects"),
        ('{"a": 1}\n[]', "line 2: expected a JSON object, got a list"),
        ('{"a": 1}\n3 ', "line 2: expected a JSON object, got int"),
        ('{"a": 1}\n{"a": 1' + "0" * 5000 + "}", "line 2 is not usable JSON: a number has too many digits"),
        ('{"a": 1}\n{"a": ' + "[" * 99999 + "]]}", "line 2 is not usable JSON: nested too deeply"),
    ],
)
def test_what_is_not_json_is_named_by_line_or_row(tmp_path, rows, content, message, block):
    if block < 7 and len(content) > 9999:
        return  # each character anew would take minutes
    (tmp_path / "a.json").write_text(content, encoding="utf-8", newline="")
    with mock.patch.object(streams, "BLOCK", block), pytest.raises(UserError, match=rf"a\.json {message}"):
        rows("json", tmp_path / "a.json")


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\r\n{"a": "\xff"}]', "line 2 is not UTF-8 text"),
        (b'[{"a": 1},\r\r\n\n{"a": "\xe2\x82"}]', "line 4 is not UTF-8 text"),
        (b'[{"a": 1},\n{"a": "\xe2\x82', "line 2 is not UTF-8 text"),
        (b'{"a": 1}\r\n{"a": "\xff"}', "line 2 is not UTF-8 text"),
        (b'{"a": 1}\n{"a": "\0"}', "line 2 holds a NUL byte"),
    ],
)
def test_what_is_not_text_is_named_by_line(tmp_path, rows, content, message, block):
    (tmp_path / "a.json").write_bytes(content)
    with mock.patch.object(streams, "BLOCK", block), pytest.raises(UserError, match=rf"a\.json {message}"):
        rows("json", tmp_path / "a.json")


def test_a_nul_that_is_written_as_an_escape_is_kept(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text('{"a": "x\\u0000\\ud83d"}')
    assert rows("jsonl", tmp_path / "a.jsonl") == [{"a": "x\0\ud83d"}]


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[ ]\n"])
def test_files_without_objects(tmp_path, rows, content):
    (tmp_path / "a.json").write_text(content)
    assert rows("json", tmp_path / "a.json") == []
