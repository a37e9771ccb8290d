import errno
import html
import http
import inspect
import mimetypes
import os
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest

from jaxcl.data import stdlib
from jaxcl.data.sources import load_source
from jaxcl.data.stdlib import names, read_stdlib, stdlib_kind

PAIRS = ["unicode_category", "unicode_numeric", "unicode_bidi", "html_entity", "http_status", "mimetypes", "errno"]
ALL = [*PAIRS, "python_topics", "python_topic_names", "docstrings:numpy", "submodules:numpy"]


def everything(name):
    splits = read_stdlib(name).splits
    return [*splits["train"], *splits["dev"], *splits["test"]]


def test_all_sources_are_covered():
    assert {name.partition(":")[0] for name in names()} == {name.partition(":")[0] for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_splits_are_large_enough_and_disjoint(name):
    found = read_stdlib(name)
    sizes = {split: len(rows) for split, rows in found.splits.items()}
    assert sizes["train"] >= 150
    assert min(sizes["dev"], sizes["test"]) >= 15
    fields = {"pairs": ["prompt", "answer"], "text": ["text"], "labelled": ["text", "label"]}[stdlib_kind(name)]
    assert all(list(row) == fields for row in everything(name))
    texts = [row[fields[0]] for row in everything(name)]
    assert len(set(texts)) == len(texts)
    assert all(value.strip() for row in everything(name) for value in row.values())
    assert read_stdlib(name) == found
    task = load_source(f"stdlib:{name}", train=100, test=10)
    assert (task.kind, len(task.train), len(task.test)) == (stdlib_kind(name), 100, 10)


def question(row):
    name, _, asked = row["prompt"].partition("\n")
    return unicodedata.lookup(name), asked


def test_answers_about_characters_are_true():
    categories = dict.fromkeys(row["answer"] for row in everything("unicode_category"))
    for row in everything("unicode_category"):
        character, asked = question(row)
        assert asked == "Category:"
        categories[row["answer"]] = categories[row["answer"]] or unicodedata.category(character)
        assert categories[row["answer"]] == unicodedata.category(character)
    assert (categories["uppercase letter"], categories["decimal digit"]) == ("Lu", "Nd")
    assert len(set(categories.values())) == len(categories) >= 10
    for row in everything("unicode_numeric"):
        character, _ = question(row)
        assert unicodedata.numeric(character) == int(row["answer"])
    directions = {(row["answer"], unicodedata.bidirectional(question(row)[0])) for row in everything("unicode_bidi")}
    assert len({answer for answer, _ in directions}) == len({one for _, one in directions}) == len(directions)
    assert ("right to left", "R") in directions


@pytest.mark.parametrize("name", ["unicode_category", "unicode_numeric", "unicode_bidi"])
def test_no_class_dominates(name):
    counts = Counter(row["answer"] for row in everything(name))
    assert max(counts.values()) <= 300
    assert min(counts.values()) >= 25
    test = Counter(row["answer"] for row in read_stdlib(name).splits["test"])
    assert len(test) >= 0.9 * len(counts)


def test_facts_are_true():
    for row in everything("html_entity"):
        entity = row["prompt"].split("\n")[0]
        assert unicodedata.name(html.unescape(entity)).lower() == row["answer"]
    for row in everything("http_status"):
        [code] = [word.strip(".,") for word in row["prompt"].split() if word.strip(".,").isdigit()]
        assert http.HTTPStatus(int(code)).phrase == row["answer"]
    known = {os.strerror(number) for number in errno.errorcode}
    assert {row["answer"] for row in everything("errno")} == known
    types = set(mimetypes.MimeTypes(filenames=()).types_map[True].values())
    assert {row["answer"] for row in everything("mimetypes")} == types


def test_every_fact_is_learned_and_asked_in_new_words():
    for name, count in (("http_status", len(http.HTTPStatus)), ("errno", len(errno.errorcode))):
        splits = read_stdlib(name).splits
        assert [len(splits[split]) for split in ("train", "dev", "test")] == [4 * count, count, count]
        assert {row["answer"] for row in splits["test"]} == {row["answer"] for row in splits["train"]}


def test_end_tasks_name_the_submodule_in_the_domains_own_splits():
    domain, end = read_stdlib("docstrings:numpy"), read_stdlib("submodules:numpy")
    assert len(end.labels) >= 4
    for split in ("train", "dev", "test"):
        texts = {row["text"] for row in domain.splits[split]}
        assert {row["text"] for row in end.splits[split]} <= texts
        assert {row["label"] for row in end.splits[split]} <= set(end.labels)
    counts = Counter(row["label"] for row in everything("submodules:numpy"))
    assert min(counts.values()) >= 30
    labels = {row["text"]: row["label"] for row in everything("submodules:numpy")}
    assert labels[inspect.cleandoc(np.linalg.LinAlgError.__doc__)] == "linalg"


def test_docstrings_are_read_without_importing_anything(tmp_path, monkeypatch):
    package = tmp_path / "strange_package"
    (package / "_src" / "left").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "broken.py").write_text("def")
    (package / "tests").mkdir()
    (package / "tests" / "test_x.py").write_text(f'"""{"not this " * 20}"""')
    for side in ("left", "right"):
        for i in range(40):
            code = f'def f():\n    """{side} function number {i} does {"much " * 20}."""\n'
            folder = package / "_src" / "left" if side == "left" else package / "_src"
            (folder / (f"m{i}.py" if side == "left" else f"right{i}.py")).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rows = everything("docstrings:strange_package")
    assert len(rows) == 80
    assert not any("not this" in row["text"] for row in rows)
    assert "strange_package" not in sys.modules
    # `_src` holds everything, so that the level below it tells the submodules apart.
    labels = dict(stdlib._docstrings("strange_package"))
    assert {label for text, label in labels.items() if text.startswith("left")} == {"left"}


def test_the_same_rows_at_any_hash_seed():
    code = "from jaxcl.data.stdlib import read_stdlib as r; print(r('unicode_bidi').splits)"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
