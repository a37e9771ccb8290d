"""Benchmarks as TFDS data sets: found by name, from folders laid out as their authors publish them."""

import gzip
import json
import re
from collections import Counter

import pytest

from jaxcl.cli import main
from jaxcl.data.sources import load_source
from jaxcl.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("no_tensorflow"),
    # Of tensorflow-datasets and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def write_pairs(folder, sizes):
    for split, size in sizes.items():
        rows = [{"prompt": f"{split} {i}\u2028é? ", "answer": f"{i % 3}"} for i in range(size)]
        write(folder / f"{split}.json", json.dumps(rows))


def write_lines(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def science_rows(split, size, labels):
    return [{"text": f"{split} {i}", "label": labels[i * i % len(labels)]} for i in range(size)]


def reviews(name, polarities):
    return {f"{name}_{i}": {"term": "zoom", "sentence": f"{name} {i}", "polarity": p} for i, p in enumerate(polarities)}


def manual(data_dir):
    return data_dir / "downloads" / "manual"


def files_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


ACL = ("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses")


@pytest.mark.parametrize(
    ("source", "folder", "sizes"),
    [
        ("trace/fomc", "FOMC", {"train": 23, "eval": 5, "test": 7}),
        ("trace/20minuten", "20Minuten", {"train": 3, "eval": 2, "test": 2}),
        ("superni/task363", "task363", {"train": 12, "test": 4}),
        ("superni/task002", "task002", {"train": 12, "eval": 3, "test": 4}),
    ],
)
def test_instruction_tasks_have_the_rows_of_their_files_in_order(tmp_path, source, folder, sizes):
    write_pairs(manual(tmp_path) / folder, sizes)
    task = load_source(f"tfds:{source}", data_dir=str(tmp_path))
    plain = load_source(f"json:{manual(tmp_path) / folder}")
    assert (task.train, task.dev, task.test) == (plain.train, plain.dev, plain.test)
    assert [len(task.train), len(task.dev), len(task.test)] == [sizes["train"], sizes.get("eval", 0), sizes["test"]]
    assert any(tmp_path.rglob("*.array_record*"))
    # What is prepared needs its files no more.
    (manual(tmp_path) / folder).rename(tmp_path / "elsewhere")
    assert load_source(f"tfds:{source}", data_dir=str(tmp_path)).train == plain.train


@pytest.mark.parametrize("name", ["domains/acl_papers.txt", "acl_anthology.txt", "acl_anthology.txt.gz"])
def test_domains_are_the_lines_of_their_file(tmp_path, name):
    path = manual(tmp_path) / name
    lines = [f"passage\u2028{i} ·\f{'long ' * i}" for i in range(40)]
    text = "\n\n".join(f"  {line}" for line in lines) + "\n"
    write(path, text)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    task = load_source("tfds:das_acl", data_dir=str(tmp_path))
    assert task.kind == "text"
    found = [row["text"] for row in [*task.train, *task.dev, *task.test]]
    assert sorted(found) == sorted(line.strip() for line in lines)
    # Nothing is said of test rows: some are held out, as of any text.
    plain = load_source(f"text:{path}", heldout=0.05)
    assert task.test
    assert task.test == plain.test


@pytest.mark.parametrize("folder", ["end_tasks/aclarc", "citation_intent"])
def test_end_task_in_the_papers_splits_and_in_its_own(tmp_path, folder):
    splits = {
        "train": science_rows("train", 130, ACL),
        "dev": science_rows("dev", 11, ACL),
        "test": science_rows("test", 13, ACL),
    }
    for split, rows in splits.items():
        write_lines(manual(tmp_path) / folder / f"{split}.jsonl", rows)
    own = load_source("tfds:das_acl/end_task_original", data_dir=str(tmp_path))
    assert (own.kind, own.labels) == ("labelled", ACL)
    assert (own.train, own.dev, own.test) == (splits["train"], splits["dev"], splits["test"])

    paper = load_source("tfds:das_acl/end_task", data_dir=str(tmp_path))
    # A tenth of 130 rows over six classes: two a class, or all where a class has fewer.
    moved = [row for label in ACL for row in [row for row in splits["train"] if row["label"] == label][:2]]
    assert 0 < len(moved) < 12  # some classes do have fewer
    assert not paper.dev
    assert paper.train == [row for row in splits["train"] if row not in moved]
    texts = Counter(row["text"] for row in paper.test)
    assert texts == Counter(row["text"] for row in [*splits["test"], *splits["dev"], *moved])


def test_products_of_the_authors_archive(tmp_path):
    folder = manual(tmp_path) / "absa" / "dat"
    parts = ("train", "dev", "test")
    for part in parts:
        write(folder / f"Bing5Domains/Nokia6610/{part}.json", json.dumps(reviews(f"6610 {part}", "+-+++")))
        write(folder / f"Bing9Domains/Nokia6600/{part}.json", json.dumps(reviews(f"6600 {part}", "-+")))
    task = load_source("tfds:das_phone/end_task_original", pair_field="aspect", data_dir=str(tmp_path))
    assert task.labels == ("negative", "positive")
    assert not task.dev
    assert [(row["text"], row["pair"], row["label"]) for row in task.train] == [
        (f"6610 {part} {i}", "zoom", "negative" if i == 1 else "positive") for part in parts for i in range(5)
    ]
    assert [row["text"] for row in task.test] == [f"6600 {part} {i}" for part in parts for i in range(2)]
    paper = load_source("tfds:das_phone/end_task", pair_field="aspect", data_dir=str(tmp_path))
    # 30% of 15 rows over two classes: two a class.
    gone = {"6610 train 0", "6610 train 2", "6610 train 1", "6610 dev 1"}
    assert [row["text"] for row in paper.train] == [r["text"] for r in task.train if r["text"] not in gone]
    assert {row["text"] for row in paper.test} == {row["text"] for row in task.test} | gone


def test_restaurants_leave_out_aspects_of_two_minds(tmp_path):
    polarities = ["positive", "conflict", "neutral", "negative"]
    for split in ("train", "test"):
        write(manual(tmp_path) / f"SemEval14-res/{split}.json", json.dumps(reviews(split, polarities)))
    task = load_source("tfds:das_restaurant/end_task", pair_field="aspect", data_dir=str(tmp_path))
    assert [row["label"] for row in task.train] == ["positive", "neutral", "negative"]
    assert [row["text"] for row in task.test] == ["test 0", "test 2", "test 3"]


@pytest.mark.parametrize("source", ["trace/fomc", "das_ai/end_task", "das_pubmed", "das_camera/end_task"])
def test_missing_files_are_named_before_anything_is_written(tmp_path, source):
    expected = {
        "trace/fomc": ["FOMC/train.json", "FOMC/test.json"],
        "das_ai/end_task": ["sciie/test.jsonl"],
        "das_pubmed": ["domains/pubmed_abstracts.txt"],
        "das_camera/end_task": ["end_tasks/camera/train.jsonl", "end_tasks/camera/test.jsonl"],
    }[source]
    write_pairs(manual(tmp_path) / "FOMC", {"eval": 3})
    for split in ("train", "dev"):
        write_lines(manual(tmp_path) / "sciie" / f"{split}.jsonl", [])
    before = files_below(tmp_path)
    with pytest.raises(UserError) as caught:
        load_source(f"tfds:{source}", data_dir=str(tmp_path))
    first, *lines = str(caught.value).split("\n")
    count = "1 file is" if len(expected) == 1 else f"{len(expected)} files are"
    assert f"{count} missing in {manual(tmp_path)} (docs/data.md" in first
    assert [line.split(":")[0] for line in lines] == [f"  {name}" for name in expected]
    assert all(len(line.split(": ", 1)[1]) > 10 for line in lines)
    assert files_below(tmp_path) == before


def test_what_files_hold_is_checked_with_place(tmp_path):
    folder = manual(tmp_path)
    good = [{"text": "a", "label": "Uses"}]
    write_lines(folder / "citation_intent/dev.jsonl", good)
    write_lines(folder / "citation_intent/test.jsonl", good)

    def refused(source, content, name, message):
        write(folder / name, content)
        with pytest.raises(UserError, match=message) as caught:
            load_source(f"tfds:{source}", data_dir=str(tmp_path))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("*.array_record*"))

    acl = ("das_acl/end_task", "citation_intent/train.jsonl")
    line = json.dumps(good[0]) + "\n"
    wrong = json.dumps({"text": "a", "label": "Abuses"})
    refused(acl[0], line + wrong, acl[1], r"train.jsonl line 2: label 'Abuses' is not one of Background, ")
    refused(acl[0], line + '{"label": 3}', acl[1], r"train.jsonl line 2: expected text in text, label")
    refused(acl[0], line + "{", acl[1], r"train.jsonl line 2 column 2 is not valid JSON")
    refused(acl[0], "", acl[1], r"tfds:das_acl/end_task: no train rows in ")
    half = r"train.jsonl line 2: text holds half of a surrogate pair \(U\+D83D\) at character 1"
    refused(acl[0], line + '{"text": "\\ud83d", "label": "Uses"}', acl[1], half)
    write_pairs(folder / "FOMC", {"eval": 1, "test": 1})
    odd = '[{"prompt": "x", "answer": %s}]'
    refused("trace/fomc", odd % "null", "FOMC/train.json", r"train.json row 1: field 'answer' is null")
    refused("trace/fomc", odd % "NaN", "FOMC/train.json", r"train.json row 1: field 'answer' is NaN")
    refused("trace/fomc", "{}", "FOMC/train.json", r"train.json: expected a JSON list of")
    refused("trace/fomc", '[{"prompt": "x"}]', "FOMC/train.json", r"train.json row 1: expected an object with prompt")
    write(folder / "SemEval14-res/test.json", "{}")
    refused("das_restaurant/end_task", "[]", "SemEval14-res/train.json", r"train.json: expected a JSON object of id")


