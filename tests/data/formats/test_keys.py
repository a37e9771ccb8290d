import io
import os
import shutil
from unittest import mock

import numpy as np
import pytest

from jaxcl.data import fingerprint
from jaxcl.data.formats import ListRecords, find_records
from jaxcl.data.formats.fingerprint import files_key

ROWS = [{"a": "x", "b": [1, None, 2.5, True, b"y", {"c": "d"}]}, {"a": np.arange(3)}]


def test_keys_do_not_depend_on_folder_and_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("{}")
    os.utime(tmp_path / "two" / "a.jsonl", (1, 1))
    one, two = (find_records("jsonl", str(tmp_path / name), text_field="text").splits["all"] for name in ("one", "two"))
    assert one.key() == two.key()


@pytest.mark.parametrize("change", ["content", "size", "name", "order", "more"])
def test_keys_change_with_the_files(tmp_path, change):
    for name in "abc":
        (tmp_path / name).write_text("0123456789")
    paths = [str(tmp_path / name) for name in "ab"]
    before = files_key(paths)
    if change == "content":
        (tmp_path / "a").write_text("0123456788")
    elif change == "size":
        (tmp_path / "a").write_text("012345678")
    else:
        paths = [str(tmp_path / name) for name in {"name": "ac", "order": "ba", "more": "abc"}[change]]
    assert files_key(paths) != before


def test_keys_change_with_the_reading(tmp_path):
    (tmp_path / "a.txt").write_text("{}")
    keys = {
        find_records(scheme, str(tmp_path / "a.txt"), text_field=field).splits["all"].key()
        for scheme, field in (("text", "text"), ("text", "passage"), ("jsonl", "text"), ("csv", "text"))
    }
    assert len(keys) == 4
    renamed = find_records("jsonl", str(tmp_path / "a.txt"), text_field="passage").splits["all"]
    assert renamed.key() in keys  # only text files get their field's name from it


def test_large_files_are_sampled_and_their_time_counts(tmp_path):
    path = tmp_path / "a"
    content = bytearray(1000)
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with (
        mock.patch.object(fingerprint, "BLOCK", 10),
        mock.patch.object(fingerprint, "BLOCKS", 5),
    ):
        before = files_key([str(path)])
        for at, noticed in ((0, True), (300, False), (999, True)):
            changed = content.copy()
            changed[at] = 1
            path.write_bytes(changed)
            os.utime(path, (1, 1))
            assert (files_key([str(path)]) != before) == noticed
        path.write_bytes(content)
        assert files_key([str(path)]) != before
        shutil.copy2(path, tmp_path / "b")
        os.utime(path, (1, 1))
        assert files_key([str(path)]) == before


def test_files_at_the_limit_are_read_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    keys = set()
    with (
        mock.patch.object(fingerprint, "BLOCK", 10),
        mock.patch.object(fingerprint, "BLOCKS", 10),
    ):
        for at in range(100):
            path.write_bytes(bytes(at) + b"1" + bytes(99 - at))
            keys.add(files_key([str(path)]))
    assert len(keys) == 100


def test_a_url_costs_few_requests(memory):
    import fsspec

    system, inner = fsspec.core.url_to_fs(memory)
    system.pipe(f"{inner}/a", bytes(1000))
    with mock.patch.object(fingerprint, "BLOCK", 10):
        before = files_key([f"{memory}/a"])
        places = bytes(number // 10 for number in range(1000))
        assert [block[0] for block in fingerprint.sampled(io.BytesIO(places), 1000, 4)] == [0, 33, 66, 99]
        system.pipe(f"{inner}/a", bytes(1000))  # written anew: the file system gives it another time
        assert files_key([f"{memory}/a"]) != before


@pytest.mark.parametrize(
    "changed",
    [
        [*ROWS, {}],
        ROWS[::-1],
        [{**ROWS[0], "a": "y"}, ROWS[1]],
        [{**ROWS[0], "a": b"x"}, ROWS[1]],
        [{**ROWS[0], "b": [1, None, 2.5, True, b"y", {"c": "e"}]}, ROWS[1]],
        [{**ROWS[0], "b": ["1", None, 2.5, True, b"y", {"c": "d"}]}, ROWS[1]],
        [{**ROWS[0], "b": [[1, None], 2.5, True, b"y", {"c": "d"}]}, ROWS[1]],
        [ROWS[0], {"a": np.arange(3.0)}],
        [ROWS[0], {"a": np.arange(3)[:, None]}],
        [ROWS[0], {"b": np.arange(3)}],
    ],
)
def test_keys_of_records_in_memory_follow_their_content(changed):
    same = [{"a": "x", "b": [1, None, 2.5, True, b"y", {"c": "d"}]}, {"a": np.arange(3)}]
    assert ListRecords(same, "elsewhere").key() == ListRecords(ROWS, "here").key()
    assert ListRecords(changed, "here").key() != ListRecords(ROWS, "here").key()


def test_records_in_memory_without_a_content_have_no_key():
    with pytest.raises(TypeError, match="object has no content"):
        ListRecords([{"a": object()}], "here").key()
