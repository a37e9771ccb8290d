"""A run goes on only with the data, tokenizer, weights and files that it was started with."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxcl.commands.convert import convert
from jaxcl.commands.extend import extend
from jaxcl.commands.generate import generate_text
from jaxcl.commands.importance import measure_importance
from jaxcl.config import parse_config
from jaxcl.data.fingerprint import files_print, rows_print
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run import fingerprints, sequence
from jaxcl.run.folder import RunFolder
from jaxcl.run.sequence import TaskSequence
from jaxcl.run.streams import task_stream
from jaxcl.training.checkpoint import Checkpoints
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import DECODER, TEXT, TOKENIZER

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0, "raw": False}
REPLAY = {"name": "replay", "replay": {"fraction": 0.25}}
TINY: dict[str, Any] = {
    "model": {**DECODER, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1},
    "tokenizer": TOKENIZER,
    "data": {"prompt_length": 32, "answer_length": 8, "buckets": 1},
    "tasks": [{"name": name, "source": f"jsonl:data/{name}"} for name in ("one", "two", "three")],
    "training": {"batch_size": 8, "steps": [3, 2, 4], "log_every": 2, "checkpoint_every": 2, "keep": 2},
    "evaluation": {"batch_size": 8, "max_new_tokens": 8},
    "method": REPLAY,
}


def rows(task: str, count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{task} {number}:", "answer": str(number % 7)} for number in range(first, first + count)]


def write(path: Path, content: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def write_data(root: Path) -> Path:
    for task in ("one", "two", "three"):
        write(root / "data" / task / "train.jsonl", rows(task, 24))
        write(root / "data" / task / "test.jsonl", rows(task, 8, 100))
    return root


def run(root: Path, output: Path, *, flags: dict[str, bool] | None = None, **changes: Any) -> Results:
    config = parse_config({**TINY, "data_root": str(root), "output": str(output), **changes})
    return sequence.run(config, **flags or {}).results


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run that was killed in the evaluation after its second of three tasks.

    Checkpoints: before, 2 steps, after the first task, after the second task.
    """
    root = write_data(tmp_path_factory.mktemp("identity"))
    with killed_at_save(4):
        run(root, root / "run")
    return root


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before the first step."""
    monkeypatch.setattr(sequence, "train_task", lambda *_, **__: pytest.fail("trained"))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_a_stop_between_checkpoint_and_results_shifts_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the data may lie at another place by then."""
    assert Results.read(copy / "run/results.json").steps == {"one": 3}
    results = run(copy, copy / "run")
    assert results.finished
    assert results.steps == {"one": 3, "two": 2, "three": 4}
    assert list(results.data) == ["one", "two", "three"]
    assert [[score is None for score in row] for row in results.matrix] == [
        [False, True, True], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert capsys.readouterr().err.count("results.json") == 0
    # A finished run, told to be unfinished or finished too early, or asked for with other data.
    done = (copy / "run/results.json").read_text()
    edit_json(copy / "run/results.json", lambda content: content.update(finished=False, matrix=content["matrix"][:2]))
    assert run(copy, copy / "run").matrix == results.matrix
    assert json.loads(done)["matrix"] == results.matrix
    (copy / "run/results.json").unlink()
    assert run(copy, copy / "run").matrix == results.matrix
    assert "results.json is missing; scores up to the checkpoint are taken from there" in capsys.readouterr().err
    elsewhere = write_data(copy / "elsewhere")
    assert run(elsewhere, copy / "run").matrix == results.matrix
    write(elsewhere / "data/two/test.jsonl", rows("two", 8, 300))
    with pytest.raises(UserError, match=r"task two: the test rows in .*elsewhere/data/two/test.jsonl have changed"):
        run(elsewhere, copy / "run")
    # One task more, where the memory would refer to other examples now; the folder stays as it was.
    shuffle(copy / "data/one/train.jsonl")
    config = (copy / "run/config.yaml").read_text()
    monkeypatch.setenv("JAXCL_DATA", str(copy))
    with pytest.raises(
        UserError, match=r"task one: the train rows in .* have changed .*: the same 24 in another order"
    ):
        extend(copy / "run", ["name=four", "source=jsonl:data/three"], 2)
    assert (copy / "run/config.yaml").read_text() == config


@pytest.mark.slow
def test_finished_by_hand_ends_no_run(stopped: Path, copy: Path) -> None:
    edit_json(copy / "run/results.json", lambda content: content.update(finished=True))
    with pytest.raises(UserError, match="the run is not finished; finish it first"):
        extend(copy / "run", ["name=four", f"source=jsonl:{copy}/data/one"], 2)
    results = run(stopped, copy / "run")
    assert len(results.matrix) == 3
    assert results.matrix[2][2] is not None


def shuffle(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("one/train", shuffle, "the same 24 in another order"),
    ("one/train", lambda path: replace(path, '"3"', '"4"'), "24 as before, some of them edited"),
    ("two/train", lambda path: write(path, rows("two", 20)), "24 before, 20 now, removed"),
    ("two/test", lambda path: write(path, rows("two", 9, 100)), "8 before, 9 now, appended"),
    ("three/train", lambda path: write(path, rows("three", 25, 1)), "24 before, 25 now, added"),
]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("name", "change", "words"), CHANGES)
def test_changed_rows_are_one_line_before_training(
    copy: Path, name: str, change: Callable[[Path], Any], words: str
) -> None:
    path = copy / "data" / f"{name}.jsonl"
    change(path)
    task, split = name.split("/")
    with pytest.raises(UserError) as caught:
        run(copy, copy / "run")
    start = f"task {task}: the {split} rows in {path} have changed since the run read them: {words}; "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_changed_data_is_gone_on_with_deliberately(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(copy / "data/two/train.jsonl", rows("two", 20))
    write(copy / "data/three/train.jsonl", rows("three", 40))
    with pytest.raises(UserError, match=r"removed; restore them, go on with them deliberately \(--data-changed\), or "):
        run(copy, copy / "run")
    results = run(copy, copy / "run", flags={"data_changed": True})
    said = capsys.readouterr().err
    assert "task two: the train rows in" in said
    assert "24 before, 20 now, removed; goes on with them (--data-changed)" in said
    assert "24 before, 40 now" in said
    assert results.finished
    assert results.data["three"]["task"]["examples"] == 40
    with Checkpoints.reading(copy / "run/checkpoints") as checkpoints:
        noted = checkpoints.notes()[-1].progress["fingerprints"]["tasks"]
    assert {name: one["train"]["rows"] for name, one in noted.items()} == {"one": 24, "two": 20, "three": 40}
    assert run(copy, copy / "run").matrix == results.matrix


MEASURED = ["method={name: das, general_knowledge: false, importance_examples: 8}"]


@pytest.mark.usefixtures("untrained")
def test_an_edited_tokenizer_is_refused(copy: Path) -> None:
    folder, where = str(copy / "run"), copy / "run/tokenizer"
    generate_text(folder, "one 3:", **GREEDY)

    def swap(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(where / "tokenizer.json", swap)
    for use in (
        lambda: run(copy, copy / "run"),
        lambda: generate_text(folder, "one 3:", **GREEDY),
        lambda: convert(folder, copy / "converted", "hf", "float32"),
        lambda: measure_importance(folder, MEASURED, copy / "measured"),
    ):
        with pytest.raises(
            UserError, match=r"the tokenizer .*tokenizer.* is not the one that the run was started with"
        ):
            use()
    assert not (copy / "converted").exists()


@pytest.mark.slow
def test_importance_is_measured_on_the_rows_of_the_run_or_on_others_by_name(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = str(copy / "run"), copy / "measured"
    monkeypatch.setenv("JAXCL_DATA", str(copy))
    shuffle(copy / "data/two/train.jsonl")
    with pytest.raises(UserError, match=r"task two: the train rows in .*two/train.jsonl have changed"):
        measure_importance(folder, MEASURED, out)
    assert not out.exists()
    measure_importance(folder, [*MEASURED, "tasks.1.source=jsonl:data/three"], out)
    assert (out / "importance.npz").is_file()


def _twice(content: Any) -> None:
    examples = content["tasks"][0]["examples"]
    examples[1] = examples[0]


def _another(content: Any) -> None:
    kept = content["tasks"][0]["examples"]
    kept[0] = next(number for number in range(24) if number not in kept)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "memory.json is missing"),
        (_twice, "examples must be different numbers from 0 to 23"),
        (lambda content: content["tasks"][0]["examples"].append(999), "examples must be different numbers"),
        (_another, "has changed since the run wrote it: other examples of task 0"),
        (lambda content: content.update(seed=5), "has changed since the run wrote it: seed 5, not 0"),
        (lambda content: content["tasks"][1].update(task=7), "other examples of task 1"),
        (lambda content: content["tasks"].pop(0), "other examples of task 0"),
    ],
)
def test_an_edited_memory_is_refused(copy: Path, change: Callable[[Any], Any] | None, message: str) -> None:
    if change is None:
        (copy / "run/memory.json").unlink()
    else:
        edit_json(copy / "run/memory.json", change)
    with pytest.raises(UserError, match=message):
        run(copy, copy / "run")


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", ["task00.arrow", "task01.jsonl"])
def test_remembered_examples_that_were_edited_or_removed_are_named(copy: Path, name: str) -> None:
    path = copy / "run/memory" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} has changed since the run wrote it"):
        run(copy, copy / "run")
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        run(copy, copy / "run")


