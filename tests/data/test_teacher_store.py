import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcl.data.teacher_store import VERSION, TeacherStore, write_records
from jaxcl.errors import UserError


def record(i):
    return {
        "values": np.arange(i * 3, dtype=np.float32).reshape(i, 3),
        "ids": np.arange(i, dtype=np.int16),
        "rest": np.float16(i / 8),
        "low": np.ones((2, i), ml_dtypes.bfloat16) * i,
    }


def as_arrays(fields):
    return {name: np.asarray(value) for name, value in fields.items()}


@pytest.fixture
def path(tmp_path):
    write_records(tmp_path / "store", ((10 * i, as_arrays(record(i))) for i in range(12)))
    return tmp_path / "store"


def test_records_come_back_by_position_and_by_key(path):
    store = TeacherStore.open(path)
    assert len(store) == 12
    assert store.keys == [10 * i for i in range(12)]
    for i in (11, 0, 5, 5):
        for found in (store[i], store.get(10 * i)):
            expected = as_arrays(record(i))
            assert found.keys() == expected.keys()
            for name in expected:
                assert found[name].dtype == expected[name].dtype
                np.testing.assert_array_equal(found[name], expected[name])
    assert 30 in store
    assert 31 not in store


def test_a_store_of_something_else_is_named(tmp_path):
    path = tmp_path / "store"
    write_records(path, [(0, {"x": np.zeros(1)})], {"task": "first", "layers": 4})
    assert len(TeacherStore.open(path, {"task": "first", "layers": 4})) == 1
    with pytest.raises(UserError, match=r"store is the store of another run: layers 4, here 8$"):
        TeacherStore.open(path, {"task": "first", "layers": 8})


@given(
    st.lists(
        hnp.arrays(np.dtype("float32"), hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5)), max_size=5
    )
)
@settings(deadline=None, max_examples=25)
def test_any_arrays_round_trip(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("store") / "store"
    assert write_records(path, ((i, {"x": array}) for i, array in enumerate(arrays))) == len(arrays)
    store = TeacherStore.open(path)
    assert len(store) == len(arrays)
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(store[i]["x"], array)


def test_transposed_arrays_keep_their_order(tmp_path):
    array = np.arange(6).reshape(2, 3).T
    write_records(tmp_path / "store", [(0, {"x": array})])
    np.testing.assert_array_equal(TeacherStore.open(tmp_path / "store")[0]["x"], array)


def test_the_files_of_several_processes_read_as_one(tmp_path):
    for process in range(3):
        mine = [i for i in range(8) if i % 3 == process]
        write_records(tmp_path / str(process), ((i, {"x": np.array([i])}) for i in mine))
    write_records(tmp_path / "none", [])
    store = TeacherStore.open([tmp_path / "none", *(tmp_path / str(process) for process in range(3))])
    assert len(store) == 8
    assert all(store.get(i)["x"].tolist() == [i] for i in range(8))
    with pytest.raises(UserError, match="hold an example twice"):
        TeacherStore.open([tmp_path / "0", tmp_path / "0"])
    write_records(tmp_path / "other", [(99, {"y": np.array([1])})])
    with pytest.raises(UserError, match="has other fields"):
        TeacherStore.open([tmp_path / "0", tmp_path / "other"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_named(path, tmp_path, share):
    content = path.read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cut is "):
        TeacherStore.open(tmp_path / "cut")


def test_foreign_files_are_named(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    (tmp_path / "text").write_text("not a store\n" * 10000)
    writer = ArrayRecordWriter(str(tmp_path / "records"), "group_size:1")
    writer.write(b"something else")
    writer.close()
    for name, message in (
        ("text", "text is"),
        ("records", "records is not a teacher store"),
        ("absent", "absent does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            TeacherStore.open(tmp_path / name)


def test_another_version_is_refused(path, monkeypatch):
    monkeypatch.setattr("jaxcl.data.teacher_store.VERSION", 99)
    with pytest.raises(UserError, match="version 3; this program reads version 99"):
        TeacherStore.open(path)


def test_unequal_records_are_a_programming_error_and_leave_the_old_file(path, tmp_path):
    before = path.read_bytes()
    for records in ([(0, {"x": np.zeros(1)}), (1, {"x": np.zeros((1, 1))})], [(0, {"x": np.zeros(1)})] * 2):
        with pytest.raises(ValueError, match="expected"):
            write_records(path, records)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["store"]


FULL = """
import resource, sys
import numpy as np
from jaxcl.data.files import write_json
from jaxcl.data.teacher_store import write_records
from jaxcl.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
random = np.random.default_rng(0)
for write in (
    lambda: write_records(sys.argv[1], ((i, {"x": random.random(1000)}) for i in range(1000))),
    lambda: write_json(sys.argv[2], list(range(20_000))),
):
    try:
        write()
        print("no error")
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes the Linux way")
def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(path, tmp_path):
    (tmp_path / "json").write_text("old")
    before = path.read_bytes()
    command = [sys.executable, "-c", FULL, str(path), str(tmp_path / "json")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"cannot write {path}:")
    assert lines[1].startswith(f"cannot write {tmp_path / 'json'}: file too large")
    assert path.read_bytes() == before
    assert (tmp_path / "json").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["json", "store"]


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_records(tmp_path / "file" / "store", [])


KNOWN = {"version": VERSION, "about": {}, "fields": {}, "keys": []}
ONE = {"x": {"dtype": "float32", "rank": 1}}


def described(path, description, *records):
    """A store with a description of one's own."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    content = description if isinstance(description, bytes) else json.dumps(description).encode()
    for record in (*records, b"jaxcl-teacher\x00" + content):
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize(
    "description",
    [
        b"5", b"{x", b"\xff", b"1" * 5000, b"[" * 100_000,
        *({key: value for key, value in KNOWN.items() if key != out} for out in ("about", "fields", "keys")),
        KNOWN | {"about": 1}, KNOWN | {"fields": []}, KNOWN | {"keys": 5}, KNOWN | {"keys": [[1]]},
        KNOWN | {"keys": ["x"]},
        *(KNOWN | {"fields": {"x": field}} for field in (
            5, {"dtype": "float99", "rank": 1}, {"dtype": "object", "rank": 1}, {"dtype": "finfo", "rank": 1},
            {"dtype": [], "rank": 1}, {"dtype": "float32", "rank": "1"}, {"dtype": "float32", "rank": -1},
            {"dtype": "float32", "rank": 99999},
        )),
    ],
)  # fmt: skip
def test_an_odd_description_is_one_line(tmp_path, description):
    with pytest.raises(UserError, match="store: its description is damaged"):
        TeacherStore.open(described(tmp_path / "store", description))


@pytest.mark.parametrize("record", [b"", b"\x04" + b"\0" * 7, b"\xff" * 8, b"\0\0\0\0\1\0\0\0", b"\xff" * 7 + b"\x7f"])
def test_a_record_that_is_not_as_described_is_one_line(tmp_path, record):
    store = TeacherStore.open(described(tmp_path / "store", KNOWN | {"fields": ONE, "keys": [3]}, record))
    with pytest.raises(UserError, match="record 0 does not hold what the store describes"):
        store.get(3)


def test_a_record_whose_shape_has_more_elements_than_a_machine_word_counts_is_one_line(tmp_path):
    fields = {"x": {"dtype": "float32", "rank": 2}}
    shape = (2**62).to_bytes(8, "little") * 2
    store = TeacherStore.open(described(tmp_path / "store", KNOWN | {"fields": fields, "keys": [3]}, shape))
    with pytest.raises(UserError, match="record 0 does not hold what the store describes"):
        store.get(3)
