"""A finished run that learns one more task is the run that had the task from the start."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxcl.commands.extend import extend
from jaxcl.commands.importance import measure_importance
from jaxcl.config import ExperimentConfig, parse_config
from jaxcl.config.file import read_yaml, validate
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.reporting.report import write_report
from jaxcl.run import sequence
from jaxcl.run.folder import RunFolder
from tests.tiny import runs
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import DECODER, ENCODER, SEEKR, stored

# Neither tokenizer nor row lengths are given by the tasks: both would know the third one from the start.
PAIRS: dict[str, Any] = {
    "model": DECODER,
    "data": {"prompt_length": 64, "answer_length": 24, "bucket_lengths": [64, 88]},
    "tasks": [*runs.PAIRS["tasks"], {"name": "number", "source": "stdlib:unicode_numeric", "train": 24, "test": 4}],
    "training": runs.PAIRS["training"],
    "optimizer": {"learning_rate": 1e-3},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24, "before": True, "future": "next"},
    "method": SEEKR,
}
TEXT: dict[str, Any] = {
    "model": ENCODER,
    "data": {"length": 48, "packing": False},
    "tasks": [
        {"name": "topics", "source": "stdlib:python_topics", "train": 24, "test": 8},
        {"name": "pydantic", "source": "stdlib:docstrings:pydantic", "train": 24, "test": 8},
        {"name": "numpy", "source": "stdlib:docstrings:numpy", "train": 24, "test": 8},
    ],
    "training": {"batch_size": 8, "steps": [3, 3, 4], "log_every": 1, "checkpoint_every": 2},
    "evaluation": {"batch_size": 8},
    "method": {"name": "das", "importance_examples": 16},
}
DECAYED = {**TEXT, "optimizer": {"schedule": "infinite", "final": 0.1, "decay": 2, "learning_rate": 1e-3}}
ADDED = {"pairs": ["name=number", "source=stdlib:unicode_numeric", "train=24", "test=4"],
         "text": ["name=numpy", "source=stdlib:docstrings:numpy", "train=24", "test=8"]}  # fmt: skip
ADDED["decayed"] = ADDED["text"]
LENGTH = {"pairs": None, "text": 4, "decayed": 4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["LATIN SMALL LETTER A\nCategory:", "the language reference"] * 20, 300).save(folder)
    return folder


def config(content: dict[str, Any], output: Path, tokenizer: Path, tasks: int) -> ExperimentConfig:
    training = dict(content["training"])
    if "steps" in training:
        training["steps"] = training["steps"][:tasks]
    changes = {"output": str(output), "tokenizer": {"path": str(tokenizer)}, "training": training}
    return parse_config({**content, **changes, "tasks": content["tasks"][:tasks]})


class Runs:
    """A run of three tasks from the start, and one that has learned the first two of them."""

    def __init__(self, kind: str, folder: Path, tokenizer: Path) -> None:
        self.kind, self.whole, self.two = kind, folder / "whole", folder / "two"
        content = {"pairs": PAIRS, "text": TEXT, "decayed": DECAYED}[kind]
        sequence.run(config(content, self.whole, tokenizer, 3))
        sequence.run(config(content, self.two, tokenizer, 2))

    def extend(self, folder: Path) -> Results:
        return extend(folder, ADDED[self.kind], LENGTH[self.kind]).results


@pytest.fixture(scope="module")
def das(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Runs:
    return Runs("text", tmp_path_factory.mktemp("das"), tokenizer)


def content_of(folder: Path) -> dict[str, Any]:
    """What a finished run holds that does not depend on the clock or its place."""
    results = Results.read(RunFolder(folder).results).model_dump()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    params, state = stored(folder)
    kept = ("tasks", "metric", "matrix", "initial", "op", "bwt", "fwt", "gain", "further", "finished", "steps", "data")
    return {
        "results": {name: results[name] for name in kept},
        "rows": [{key: value for key, value in row.items() if "second" not in key} for row in rows],
        "params": params,
        "state": state,
        "config": {k: v for k, v in yaml.safe_load((folder / "config.yaml").read_text()).items() if k != "output"},
    }


def check_equal(folder: Path, whole: Path) -> None:
    left, right = content_of(folder), content_of(whole)
    jax.tree.map(np.testing.assert_array_equal, left.pop("params"), right.pop("params"))
    jax.tree.map(np.testing.assert_array_equal, left.pop("state"), right.pop("state"))
    assert left == right
    name = "importance/after02.npz"
    with np.load(folder / name) as tables, np.load(whole / name) as expected:
        assert tables.files == expected.files
        for table in tables.files:
            np.testing.assert_array_equal(tables[table], expected[table])


@pytest.mark.slow
def test_seekr_learns_one_more_task_as_if_it_had_been_there_from_the_start(tmp_path: Path, tokenizer: Path) -> None:
    runs = Runs("pairs", tmp_path, tokenizer)
    results = runs.extend(runs.two)
    assert results.finished
    assert len(results.matrix) == 3
    check_equal(runs.two, runs.whole)


def test_das_learns_one_more_domain_as_if_it_had_been_there_from_the_start(das: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "moved"  # the folder alone: it may lie elsewhere by now
    shutil.copytree(das.two, folder)
    das.extend(folder)
    check_equal(folder, das.whole)
    # Nothing is left to do: neither the same call nor the folder's own configuration changes anything.
    before = (folder / "results.json").read_bytes()
    das.extend(folder)
    sequence.run(validate(ExperimentConfig, read_yaml(folder / "config.yaml"), "config"))
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.slow
def test_one_more_domain_goes_on_from_before_the_decay(tmp_path: Path, tokenizer: Path) -> None:
    runs = Runs("decayed", tmp_path, tokenizer)
    with killed_at_save(2):
        runs.extend(runs.two)
    runs.extend(runs.two)
    check_equal(runs.two, runs.whole)


@pytest.mark.slow
@pytest.mark.parametrize("save", [1, 2])
def test_an_interrupted_extension_goes_on(das: Runs, tmp_path: Path, save: int) -> None:
    """Killed before the new task's first step, and within it."""
    folder = tmp_path / "run"
    shutil.copytree(das.two, folder)
    with killed_at_save(save, before=True):
        das.extend(folder)
    assert "numpy" in (folder / "config.yaml").read_text()
    das.extend(folder)
    check_equal(folder, das.whole)


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        (["name=topics", "source=stdlib:python_topics"], 4, "'topics' appears twice"),
        (["name=new", "source=stdlib:unicode_bid"], 4, "unicode_bidi"),
        (["name=new", "source=stdlib:docstrings:numpy"], None, "training.steps lists one number per task"),
        (["name=new", "source=stdlib:docstrings:numpy", "metric=end_task"], 4, "task new: its metric is end_task"),
        (["source=stdlib:docstrings:numpy"], 4, "tasks.2.name: missing"),
        (["name=pydantic", "source=stdlib:docstrings:numpy"], 3, "'pydantic' appears twice"),
    ],
)
def test_a_task_that_cannot_be_learned_leaves_the_folder_as_it_was(
    das: Runs, task: list[str], length: float | None, message: str
) -> None:
    def found() -> dict[Path, bytes]:  # the lock says who took it last
        return {path: path.read_bytes() for path in das.two.rglob("*") if path.is_file() and path.name != ".lock"}

    before = found()
    with pytest.raises(UserError) as caught:
        extend(das.two, task, length)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert found() == before