def test_the_command_prepares_and_says_what_is_missing(tmp_path, capsys):
    folder, data = tmp_path / "downloads", tmp_path / "data"
    write_pairs(folder / "FOMC", {"train": 9, "eval": 2, "test": 3})
    write(folder / "yelp_restaurant.txt", "one\ntwo\n")
    options = ["--manual-dir", str(folder), "--data-dir", str(data)]
    assert main(["prepare", "trace/fomc", "das_restaurant", *options]) == 1
    first, *lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first.startswith(f"jaxcl prepare: trace/fomc das_restaurant: 2 files are missing in {folder} ")
    # One line a file, although two configurations want it.
    assert [line.split(":")[0].strip() for line in lines] == [
        "end_tasks/restaurant/train.jsonl",
        "end_tasks/restaurant/test.jsonl",
    ]
    assert not data.exists()

    assert main(["prepare", "trace/fomc", "das_restaurant/domain", *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"tfds:trace/fomc: train 9, validation 2, test 3 (published: train 5000) in {data}/trace/fomc/1.0.0",
        f"tfds:das_restaurant/domain: train 2 in {data}/das_restaurant/domain/1.0.0",
    ]
    assert len(load_source("tfds:trace/fomc", data_dir=str(data)).train) == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("glue", "no data set 'glue'; allowed: das, das_restaurant, .*, trace, superni"),
        ("trace/lima", "trace has no 'lima'; allowed: c-stance, fomc, .*, 20minuten"),
    ],
)
def test_unknown_names_are_exit_code_2(tmp_path, capsys, name, message):
    assert main(["prepare", name, "--manual-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_benchmarks_are_complete():
    from jaxcl.data.builders.instructions import SUPERNI_ORDERS, TRACE_ORDERS
    from jaxcl.data.builders.prepare import BUILDERS, GROUPS, expand

    assert [len(set(order)) for order in TRACE_ORDERS] == [8, 8]
    assert [len(set(order)) for order in SUPERNI_ORDERS] == [12, 12]
    assert set(TRACE_ORDERS[0]) == set(TRACE_ORDERS[1])
    assert set(SUPERNI_ORDERS[0]) == set(SUPERNI_ORDERS[1])
    assert len(expand("trace")) == 8
    assert len(expand("superni")) == 12
    assert len(expand("das")) == 18
    classes = {name: len(BUILDERS[name].domain.labels) for name in GROUPS["das"]}
    assert list(classes.values()) == [3, 2, 2, 6, 7, 13]  # the paper's table 1
