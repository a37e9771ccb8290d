import gzip
import json

import pytest

from jaxcl.data.sources import expected_kind, load_end_task, load_source, load_task
from jaxcl.data.spec import EndTaskSpec, TaskSpec
from jaxcl.errors import UserError

PAIRS = [{"prompt": f"question {i}: ", "answer": str(i), "extra": [1]} for i in range(40)]
LABELLED = [{"text": f"text {i}", "label": "ab"[i % 2], "aspect": f"aspect {i}"} for i in range(40)]


def write_json(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return f"json:{folder}"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def stripped(rows, *names):
    return [{name: row[name] for name in names} for row in rows]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"source": "text:a.txt"}, "text"),
        ({"source": "stdlib:python_topics"}, "text"),
        ({"source": "stdlib:docstrings:numpy"}, "text"),
        ({"source": "stdlib:errno"}, "pairs"),
        ({"source": "stdlib:errno", "end_task": {"source": "stdlib:errno"}}, "pairs"),
        ({"source": "json:a"}, "pairs"),
        ({"source": "json:a", "kind": "text"}, "text"),
        ({"source": "tfds:a", "end_task": {"source": "tfds:a/b"}}, "text"),
        ({"source": "hf:a", "end_task": {"source": "hf:b"}, "prompt_template": "{text}?"}, "pairs"),
    ],
)
def test_the_kind_of_a_task_is_expected_without_reading_it(fields, kind):
    assert expected_kind(TaskSpec(name="a", **fields)) == kind


def test_no_kind_is_expected_of_a_source_that_is_not_there():
    with pytest.raises(UserError, match="nearest is errno"):
        expected_kind(TaskSpec(name="a", source="stdlib:errnoo"))


def test_json_folder(tmp_path):
    source = write_json(tmp_path / "task", train=PAIRS[:30], eval=PAIRS[30:34], test=PAIRS[34:])
    task = load_source(source)
    assert (task.name, task.kind) == ("task", "pairs")
    assert task.train == stripped(PAIRS[:30], "prompt", "answer")
    assert task.dev == stripped(PAIRS[30:34], "prompt", "answer")
    assert task.test == stripped(PAIRS[34:], "prompt", "answer")


def test_json_folder_without_dev_or_test(tmp_path):
    task = load_source(write_json(tmp_path / "a", train=PAIRS[:30], test=PAIRS[30:]))
    assert (len(task.train), task.dev, len(task.test)) == (30, [], 10)
    held = load_source(write_json(tmp_path / "b", train=PAIRS), heldout=0.1)
    assert (held.dev, len(held.train) + len(held.test)) == ([], 40)
    assert 1 <= len(held.test) <= 12
    assert sorted(row["answer"] for row in [*held.train, *held.test]) == sorted(row["answer"] for row in PAIRS)


@pytest.mark.parametrize("packed", [False, True])
def test_text_file_with_a_held_out_split_by_seed(tmp_path, packed):
    passages = [f"passage {i} é" for i in range(100)]
    content = ("\n\n".join(passages) + "\n").encode()
    path = tmp_path / "news.txt"
    path.write_bytes(gzip.compress(content) if packed else content)
    task = load_source(f"text:{path}", heldout=0.1)
    assert task.kind == "text"
    assert all(3 <= len(rows) <= 20 for rows in (task.dev, task.test))
    assert sorted(row["text"] for rows in (task.train, task.dev, task.test) for row in rows) == sorted(passages)
    assert load_source(f"text:{path}", heldout=0.1) == task
    assert load_source(f"text:{path}", heldout=0.1, seed=1).test != task.test