def test_only_finished_runs_go_on(das: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(das.two, folder)
    results = Results.read(folder / "results.json")
    results.model_copy(update={"finished": False}).write(folder / "results.json")
    with pytest.raises(UserError, match="the run is not finished"):
        das.extend(folder)
    with pytest.raises(UserError, match="not a run folder"):
        extend(tmp_path / "nowhere", ["name=x", "source=y"])


def jsonl_task(folder: Path, word: str, kind: str) -> dict[str, str]:
    folder.mkdir()
    for split, count in (("train", 24), ("test", 8)):
        passages = [f"the {word} number {number} of {split}" for number in range(count)]
        rows = [{"text": one} if kind == "text" else {"prompt": one, "answer": word} for one in passages]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"name": word, "source": f"jsonl:{folder}"}


def words(task: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in task.items()]


def without_data(tmp_path: Path, tokenizer: Path, kind: str, **changes: Any) -> tuple[Path, list[str], Results]:
    """A run of two tasks whose data is gone, a third task, and the run's results."""
    content = {**{"text": TEXT, "pairs": PAIRS}[kind], **changes}
    content["tasks"] = [jsonl_task(tmp_path / word, word, kind) for word in ("language", "reference")]
    results = sequence.run(config(content, tmp_path / "run", tokenizer, 2)).results
    for word in ("language", "reference"):
        shutil.rmtree(tmp_path / word)
    return tmp_path / "run", words(jsonl_task(tmp_path / "letter", "letter", kind)), results


