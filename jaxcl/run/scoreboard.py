"""The scores of a run so far, and `results.json`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcl.data.images.thumbnails import write_thumbnails
from jaxcl.evaluation.results import Attempt, Measure, Results, installed_versions, measure, write_predictions
from jaxcl.functional.matrix import ContinualMatrix
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components
from jaxcl.run.evaluator import Evaluation, Evaluator, Score, higher_is_better, scored_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.training.watch import Watch


class Scoreboard:
    """Fills the matrices of a run and writes `results.json`.

    Results of a run with fewer tasks are extended: the columns of the new tasks are empty.

    Attributes:
      results: all results so far.
    """

    def __init__(self, parts: Components, folder: RunFolder, noted: Results | None = None) -> None:
        """Reads the results so far.

        Args:
          parts: the parts of the run.
          folder: its folder.
          noted: the results as noted in the checkpoint that the run resumes from. They replace those in `results.json`
            if that is missing or says otherwise, and complete it: it may be older than the checkpoint.
        """
        self.parts = parts
        self.folder = folder
        self.evaluator = Evaluator(parts)
        self.main = jax.process_index() == 0
        self.results = self._so_far(noted)

    def missing(self, after: int) -> list[int]:
        """Indices of the tasks that are due after task `after` (-1: before any training) and have no score yet."""
        measures = [self.results, *self.results.further.values()]
        due = scored_tasks(self.parts, after)
        return [index for index in due if not any(_has(one, after, index) for one in measures)]

    def evaluate(
        self, params_for: Callable[[int], Params], after: int, scored: Callable[[], None] = lambda: None
    ) -> None:
        """Scores the tasks that are due after a task and have no score yet.

        Args:
          params_for: returns the params for a task, by its index.
          after: index of the task learned last; -1 before any training.
          scored: called after each task, so that what is scored can be written and need not be scored again.
        """
        missing = self.missing(after)
        if missing and self.parts.method.individual and after > 0:
            self._carry(after)
        for index in missing:
            with self.evaluator.loops.phase(f"score {after} {index}"):
                evaluation = self.evaluator.score(params_for(index), index, after)
                self._record(after, index, evaluation)
                if self.main and evaluation.rows:
                    name = self.parts.tasks[index].name
                    write_predictions(self.folder.predictions, after, index, name, evaluation.rows)
                if self.main and evaluation.images:
                    write_thumbnails(self.folder.thumbnails / f"task{index:02d}.npz", evaluation.images)
                scored()  # after its predictions, which are not written again
                self.evaluator.loops.forget()

    def evaluate_dev(self, params_for: Callable[[int], Params], scored: Callable[[], None] = lambda: None) -> None:
        """Scores the dev rows of all tasks whose data is not gone and that have no such score yet.

        Args:
          params_for: see `evaluate`; of the model that has learned all tasks.
          scored: see `evaluate`.
        """
        for index in range(len(self.results.dev or []), len(self.parts.tasks)):
            with self.evaluator.loops.phase(f"dev {index}"):
                gone = self.parts.config.tasks[index].data_gone
                score = None if gone else self.evaluator.score_dev(params_for(index), index)
                self._update(dev=[*(self.results.dev or []), score])
                scored()
                self.evaluator.loops.forget()

    def note_attempt(self, step: int) -> None:
        """Records that the run begins, or goes on after a step; process 0 prints which versions have changed since.

        Args:
          step: the step of the run.
        """
        before, now = self.results.latest_versions, installed_versions()
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        self._update(
            attempts=[*self.results.attempts, Attempt(step=step, changed={name: now.get(name) for name in names})]
        )
        if names and self.main:
            changes = (f"{name} {now.get(name, 'gone')} (before: {before.get(name, 'none')})" for name in names)
            print(f"the run goes on with other versions: {', '.join(changes)}; numbers may differ", file=sys.stderr)

    def row(self, after: int) -> dict[str, float]:
        """The scores after a task (-1: before any training) by the tasks' names, and what they amount to so far."""
        rows = [self.results.initial or []] if after < 0 else self.results.matrix[after : after + 1]
        scores = {name: score for row in rows for name, score in zip(self.results.tasks, row, strict=False)}
        whole = {} if after < 0 else {name: getattr(self.results, name) for name in ("op", "bwt", "fwt", "forgetting")}
        return {name: value for name, value in {**whole, **scores}.items() if value is not None}

    def note_task(self, index: int, *, steps: int, described: dict[str, Any], watch: Watch) -> None:
        """Records the optimizer steps of a task, the counts of its data, and what was watched in its training."""
        name = self.parts.phase_name(index)
        stored = sum(path.stat().st_size for path in self.folder.teacher.glob("*.array_record"))
        self._update(
            steps={**self.results.steps, name: steps},
            data={**self.results.data, name: described},
            skipped={**self.results.skipped, name: watch.skipped},
            spikes={**self.results.spikes, name: list(watch.spikes)},
            rewinds={**self.results.rewinds, name: len(watch.left)},
            stored_bytes=stored,
        )

    def note_privacy(self, index: int, spent: Mapping[str, float]) -> None:
        """Records what training on a task reveals about an example; see `jaxcl.training.privacy.spent`."""
        before = self.results.extra.get("privacy", {})
        task = self.parts.phase_name(index)
        privacy = {name: {**before.get(name, {}), task: round(value, 4)} for name, value in spent.items()}
        self._update(extra={**self.results.extra, "privacy": privacy})

    def note_extra(self, name: str, values: Mapping[str, Any]) -> None:
        """Records other results under a name."""
        self._update(extra={**self.results.extra, name: dict(values)})

    def write(self, timing: Mapping[str, float], *, finished: bool = False) -> None:
        """Writes `results.json` with the seconds so far, by part."""
        rounded = {name: round(seconds, 3) for name, seconds in timing.items()}
        self._update(timing=rounded, seconds=round(sum(rounded.values()), 3), finished=finished)
        if self.main:
            self.results.write(self.folder.results)

    def _carry(self, after: int) -> None:
        """Copies the scores of earlier tasks to the row of task `after`: their models have not changed."""

        def carried(measured: Measure) -> dict[str, Any]:
            matrix, deviation = (one.up_to(after).carry() for one in self._matrices(measured))
            return measure(matrix, measured.metric, deviation=deviation if measured.deviation else None)

        further = {name: Measure(**carried(part)) for name, part in self.results.further.items()}
        self._update(**carried(self.results), further=further)

    def _record(self, after: int, index: int, evaluation: Evaluation) -> None:
        own = {} if evaluation.score is None else self._with_score(self.results, after, index, evaluation.score)
        further = dict(self.results.further)
        for name, score in evaluation.further.items():
            before = further.get(name) or self._empty(self.evaluator.further_metrics(name))
            further[name] = Measure(**self._with_score(before, after, index, score))
        self._update(**own, further=further)

    def _with_score(self, before: Measure, after: int, index: int, score: Score) -> dict[str, Any]:
        """The fields of a measure with one more score."""
        matrix, deviation = self._matrices(before)
        matrix = matrix.up_to(after).record(after, index, score.value)
        if score.deviation is not None:
            deviation = deviation.up_to(after).record(after, index, score.deviation)
        return measure(matrix, before.metric, deviation=deviation)

    def _matrices(self, measured: Measure) -> tuple[ContinualMatrix, ContinualMatrix]:
        """The scores of a measure and their standard deviations."""
        higher, joint = measured.higher_is_better, self.parts.method.joint
        return (
            ContinualMatrix.from_lists(measured.matrix, measured.initial, higher, joint=joint),
            ContinualMatrix.from_lists(measured.deviation or [], measured.initial_deviation, higher, joint=joint),
        )

    def _update(self, **changes: Any) -> None:
        self.results = self.results.model_copy(update=changes)

    def _empty(self, metrics: list[str]) -> Measure:
        matrix = ContinualMatrix.empty(len(metrics), higher_is_better(metrics), joint=self.parts.method.joint)
        return Measure(**measure(matrix, metrics))

    def _blank(self) -> Results:
        return Results(
            **dict(self._empty(self.evaluator.metrics)),
            method=self.parts.config.method.name,
            seed=self.parts.config.seed,
            tasks=self.parts.names,
            kinds=self._kinds(),
            joint=self.parts.method.joint,
            seconds=0.0,
            parameters=self.parts.network.num_params,
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            versions=installed_versions(),
        )

    def _kinds(self) -> dict[str, str]:
        return {task.name: task.kind for task in self.parts.tasks}

    def _so_far(self, noted: Results | None) -> Results:
        """The results in the folder and in the checkpoint, extended to tasks that were added since."""
        path = self.folder.results
        found = Results.read(path) if path.is_file() else None
        if noted is None:
            return self._blank() if found is None else self._grown(found)
        scored = bool(noted.matrix) or noted.initial is not None
        if found is None or not _agrees(noted, found):
            if scored and self.main:
                what = "is missing" if found is None else "says otherwise than the checkpoint"
                print(f"{path} {what}; scores up to the checkpoint are taken from there", file=sys.stderr)
            return self._grown(noted)
        # Written before the checkpoint or after it: of what belongs to tasks, the checkpoint knows as much or more.
        of_tasks = ("steps", "data", "skipped", "spikes", "rewinds", "extra", "stored_bytes")
        known = {name: getattr(noted, name) for name in (*of_tasks, "seed", "method")}
        known["attempts"] = max(noted.attempts, found.attempts, key=len)
        return self._grown(found.model_copy(update={**known, "finished": False}))

    def _grown(self, stored: Results) -> Results:
        """Results extended to tasks that were added since."""
        if stored.tasks == self.parts.names:
            return stored
        further = {
            name: Measure(**self._extended(part, self.evaluator.further_metrics(name)))
            for name, part in stored.further.items()
        }
        own = self._extended(stored, self.evaluator.metrics)
        changes = {
            **own,
            "tasks": self.parts.names,
            "kinds": self._kinds(),
            "further": further,
            "dev": None,
            "finished": False,
        }
        return stored.model_copy(update=changes)

    def _extended(self, before: Measure, metrics: list[str]) -> dict[str, Any]:
        """The fields of a measure of the first tasks, extended to all tasks."""
        extended = before.model_copy(update={"higher_is_better": higher_is_better(metrics)})
        matrix, deviation = self._matrices(extended)
        return measure(matrix, metrics, deviation=deviation)


def _agrees(noted: Results, found: Results) -> bool:
    """Whether results have all scores that were noted earlier."""
    if found.tasks[: len(noted.tasks)] != noted.tasks:
        return False
    pairs: list[tuple[Measure, Measure | None]] = [(noted, found)]
    pairs += [(part, found.further.get(name)) for name, part in noted.further.items()]
    fields = ("matrix", "initial", "deviation", "initial_deviation")
    return all(
        other is not None and _contains(getattr(one, field), getattr(other, field))
        for one, other in pairs
        for field in fields
    )


def _contains(noted: Any, found: Any) -> bool:
    """Whether nested lists have every number of others in its place."""
    if noted is None:
        return True
    if not isinstance(noted, list):
        return bool(noted == found)
    longer = isinstance(found, list) and len(found) >= len(noted)
    return longer and all(map(_contains, noted, found))


def _has(measured: Measure, after: int, index: int) -> bool:
    rows = [measured.initial or []] if after < 0 else measured.matrix[after : after + 1]
    return any(row[index : index + 1] not in ([], [None]) for row in rows)
