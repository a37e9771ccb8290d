"""What runs remember: each way to choose by its definition, from files of the run folder, exact after a stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.data.choosing import equal_shares, priorities
from jaxcl.data.memory import Memory, draw_examples
from jaxcl.data.pipeline import Pipeline
from jaxcl.data.plan import Shape
from jaxcl.data.rows import EncodedRows, Noise, RowFields
from jaxcl.errors import UserError
from jaxcl.models.batch import Batch
from jaxcl.run import sequence
from jaxcl.run.components import Components, build
from jaxcl.run.folder import RunFolder
from jaxcl.run.remembering import load_kept, memory_pipeline
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.kept import mark_after
from tests.tiny.batches import assert_same_batch
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import DECODER, ENCODER, TOKENIZER

COUNTS = (24, 6, 40)
TINY: dict[str, Any] = {
    "model": {**DECODER, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1},
    "tokenizer": TOKENIZER,
    "data": {"prompt_length": 32, "answer_length": 8, "buckets": 2},
    "training": {"batch_size": 8, "steps": [3, 3, 3], "log_every": 1, "checkpoint_every": 2, "keep_tasks": None},
    "optimizer": {"learning_rate": 1e-2},
    "evaluation": {"batch_size": 8, "max_new_tokens": 8},
}
TEXT: dict[str, Any] = {
    **TINY,
    "model": {**ENCODER, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1},
    "data": {"length": 48, "packing": False},
    "evaluation": {"batch_size": 8},
}


def write_data(root: Path, kind: str = "pairs") -> None:
    for name, count in zip(("one", "two", "three"), COUNTS, strict=True):
        for split, rows in (("train", count), ("test", 4)):
            path = root / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{name} of the {split} row {number} " + "again " * (number % 4) for number in range(rows)]
            # Of three answers, the first one is the rarest.
            answers = ["no" if number % 8 == 0 else "yes" if number % 2 else "perhaps so" for number in range(rows)]
            made = [
                {"text": text} if kind == "text" else {"prompt": text, "answer": answer}
                for text, answer in zip(texts, answers, strict=True)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in made))


def config(root: Path, output: Path, replay: dict[str, Any], base: dict[str, Any] = TINY, **changes: Any) -> Any:
    tasks = [{"name": name, "source": f"jsonl:{root / name}"} for name in ("one", "two", "three")]
    content = {**base, "tasks": tasks, "output": str(output), "method": {"name": "derpp", "replay": replay}, **changes}
    return parse_config(content)


def run(root: Path, output: Path, replay: dict[str, Any], base: dict[str, Any] = TINY, **changes: Any) -> Components:
    made = config(root, output, replay, base, **changes)
    sequence.run(made)
    return build(made, RunFolder(output))


def memory_of(output: Path) -> Memory:
    return Memory.load(output / "memory.json")


def answers_of(parts: Components, task: int) -> list[str]:
    return [row["answer"] for row in parts.tasks[task].train]


class Subset(EncodedRows):
    """Some of a task's rows, read from the whole task."""

    def __init__(self, rows: EncodedRows, numbers: Sequence[int]) -> None:
        self.rows, self.numbers = rows, numbers
        self.group, self.name, self.task = rows.group, rows.name, rows.task

    @property
    def sizes(self) -> Any:
        return self.rows.sizes[list(self.numbers)]

    def smallest(self, shapes: Sequence[Shape]) -> Any:
        return self.rows.smallest(shapes)[list(self.numbers)]

    def number(self, index: int) -> int:
        return self.numbers[index]

    def shapes(self, others: Any) -> list[Shape]:
        return self.rows.shapes([other.rows for other in others])

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        return self.rows.row(self.numbers[index] if index >= 0 else -1, shape, noise)

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("kind", "base"), [("pairs", TINY), pytest.param("text", TEXT, marks=pytest.mark.slow)])
def test_batches_from_the_run_folder_are_those_of_the_whole_tasks(
    tmp_path: Path, kind: str, base: dict[str, Any]
) -> None:
    write_data(tmp_path, kind)
    parts = run(tmp_path, tmp_path / "run", {"fraction": 0.3}, base)
    memory = memory_of(tmp_path / "run")
    for task, count in enumerate(COUNTS):
        assert list(memory.tasks[task].kept) == draw_examples(count, 0.3, 1, seed=0, task=task)
    with Checkpoints.reading(tmp_path / "run/checkpoints") as checkpoints:
        kept = load_kept(RunFolder(tmp_path / "run"), 0, checkpoints.latest())
    found = memory_pipeline(parts, kept, [0, 2])
    whole = [Subset(parts.train_rows(task), memory.tasks[task].kept) for task in (0, 2)]
    expected = Pipeline(whole, 8, parts.config.data, shapes=parts.shapes, origin="memory", fixed_noise=0)
    assert found.shapes == expected.shapes
    for step in range(2 * expected.steps_per_epoch):
        assert_same_batch(found.batch_at(step, seed=3), expected.batch_at(step, seed=3))
    for one, other in zip(found.once(), expected.once(), strict=True):
        assert_same_batch(one, other)
    # And they can be read.
    lines = [json.loads(line) for line in (tmp_path / "run/memory/task02.jsonl").read_text().splitlines()]
    assert [line.pop("example") for line in lines] == list(memory.tasks[2].kept)
    rows = parts.tasks[2].train.pick(memory.tasks[2].kept)
    if kind == "pairs":
        assert lines == rows
    else:
        shown = [line["passages"][0] for line in lines]
        assert all(row["text"].strip() in one for row, one in zip(rows, shown, strict=True))