@pytest.mark.slow
def test_das_goes_on_from_the_run_folder_alone(tmp_path: Path, tokenizer: Path) -> None:
    folder, task, earlier = without_data(tmp_path, tokenizer, "text")
    with pytest.raises(UserError, match="language"):
        extend(folder, task, 4)
    results = extend(folder, task, 4, data_gone=True).results
    assert results.finished
    assert results.matrix[:2] == [[*row[:2], None] for row in earlier.matrix]
    assert results.matrix[2][:2] == [None, None]
    assert results.matrix[2][2] > 1
    assert (results.op, results.bwt, results.forgetting) == (None, None, None)
    stored = read_yaml(folder / "config.yaml")["tasks"]
    assert [(one["data_gone"], one["kind"]) for one in stored] == [(True, "text"), (True, "text"), (False, None)]
    # The same call has nothing to do, and the folder goes on once more.
    written = (folder / "results.json").read_bytes()
    extend(folder, task, 4, data_gone=True)
    assert (folder / "results.json").read_bytes() == written
    again = extend(folder, words(jsonl_task(tmp_path / "upper", "upper", "text")), 4).results
    assert again.matrix[3][:2] == [None, None]
    assert None not in again.matrix[3][2:]
    assert "upper" in write_report(folder).read_text()
    with pytest.raises(UserError, match=r"task language: its examples are needed \(tasks.0.data_gone is true\)"):
        measure_importance(str(folder), [], tmp_path / "importance")


@pytest.mark.slow
def test_models_that_stay_as_they_are_keep_their_scores(tmp_path: Path, tokenizer: Path) -> None:
    folder, task, earlier = without_data(tmp_path, tokenizer, "pairs", method="one")
    results = extend(folder, task, data_gone=True).results
    assert results.matrix[2][:2] == earlier.matrix[1]
    assert results.op is not None
    assert read_yaml(folder / "config.yaml")["tasks"][0]["kind"] == "pairs"


@pytest.mark.slow
def test_seekr_learns_the_same_whether_earlier_data_is_there(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes of batches, given by the longest answers of all tasks, are the same too."""
    monkeypatch.setenv("JAXCL_DATA_CACHE", str(tmp_path / "cache"))
    data = {**PAIRS["data"], "bucket_lengths": "auto", "buckets": 2}
    content = {**PAIRS, "data": data, "method": {**SEEKR, "replay": {"budget": 9, "choose": "balanced"}}}
    content["tasks"] = [jsonl_task(tmp_path / word, word, "pairs") for word in ("language", "reference")]
    sequence.run(config(content, tmp_path / "there", tokenizer, 2))
    shutil.copytree(tmp_path / "there", tmp_path / "gone")
    task = words(jsonl_task(tmp_path / "letter", "letter", "pairs"))
    extend(tmp_path / "there", task)
    for word in ("language", "reference"):
        shutil.rmtree(tmp_path / word)
    shutil.rmtree(tmp_path / "cache")
    extend(tmp_path / "gone", task, data_gone=True)
    left, right = content_of(tmp_path / "gone"), content_of(tmp_path / "there")
    jax.tree.map(np.testing.assert_array_equal, left["params"], right["params"])
    jax.tree.map(np.testing.assert_array_equal, left["state"], right["state"])
    assert left["rows"] == right["rows"]
    assert any(row["kind"] == "memory" and row["task"] == 2 for row in left["rows"])
    assert left["results"]["data"] == right["results"]["data"]
    assert left["results"]["matrix"][2][:2] == [None, None]
    assert left["results"]["matrix"][2][2] == right["results"]["matrix"][2][2]
    for name in ("memory.json", "memory/task00_after02.arrow", "memory/task02.jsonl"):
        assert (tmp_path / "gone" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_joint_training_needs_the_data(tmp_path: Path, tokenizer: Path) -> None:
    content = {**PAIRS, "method": "joint"}
    content["tasks"] = [{**PAIRS["tasks"][0], "data_gone": True, "kind": "pairs"}, PAIRS["tasks"][1]]
    with pytest.raises(UserError, match="task direction: data_gone is true, but joint learns all tasks together"):
        sequence.run(config(content, tmp_path / "run", tokenizer, 2))


@pytest.mark.slow
def test_das_learns_the_same_whether_earlier_data_is_there(das: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(das.two, folder)
    extend(folder, ADDED["text"], LENGTH["text"], data_gone=True)
    left, right = content_of(folder), content_of(das.whole)
    jax.tree.map(np.testing.assert_array_equal, left["params"], right["params"])
    jax.tree.map(np.testing.assert_array_equal, left["state"], right["state"])
