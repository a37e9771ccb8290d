import sys
import types

import pytest

from jaxcl.data import hubs
from jaxcl.data.cache import Cache
from jaxcl.data.sources import load_source, load_task
from jaxcl.data.spec import TaskSpec
from jaxcl.data.split import StreamedRows
from jaxcl.errors import UserError

pytestmark = [
    # Of tensorflow-datasets and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.usefixtures("no_tensorflow")
def test_tfds_reads_a_data_set_without_tensorflow(tmp_path, capfd):
    task = load_source("tfds:tests.tiny.datasets.tiny_reviews", data_dir=str(tmp_path))
    assert task.kind == "labelled"
    assert task.labels == ("bad", "good")
    assert [len(task.train), len(task.dev), len(task.test)] == [20, 4, 6]
    for rows, numbers in ((task.train, range(20)), (task.dev, range(20, 24)), (task.test, range(24, 30))):
        expected = {(f"review {i} tasted of café", ("bad", "good")[i % 2]) for i in numbers}
        assert {(row["text"], row["label"]) for row in rows} == expected
    assert list(tmp_path.rglob("*.array_record*"))
    # Prepared data is used again, here as another kind of task.
    template = {"prompt_template": "{text} ({score})?", "answer_field": "label", "train": 5}
    pairs = load_source("tfds:tests.tiny.datasets.tiny_reviews", data_dir=str(tmp_path), **template)
    assert pairs.kind == "pairs"
    assert len(pairs.train) == 5
    assert all(row["prompt"].endswith(")?") and row["answer"] in ("bad", "good") for row in pairs.train)
    # With a cache, rows stay on disk.
    spec = TaskSpec(name="x", source="tfds:tests.tiny.datasets.tiny_reviews", data_dir=str(tmp_path), **template)
    streamed = load_task(spec, cache=Cache(tmp_path / "cache"))
    assert isinstance(streamed.train, StreamedRows)
    assert [list(streamed.train), list(streamed.test)] == [pairs.train, pairs.test]
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_data_set_at_all", "Dataset no_such_data_set_at_all not found"),
        ("tests.tiny.datasets.absent", "absent"),
    ],
)
def test_unknown_tfds_data_sets_are_one_line(tmp_path, name, message):
    with pytest.raises(UserError, match=f"source tfds:{name}: .*{message}") as caught:
        load_source(f"tfds:{name}", data_dir=str(tmp_path))
    assert len(str(caught.value)) < 300


def test_hf_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'jaxcl\[hf\]'"):
        load_source("hf:owner/name")


def test_hf_splits_and_class_names(monkeypatch):
    class Split(list):
        features = types.MappingProxyType({"label": types.SimpleNamespace(names=["no", "yes"])})

    def load_dataset(name, config, cache_dir):
        assert (name, config, cache_dir) == ("owner/name", "small", None)
        rows = [{"text": f"row {i}", "label": i % 2} for i in range(6)]
        return {"train": Split(rows[:3]), "validation": Split(rows[3:4]), "test": Split(rows[4:])}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load_source("hf:owner/name:small")
    assert task.train == [
        {"text": "row 0", "label": "no"},
        {"text": "row 1", "label": "yes"},
        {"text": "row 2", "label": "no"},
    ]
    assert (len(task.dev), len(task.test), task.labels) == (1, 2, ("no", "yes"))


def test_a_memory_mapped_hf_data_set_is_streamed(monkeypatch, tmp_path):
    class Split(list):
        features = types.MappingProxyType({"label": types.SimpleNamespace(names=["no", "yes"])})
        _fingerprint = "0123"

    found = {"train": Split({"text": f"row {i}", "label": i % 2} for i in range(50))}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: found))
    monkeypatch.setattr(hubs, "_PART_ROWS", 7)
    spec = TaskSpec(
        name="x", source="hf:owner/name", heldout=0.2, kind="pairs", prompt_field="text", answer_field="label"
    )
    streamed, here = load_task(spec, cache=Cache(tmp_path)), load_task(spec)
    assert isinstance(streamed.train, StreamedRows)
    assert len(streamed.train.parts) == 8
    assert [list(streamed.train), list(streamed.test)] == [here.train, here.test]
    assert {row["answer"] for row in here.train} == {"no", "yes"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": None}, "hf:owner/name train row 2: field 'label' is null"),
        ({"text": float("nan"), "label": 1}, "hf:owner/name train row 2: field 'text' is NaN"),
        ({"text": "\ud83d", "label": 1}, "hf:owner/name train row 2: field 'text' holds half of a surrogate pair"),
    ],
)
def test_values_that_are_no_text_are_named_with_their_row(monkeypatch, row, message):
    class Split(list):
        features = types.MappingProxyType({"label": types.SimpleNamespace(names=["no", "yes"])})

    found = {"train": Split([{"text": "a", "label": 0}, row])}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: found))
    with pytest.raises(UserError, match=message):
        load_source("hf:owner/name")


def test_hub_failures_and_missing_splits_are_one_line(monkeypatch):
    def fails(name, config, cache_dir):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
    with pytest.raises(UserError, match=r"source hf:owner/name: ConnectionError: no network$"):
        load_source("hf:owner/name")

    class Split(list):
        features = types.MappingProxyType({})

    odd = types.SimpleNamespace(load_dataset=lambda *_, **__: {"part1": Split(), "part2": Split()})
    monkeypatch.setitem(sys.modules, "datasets", odd)
    with pytest.raises(UserError, match="no split called train; splits: part1, part2"):
        load_source("hf:owner/name")