def test_jsonl_folder_with_labels_and_a_second_text(tmp_path):
    for split, rows in (("train", LABELLED[:30]), ("dev", LABELLED[30:35]), ("test", LABELLED[35:])):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    (tmp_path / "labels.json").write_text('["b", "a", "c"]')
    task = load_source(f"jsonl:{tmp_path}", pair_field="aspect")
    assert (task.kind, task.labels) == ("labelled", ("b", "a", "c"))
    assert task.train[3] == {"text": "text 3", "label": "b", "pair": "aspect 3"}
    assert [len(task.train), len(task.dev), len(task.test)] == [30, 5, 5]
    end = load_end_task(EndTaskSpec(source=f"jsonl:{tmp_path}"), "reviews")
    assert (end.name, end.kind, "pair" in end.train[0]) == ("reviews", "labelled", False)


def test_jsonl_file_is_split(tmp_path):
    task = load_source(write_lines(tmp_path / "rows.jsonl", LABELLED), heldout=0.1)
    assert len(task.train) > len(task.dev) + len(task.test)
    assert task.dev
    assert task.test
    assert task.labels == ("a", "b")
    two = load_source(write_lines(tmp_path / "two.jsonl", LABELLED[:2]))
    assert [len(two.train), len(two.dev), len(two.test)] == [1, 0, 1]