def test_a_budget_is_divided_equally_over_tasks_and_answers(tmp_path: Path) -> None:
    write_data(tmp_path)
    parts = run(tmp_path, tmp_path / "run", {"budget": 20, "choose": "balanced"})
    memory = memory_of(tmp_path / "run")
    assert [[one.size for one in task.versions] for task in memory.tasks] == [[20, 14, 7], [6], [7]]
    assert sum(len(task.kept) for task in memory.tasks) == 20
    for task in (0, 2):
        answers = answers_of(parts, task)
        found = Counter(answers[number] for number in memory.tasks[task].kept)
        assert sorted(found.values()) == [2, 2, 3]
    # All checkpoints are kept here, and so are the examples that earlier ones need.
    assert memory.of({0, 1}).tasks[0].kept == tuple(sorted(memory.tasks[0].examples[:14]))
    files = {path.name for path in (tmp_path / "run/memory").iterdir()}
    assert {"task00.arrow", "task00_after01.jsonl", "task00_after02.arrow", "task01.arrow", "task02.jsonl"} <= files


def test_a_reservoir_keeps_the_smallest_priorities_of_all_tasks(tmp_path: Path) -> None:
    write_data(tmp_path)
    run(tmp_path, tmp_path / "run", {"budget": 20, "choose": "reservoir"}, seed=2)
    drawn = sorted(
        (priority, task, number)
        for task, count in enumerate(COUNTS)
        for number, priority in enumerate(priorities(count, seed=2, task=task))
    )
    kept = {(one.task, number) for one in memory_of(tmp_path / "run").tasks for number in one.kept}
    assert kept == {(task, number) for _, task, number in drawn[:20]}


@pytest.mark.slow
def test_a_budget_in_bytes_holds_what_fits(tmp_path: Path) -> None:
    write_data(tmp_path)
    parts = run(tmp_path, tmp_path / "run", {"budget": "1 kB"})
    sizes = {}
    for one in memory_of(tmp_path / "run").tasks:
        costs = parts.train_rows(one.task).table.costs
        sizes[one.task] = int(costs[list(one.kept)].sum())
        order = np.argsort(priorities(one.count, seed=0, task=one.task))
        assert set(one.kept) == set(order[: len(one.kept)].tolist())
    assert 800 < sum(sizes.values()) <= 1000
    shares = equal_shares(1000, [int(parts.train_rows(task).table.costs.sum()) for task in range(3)])
    assert all(size <= share for size, share in zip(sizes.values(), shares, strict=True))


def losses_of(parts: Components, params: Any, index: int) -> np.ndarray:
    """The mean loss of each example, one by one."""
    rows, found = parts.train_rows(index), []
    for number in range(len(rows)):
        tokens = np.concatenate([rows.prompt(number), rows.answer(number)])[None]  # type: ignore[union-attr]
        ones = np.ones_like(tokens)
        batch = Batch(tokens, ones, np.arange(tokens.shape[1])[None], None, tokens, ones, ones[:, 0], ones[:, 0])
        states = parts.network.hidden(params, batch).states
        scores = jax.nn.log_softmax(parts.network.logits(params, states), axis=-1)[0]
        start = len(rows.prompt(number))  # type: ignore[union-attr]
        places = np.arange(start, tokens.shape[1])
        found.append(-float(np.mean(np.asarray(scores)[places - 1, tokens[0, places]])))
    return np.array(found)