def test_a_flipped_bit_costs_a_checkpoint_not_the_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((copy / "run/checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    file = max(
        (path for path in (newest / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(bytes(content))
    results = run(copy, copy / "run")
    assert f"{file} is damaged" in capsys.readouterr().err
    assert results.steps == {"one": 3, "two": 2, "three": 4}
    logged = [json.loads(line) for line in (copy / "run/metrics.jsonl").read_text().splitlines()]
    assert [sum(row["steps"] for row in logged if row["task"] == task) for task in range(3)] == [3, 2, 4]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, r"task one: no dev rows in .*one/train.jsonl, but evaluation.split is dev; it has: test"),
        (
            {"max_new_tokens": 2},
            r"task long: evaluation.max_new_tokens is 2, but 4 of 4 test answers are longer and can never be right by "
            r"exact_match; (\d+) is needed",
        ),
        ({"pairs_metric": "exact_match", "limit": 0}, "limit"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_data(tmp_path)
    write(tmp_path / "data/long/train.jsonl", rows("long", 8))
    long = [{"prompt": str(number), "answer": "xylophone quartz"} for number in range(4)]
    write(tmp_path / "data/long/test.jsonl", long)
    tasks = [*TINY["tasks"][:1], {"name": "long", "source": "jsonl:data/long"}]
    training = {**TINY["training"], "steps": 1}
    evaluation = {**TINY["evaluation"], **changes}
    with pytest.raises(UserError, match=message):
        run(tmp_path, tmp_path / "run", tasks=tasks, training=training, evaluation=evaluation)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("metric", "said"), [("rouge_l", True), ("choice_accuracy", False)])
def test_answers_that_score_in_part_are_a_line(
    tmp_path: Path, metric: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    long = [{"prompt": str(number), "answer": "A) xylophone quartz"} for number in range(4)]
    write(tmp_path / "data/one/test.jsonl", [*long, *({"prompt": str(number), "answer": "B"} for number in range(2))])
    tasks = [{**TINY["tasks"][0], "metric": metric}]
    evaluation = {**TINY["evaluation"], "max_new_tokens": 2}
    with pytest.raises(pytest.fail.Exception, match="trained"):
        run(tmp_path, tmp_path / "run", tasks=tasks, training={"batch_size": 8, "steps": 1}, evaluation=evaluation)
    line = "task one: evaluation.max_new_tokens is 2, but 4 of 6 test answers are longer; rouge_l scores"
    assert (line in capsys.readouterr().err) == said


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("metric", ["token_accuracy", "perplexity"])
def test_metrics_without_a_mean_are_a_line(tmp_path: Path, metric: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = TEXT["tasks"]
    tasks = [{**first, "metric": metric}, {**second, "metric": "perplexity"}]
    with pytest.raises(pytest.fail.Exception, match="trained"):
        sequence.run(parse_config({**TEXT, "tasks": tasks, "output": str(tmp_path), "method": "sequential"}))
    line = "no mean score of all tasks (OP): a lower one is better for pydantic, a higher one for the others"
    assert (line in capsys.readouterr().err) == (metric == "token_accuracy")


@pytest.mark.usefixtures("untrained")
def test_an_end_task_without_the_split_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "data/domain.txt"
    path.parent.mkdir()
    path.write_text("".join(f"line {number} of the domain\n" for number in range(60)))
    for split in ("train", "test"):
        write(tmp_path / f"data/end/{split}.jsonl", [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(8)])
    end = {"source": "jsonl:data/end"}
    tasks = [{"name": "domain", "source": "text:data/domain.txt", "end_task": end}]
    changes: dict[str, Any] = {
        "tasks": tasks,
        "data": {"length": 32},
        "training": {"batch_size": 8, "steps": 1},
        "method": "sequential",
    }
    words = r"end task of domain: no dev rows in .*end/train.jsonl, but evaluation.split is dev; it has: test"
    with pytest.raises(UserError, match=words):
        run(
            tmp_path,
            tmp_path / "run",
            **changes,
            evaluation={"batch_size": 8, "split": "dev", "end_task": {"length": 32}},
        )


@pytest.mark.usefixtures("untrained")
def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    monkeypatch.setattr(fingerprints, "weights_print", lambda weights: "those of the first start")
    with killed_at_save(1):
        run(tmp_path, tmp_path / "run")
    monkeypatch.setattr(fingerprints, "weights_print", lambda weights: "others")
    with pytest.raises(UserError, match=r"the weights .* are not those that the run was started with"):
        run(tmp_path, tmp_path / "run")


def test_fingerprints_of_rows_and_files(tmp_path: Path) -> None:
    whole = rows_print(rows("a", 5))
    assert whole["rows"] == 5
    assert rows_print([{"x": "ab", "y": "c"}]) != rows_print([{"x": "a", "y": "bc"}])
    assert rows_print([{"x": "a"}, {"x": "a"}])["content"] != rows_print([])["content"]
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(bytes(range(256)) * 600)
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("first", "second"))
    assert files_print([one]) == files_print([two])
    two.write_bytes(one.read_bytes()[:-1] + b"x")
    assert files_print([one]) != files_print([two])


def test_a_run_is_finished_only_when_its_model_is_on_disk() -> None:
    done: list[object] = []
    run_of_no_task = SimpleNamespace(
        parts=SimpleNamespace(phases=0),
        config=SimpleNamespace(evaluation=SimpleNamespace(dev=False)),
        checkpoints=SimpleNamespace(wait=lambda: done.append("on disk")),
        board=SimpleNamespace(write=lambda timing, finished: done.append(finished), results="results"),
        stopwatch=SimpleNamespace(seconds={}),
        _evaluate=lambda state, after: None,
        _forget_unneeded=lambda: None,
    )
    assert TaskSequence._continue(run_of_no_task, None, None, None) == "results"  # type: ignore[arg-type]
    assert done == ["on disk", True]


@pytest.mark.parametrize(("size", "refused"), [(10, True), (0, False), (None, False)])
def test_stored_signals_that_are_gone_are_named(size: int | None, refused: bool) -> None:
    parts: Any = SimpleNamespace(
        method=SimpleNamespace(joint=False, replay=SimpleNamespace(mode="mix")),
        config=SimpleNamespace(data=SimpleNamespace(general=None)),
        training_pipeline=lambda index: None,
    )
    kept: Any = SimpleNamespace(
        memory=SimpleNamespace(tasks=[SimpleNamespace(task=0, kept=(1,), name="one")]), task=lambda index: None
    )
    folder = RunFolder(Path("run"))
    message = "run/teacher: what is stored with the remembered rows of task one is missing"
    with pytest.raises(UserError if refused else AttributeError, match=message if refused else None):
        task_stream(parts, folder, kept, 1, stored=bool(size))


def test_what_a_killed_process_was_writing_is_removed_when_the_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim({"seed": 0})
    folder.release()
    folder.examples.mkdir()
    folder.tokenizer.mkdir()
    places = [folder.examples / "task00.arrow", folder.predictions / "a.jsonl", folder.tokenizer / "tokenizer.json"]
    places += [folder.results, folder.memory, folder.metrics, folder.config_file]
    gone = [place.with_name(f".{place.name}.{'0a' * 16}.tmp") for place in places]
    gone.append(tmp_path / f".report.html.{'0b' * 16}.tmp")
    # Another program may be writing a report at this moment.
    kept = [folder.examples / "task00.arrow", tmp_path / f".report.html.{'0a' * 16}.tmp"]
    for path in (*gone, *kept):
        path.touch()
    os.utime(gone[-1], (0, 0))
    folder.claim({"seed": 0})
    folder.release()
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in kept)


def test_what_a_start_without_a_configuration_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    left = tmp_path / f".config.yaml.{'0a' * 16}.tmp"
    left.touch()
    folder.claim({"seed": 0})
    folder.release()
    assert folder.is_run
    assert not left.exists()


def test_unfinished_stores_of_a_killed_attempt_are_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.teacher.mkdir()
    gone = [folder.store(2, 0), folder.store(2, 5), folder.teacher / ".task02_process000.array_record.0a.tmp"]
    kept = [folder.store(1, 0), folder.teacher / ".task01_process000.array_record.0a.tmp"]
    for path in (*gone, *kept):
        path.touch()
    TaskSequence._remove_stores(SimpleNamespace(folder=folder), 2)  # type: ignore[arg-type]
    assert sorted(folder.teacher.iterdir()) == sorted(kept)