def test_kind_follows_the_fields_unless_told(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", LABELLED)
    assert load_source(source, kind="text").train[0].keys() == {"text"}
    pairs = load_source(source, prompt_template="{text} about {aspect}?", answer_field="label")
    assert {"prompt": "text 0 about aspect 0?", "answer": "a"} in [*pairs.train, *pairs.dev, *pairs.test]
    renamed = load_source(source, text_field="aspect", label_field="text", kind="labelled")
    assert renamed.train[0]["text"].startswith("aspect")


def test_limits_choose_by_seed(tmp_path):
    source = write_json(tmp_path / "task", train=PAIRS[:30], test=PAIRS[30:])
    spec = TaskSpec(name="x", source=source, train=7, test=3)
    task = load_task(spec)
    assert (len(task.train), len(task.test)) == (7, 3)
    assert load_task(spec) == task
    assert load_task(spec, seed=1).train != task.train
    assert [int(row["answer"]) for row in task.train] == sorted(int(row["answer"]) for row in task.train)


def test_numbers_become_text(tmp_path):
    rows = [{"prompt": "half of 5", "answer": 2.5}, {"prompt": "half of 4", "answer": 2.0}, {"prompt": 4, "answer": 2}]
    task = load_source(write_json(tmp_path / "task", train=rows, test=rows))
    assert [row["answer"] for row in task.train] == ["2.5", "2", "2"]
    assert task.train[2]["prompt"] == "4"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jsn:x", "source 'jsn:x': expected `scheme:rest` .*nearest is json"),
        ("texts:x", "nearest is text:x"),
        ("data/train.json", "expected `scheme:rest`"),
        ("json:", "expected `scheme:rest`"),
        ("json:/no/such/folder", "/no/such/folder does not exist"),
        ("text:/no/such/file", "/no/such/file does not exist"),
        ("stdlib:unicode_categry", "nearest is unicode_category"),
        ("stdlib:docstrings:no_such_package_here", "no package 'no_such_package_here'"),
    ],
)
def test_unknown_sources_are_named_with_the_nearest(source, message):
    with pytest.raises(UserError, match=message):
        load_source(source)


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({"train.json": '[{"prompt": "a",\n "answer": }]'}, "json", "train.json line 2 column 12 is not valid JSON"),
        (
            {"train.json": '{"prompt": "a"}'},
            "json",
            "train.json row 1 has the fields prompt; expected prompt and answer",
        ),
        ({"train.json": "[1]"}, "json", "train.json row 1: expected a JSON object, got int"),
        ({"train.json": "[]", "test.json": "[]"}, "json", "is empty"),
        ({"test.json": "[]"}, "json", "train.json does not exist"),
        (
            {"train.json": '[{"prompt": "a", "answer": "b"}]', "test.json": "[]"},
            "json",
            "task x: .*test.json has no test rows",
        ),
        (
            {"train.json": '[{"prompt": "a", "answer": "b"}, {"prompt": "c", "target": "d"}]'},
            "json",
            "train.json row 2: no field 'answer'; its fields are prompt, target",
        ),
        (
            {"train.json": '[{"question": "a", "answer": "b"}]'},
            "json",
            "row 1 has the fields question, answer; expected prompt and answer, or text",
        ),
        ({"train.json": '[{"prompt": "a", "answer": null}]'}, "json", "row 1: field 'answer' is null; expected text"),
        (
            {"train.json": '[{"prompt": "a", "answer": NaN}]'},
            "json",
            "train.json row 1: field 'answer' is NaN; expected",
        ),
        ({"train.json": '[{"prompt": -1e400, "answer": "a"}]'}, "json", "row 1: field 'prompt' is infinite; expected"),
        ({"train.jsonl": '{"text": "a"}\n{"text": NaN}\n'}, "jsonl", "train.jsonl line 2: field 'text' is NaN"),
        ({"train.jsonl": '{"text": "a", "label": NaN}\n'}, "jsonl", "train.jsonl line 1: field 'label' is NaN"),
        (
            {"train.jsonl": '{"text": "a", "label": "b"}\n{"text": "a", "label": " "}\n'},
            "jsonl",
            "train.jsonl row 2: the label is empty",
        ),
        (
            {"train.jsonl": '{"text": "a"}\n{"text": "ab\\ud83d"}\n'},
            "jsonl",
            r"train.jsonl line 2: field 'text' holds half of a surrogate pair \(U\+D83D\) at character 3",
        ),
        (
            {"train.json": '[{"prompt": "a",\n "answer": 1' + "0" * 5000 + "}]"},
            "json",
            "train.json row 1 is not usable JSON: a number has too many digits",
        ),
        (
            {"train.jsonl": '{"text": "a"}\n{"text": 1' + "0" * 5000 + "}\n"},
            "jsonl",
            "train.jsonl line 2 is not usable JSON: a number has too many digits",
        ),
        (
            {"train.jsonl": '{"text": "a", "label": "b"}\n', "labels.json": '["b", "b "]'},
            "jsonl",
            "the classes 'b' and 'b ' are the same",
        ),
        ({"train.jsonl": '{"text": "a"}\n\n{"text": }\n'}, "jsonl", "train.jsonl line 3 column 10 is not valid JSON"),
        ({"train.jsonl": '{"text": "a"}\n[]\n'}, "jsonl", "train.jsonl line 2: expected a JSON object, got a list"),
        ({"dev.jsonl": "{}"}, "jsonl", "train.jsonl does not exist"),
        (
            {"train.jsonl": '{"text": "a", "label": "b"}\n{"text": "a", "label": "c"}\n', "labels.json": '["b"]'},
            "jsonl",
            "train.jsonl row 2: label 'c' is not one of b",
        ),
        (
            {"train.jsonl": '{"text": "a", "label": "b"}\n', "labels.json": '{"b": 1}'},
            "jsonl",
            "labels.json: expected a JSON list of label names",
        ),
    ],
)
def test_unusable_files_are_named_with_line_or_row(tmp_path, files, source, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_source(f"{source}:{tmp_path}", name="x")


def _broken_gzip() -> bytes:
    """A gzip file whose compressed stream itself is broken, not just its length or checksum."""
    packed = bytearray(gzip.compress(b"a few words\n" * 9, mtime=0))
    packed[10] |= 0b110  # a type of block that does not exist
    return bytes(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"fine\nnot \xff fine\n", "line 2 is not UTF-8"),
        (gzip.compress(b"a\n" * 5000, mtime=0)[:-20], "damaged gzip"),
        (_broken_gzip(), "damaged gzip file: Error -3"),
        (b"only one", "has no test rows"),
        (b"twice\ntwice\n", "has no test rows"),
    ],
)
def test_unusable_text_files(tmp_path, content, message):
    (tmp_path / "news.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_source(f"text:{tmp_path / 'news.txt'}")


def test_a_folder_where_a_file_should_be(tmp_path):
    with pytest.raises(UserError, match=r"has no text files \(.txt, .text\); it is empty"):
        load_source(f"text:{tmp_path}")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(UserError, match="is empty"):
        load_source(f"json:{tmp_path / 'train.json'}")
    (tmp_path / "test.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*test\.json: is a directory"):
        load_source(f"json:{tmp_path}")


_WITHIN = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines cuts at these too


def test_text_is_cut_at_line_ends_only(tmp_path):
    passages = [f"one{character}passage {number}" for number, character in enumerate(_WITHIN)]
    (tmp_path / "news.txt").write_bytes("\n".join(["first\r\nsecond\rthird", *passages]).encode())
    task = load_source(f"text:{tmp_path / 'news.txt'}")
    found = [row["text"] for rows in (task.train, task.dev, task.test) for row in rows]
    assert sorted(found) == sorted(["first", "second", "third", *passages])


def test_json_lines_are_cut_at_line_ends_only(tmp_path):
    texts = [f"one{character}passage" for character in _WITHIN]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "train.jsonl").write_bytes("\r\n".join(lines).encode())
    (tmp_path / "test.jsonl").write_bytes("\r".join(lines).encode())
    task = load_source(f"jsonl:{tmp_path}")
    assert [row["text"] for row in task.train] == [row["text"] for row in task.test] == texts