@pytest.mark.slow
def test_the_highest_losses_under_the_model_after_the_task_are_kept(tmp_path: Path) -> None:
    write_data(tmp_path)
    parts = run(tmp_path, tmp_path / "run", {"fraction": 0.25, "choose": "highest_loss"})
    memory = memory_of(tmp_path / "run")
    with Checkpoints.reading(tmp_path / "run/checkpoints") as checkpoints:
        for task in (0, 2):
            saved = checkpoints.find(mark_after(task))
            assert saved is not None
            losses = losses_of(parts, checkpoints.params(parts.trainer.target.params, saved), task)
            kept = list(memory.tasks[task].kept)
            assert len(kept) == COUNTS[task] // 4
            others = np.delete(losses, kept)
            assert losses[kept].min() >= others.max() - 1e-5
            assert losses[kept].mean() > others.mean() + 1e-3


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*(output / "memory").iterdir(), output / "memory.json"]}


@pytest.mark.slow
@pytest.mark.parametrize("choose", ["balanced", "highest_loss"])
def test_a_memory_that_is_cut_is_exact_after_interruptions(tmp_path: Path, choose: str) -> None:
    """Killed between what a task changes in the memory and its checkpoint, and after that."""
    write_data(tmp_path)
    replay = {"budget": 11, "choose": choose}
    run(tmp_path, tmp_path / "whole", replay, training={**TINY["training"], "keep_tasks": 1, "keep": 1})
    made = config(tmp_path, tmp_path / "parts", replay, training={**TINY["training"], "keep_tasks": 1, "keep": 1})
    for save, before in ((5, True), (1, False), (2, True)):
        with killed_at_save(save, before=before):
            sequence.run(made)
    sequence.run(made)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    files = {name for one in memory_of(tmp_path / "whole").tasks for name in one.versions[-1].files}
    assert content(tmp_path / "whole").keys() == files | {"memory.json"}
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("parts", "whole")
    ]
    assert rows[0] == rows[1]


def test_spaced_by_distance_equal_sums_of_the_learning_rate_lie_between_memory_batches(tmp_path: Path) -> None:
    write_data(tmp_path)
    training = {**TINY["training"], "steps": [2, 2, 20], "checkpoint_every": 0}
    optimizer = {"learning_rate": 1e-2, "schedule": "linear", "warmup": 0.2}
    run(
        tmp_path,
        tmp_path / "run",
        {"fraction": 0.5, "every": 3, "spacing": "distance"},
        training=training,
        optimizer=optimizer,
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["task"] == 2]
    rates = np.array([row["learning_rate"] for row in rows])
    assert len(rates) == 20
    places = [place for place, row in enumerate(rows) if row["kind"] == "memory"]
    assert len(places) == 5
    sums = np.diff(np.cumsum(rates)[places], prepend=0.0)
    np.testing.assert_allclose(sums, rates.sum() / 5, atol=rates.max())
    # By steps they would lie after 3, 7, 11 and so on: most of the way is in the first half of a falling rate.
    assert sum(place < 10 for place in places) == 3
    assert max(np.diff(places)) > 4


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ({"mode": "mix", "spacing": "distance"}, "replay.spacing: distance with replay.mode mix"),
        ({"budget": 0}, "at least one row"),
        ({"budget": "10 apples"}, "must be a number of rows, or bytes such as 500 kB"),
        ({"choose": "reservoir"}, r"replay.choose: reservoir needs replay.budget"),
        ({"source": "synthetic", "budget": 9}, r"replay.budget: written samples are chosen by likelihood"),
        ({"source": "synthetic", "choose": "balanced"}, r"replay.choose: written samples are chosen by likelihood"),
        ({"choose": "newest"}, "random.*highest_loss.*reservoir"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(tmp_path: Path, replay: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(tmp_path, tmp_path / "run", replay)
    assert "\n" not in str(caught.value)


def test_a_budget_that_holds_no_example_is_one_line(tmp_path: Path) -> None:
    write_data(tmp_path)
    with pytest.raises(UserError, match=r"method.replay.budget: 10 bytes are too few for one example of each task"):
        run(tmp_path, tmp_path / "run", {"budget": "0.01 kB"})
