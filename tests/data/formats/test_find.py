import json
import pickle
import subprocess
import sys

import pytest

from jaxcl.data.formats import SCHEMES, ListRecords, Part, find_records
from jaxcl.errors import UserError


def write(folder, *names):
    """Files of one record each, which holds the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"name": name}))


def found(scheme, place):
    """Names of the files of each split."""
    splits = find_records(scheme, str(place), text_field="text").splits
    return {
        split: [record["name"] for part in records.parts() for _, record in records.read(part)]
        for split, records in splits.items()
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["train.jsonl", "dev.jsonl", "test.jsonl"],
            {"train": ["train.jsonl"], "dev": ["dev.jsonl"], "test": ["test.jsonl"]},
        ),
        (["train.jsonl", "eval.jsonl", "other.jsonl"], {"train": ["train.jsonl"], "dev": ["eval.jsonl"]}),
        (["Train.JSONL", "validation.jsonl.gz"], {"train": ["Train.JSONL"], "dev": ["validation.jsonl.gz"]}),
        (["train.jsonl", "val.jsonl", "dev.jsonl"], {"train": ["train.jsonl"], "dev": ["dev.jsonl"]}),
        (["train.jsonl", "train.jsonl.gz", "test.jsonl.xz"], {"train": ["train.jsonl"], "test": ["test.jsonl.xz"]}),
        (["train.jsonl", "test.json"], {"train": ["train.jsonl"]}),
        (["train.json", "test.json"], {"train": ["train.json"], "test": ["test.json"]}),
        (
            ["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test-00000-of-00001-0123456789abcdef.jsonl"],
            {
                "train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
                "test": ["test-00000-of-00001-0123456789abcdef.jsonl"],
            },
        ),
        (
            ["train_sft-0.jsonl", "train_sft-1.jsonl", "test_sft-0.jsonl"],
            {"train": ["train_sft-0.jsonl", "train_sft-1.jsonl"], "test": ["test_sft-0.jsonl"]},
        ),
        (
            ["b.jsonl", "a.jsonl.gz", "a.ndjson", ".a.jsonl", "_a.jsonl", "README.md"],
            {"all": ["a.jsonl.gz", "a.ndjson", "b.jsonl"]},
        ),
        (["train_a.jsonl", "train_b.jsonl", "c.jsonl"], {"all": ["c.jsonl", "train_a.jsonl", "train_b.jsonl"]}),
        (["training.jsonl", "tests.jsonl"], {"all": ["tests.jsonl", "training.jsonl"]}),
        (
            ["train/b.jsonl", "train/a.jsonl", "validation/a.jsonl", "other/a.jsonl", "loose.jsonl"],
            {"train": ["train/a.jsonl", "train/b.jsonl"], "dev": ["validation/a.jsonl"]},
        ),
        (["train.jsonl", "train/a.jsonl", "test/a.jsonl"], {"train": ["train.jsonl"]}),
    ],
)  # fmt: skip
def test_splits_of_a_folder_follow_its_names(tmp_path, names, expected):
    write(tmp_path, *names)
    assert found("jsonl", tmp_path) == expected


def test_labels_are_not_records(tmp_path):
    write(tmp_path, "a.json")
    (tmp_path / "labels.json").write_text('["b"]')
    assert found("json", tmp_path) == {"all": ["a.json"]}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", {"train": ["train-0.jsonl", "train-1.jsonl"], "test": ["test-0.jsonl"]}),
        ("train*.jsonl", {"all": ["train-0.jsonl", "train-1.jsonl"]}),
        ("test-[0-9].jsonl", {"all": ["test-0.jsonl"]}),
        ("deep/*", {"all": ["deep/a", "deep/b.jsonl", "deep/c.json"]}),
        ("deep/**/*.jsonl", {"all": ["deep/b.jsonl", "deep/er/d.jsonl"]}),
    ],
)
def test_globs_match_files_in_the_order_of_their_paths(tmp_path, pattern, expected):
    write(tmp_path, "train-0.jsonl", "train-1.jsonl", "test-0.jsonl")
    write(tmp_path, "deep/c.json", "deep/b.jsonl", "deep/a", "deep/er/d.jsonl", "deep/b.jsonl.gz")
    assert found("jsonl", tmp_path / pattern) == expected


def test_a_place_whose_name_looks_like_a_glob(tmp_path):
    write(tmp_path, "data[1]/a.jsonl", "data1/b.jsonl")
    assert found("jsonl", tmp_path / "data[1]") == {"all": ["data[1]/a.jsonl"]}
    assert found("jsonl", tmp_path / "data[1]" / "a.jsonl") == {"all": ["data[1]/a.jsonl"]}


@pytest.mark.parametrize(
    ("names", "scheme", "place", "message"),
    [
        ([], "jsonl", "", r"has no jsonl files \(.jsonl, .ndjson, .json\); it is empty"),
        (["a.txt", "b.csv", "c", "d"], "jsonl", "", "has no jsonl files .*; it has a.txt, b.csv, c, ..."),
        (["train/a.txt"], "jsonl", "", "train has no jsonl files .*; it has a.txt"),
        (["dev.jsonl"], "jsonl", "", "train.jsonl does not exist"),
        (["test/a.parquet"], "parquet", "", "train.parquet does not exist"),
        ([], "jsonl", "a.jsonl", "a.jsonl does not exist"),
        ([], "jsonl", "*.jsonl", r"source jsonl:.*\*.jsonl matches no file"),
        (["a.jsonl/b"], "jsonl", "*.jsonl", "matches only folders"),
        (["a.jsonl/b"], "jsonl", "", "cannot read .*a.jsonl: is a directory"),
        (["a.jsonl", "b.csv.gz"], "jsonl", "*", r"b\.csv\.gz is a csv file; expected jsonl files only"),
        (["a.jsonl", "b.jsonl"], "text", "*", "a.jsonl is a json file; expected text files only"),
        (["train.jsonl", "test.jsonl", "c.jsonl"], "jsonl", "*", "splits train, test, and .*c.jsonl, which is of none"),
        (["dev.jsonl", "test.jsonl"], "jsonl", "*", "files of the splits dev, test, but none of train"),
        (["train_a.jsonl", "test_a.jsonl", "train_b.jsonl"], "jsonl", "", "which of its files belong together"),
        (["train_a.jsonl", "test_a.jsonl", "c.jsonl"], "jsonl", "*", "by a glob: c.jsonl, test_a.jsonl, train_a"),
    ],
)  # fmt: skip
def test_unusable_places_are_named(tmp_path, names, scheme, place, message):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        find_records(scheme, str(tmp_path / place), text_field="text")


def test_a_file_that_becomes_a_folder(tmp_path):
    write(tmp_path, "a.jsonl")
    records = find_records("jsonl", str(tmp_path / "a.jsonl"), text_field="text").splits["all"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").mkdir()
    for use in (records.key, lambda: list(records.read(Part(str(tmp_path / "a.jsonl"))))):
        with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: is a directory"):
            use()


def test_home_folder(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("jsonl", "~/a.jsonl") == {"all": ["a.jsonl"]}


def test_labels_keep_their_order(tmp_path):
    write(tmp_path, "train.jsonl")
    assert find_records("jsonl", str(tmp_path), text_field="text").labels == ()
    (tmp_path / "labels.json").write_bytes(b'\xef\xbb\xbf["b", "a"]')
    assert find_records("jsonl", str(tmp_path), text_field="text").labels == ("b", "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "expected a JSON list of label names"),
        (b'["a", 1]', "expected a JSON list of label names"),
        (b'["a",\n@]', "line 2 column 1 is not valid JSON"),
        (b'["\xff"]', "is not UTF-8 text"),
    ],
)
def test_unusable_labels(tmp_path, content, message):
    write(tmp_path, "train.jsonl")
    (tmp_path / "labels.json").write_bytes(content)
    with pytest.raises(UserError, match=f"labels.json:? {message}"):
        find_records("jsonl", str(tmp_path), text_field="text")


def test_what_records_come_from(tmp_path):
    write(tmp_path, "a/train-0.jsonl", "a/train-1.jsonl", "a/test.jsonl", "b/1.jsonl", "b/2.jsonl")
    splits = find_records("jsonl", str(tmp_path / "a"), text_field="text").splits
    assert splits["train"].where == f"{tmp_path / 'a'} (train)"
    assert splits["test"].where == str(tmp_path / "a" / "test.jsonl")
    assert find_records("jsonl", str(tmp_path / "b"), text_field="text").splits["all"].where == str(tmp_path / "b")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_records_go_to_other_processes(tmp_path, scheme):
    write(tmp_path, "a")
    records = find_records(scheme, str(tmp_path / "a"), text_field="text").splits["all"]
    assert pickle.loads(pickle.dumps(records)) == records


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_heavy_is_imported_to_find_and_read_local_files(tmp_path, scheme):
    (tmp_path / "a").write_text('{"a": 1}')
    heavy = {"jax", "fsspec", "pandas", "transformers"} | ({"pyarrow"} if scheme != "parquet" else set())
    code = f"""
import sys
from jaxcl.data.formats import find_records
records = find_records({scheme!r}, {str(tmp_path / "a")!r}, text_field="text").splits["all"]
records.key()
if {scheme!r} != "parquet":
    print([list(records.read(part)) for part in records.parts()])
print(set(sys.modules) & {heavy!r}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_records_in_memory():
    records = ListRecords([{"a": 1}, {"a": 2}], "mine")
    assert [(str(where), one) for part in records.parts() for where, one in records.read(part)] == [
        ("mine row 1", {"a": 1}),
        ("mine row 2", {"a": 2}),
    ]
    assert len(records.parts()) == 1