def test_spellings_of_a_label_are_one_class(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in (1.0, 0.0, "1.0", "x", "é")])
    write_lines(
        tmp_path / "test.jsonl", [{"text": "t", "label": label} for label in (1, "0", "x ", " x", "e\u0301", 1.5)]
    )
    task = load_source(f"jsonl:{tmp_path}", kind="labelled")
    assert task.labels == ("0", "1", "1.5", "x", "é")
    assert [row["label"] for row in task.train] == ["1", "0", "1", "x", "é"]
    assert [row["label"] for row in task.test] == ["1", "0", "x", "x", "é", "1.5"]
    (tmp_path / "labels.json").write_text('["x", "1.0", "0", "1.5", "é"]')  # the source's own names and order are kept
    task = load_source(f"jsonl:{tmp_path}", kind="labelled")
    assert task.labels == ("x", "1.0", "0", "1.5", "é")
    assert [row["label"] for row in task.test] == ["1.0", "0", "x", "x", "é", "1.5"]


def test_equal_rows_are_held_out_together(tmp_path):
    task = load_source(write_lines(tmp_path / "rows.jsonl", PAIRS * 5), heldout=0.2)
    prompts = [{row["prompt"] for row in rows} for rows in (task.train, task.dev, task.test)]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(PAIRS)
    assert sum(map(len, (task.train, task.dev, task.test))) == 5 * len(PAIRS)


@pytest.mark.parametrize("count", [3, 40, 200])
def test_changed_rows_do_not_move_the_others(tmp_path, count):
    rows = [{"prompt": f"q{i}", "answer": f"a{i}"} for i in range(count)]
    before = load_source(write_lines(tmp_path / "rows.jsonl", rows), seed=3)
    more = [{"prompt": f"new{i}", "answer": "a"} for i in range(count)]
    after = load_source(write_lines(tmp_path / "rows.jsonl", [*reversed(rows), *more]), seed=3)
    learned = {row["prompt"] for row in before.train}
    assert not learned & {row["prompt"] for row in [*after.dev, *after.test]}
    if count == 200:  # enough for each split to get its rows by hash
        for split in ("train", "dev", "test"):
            kept = [row for row in getattr(after, split) if row in rows]
            assert kept == list(reversed(getattr(before, split)))


def test_held_out_shares_are_about_the_configured_one(tmp_path):
    rows = [{"text": f"passage {i}"} for i in range(4000)]
    task = load_source(write_lines(tmp_path / "rows.jsonl", rows), heldout=0.2)
    # Five standard deviations of a binomial variable are 127.
    assert len(task.test) == pytest.approx(800, abs=127)
    assert len(task.dev) == pytest.approx(800, abs=127)
