"""`results.json`: the typed results of a run, written atomically."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from jaxcl.data.files import replacing
from jaxcl.errors import UserError
from jaxcl.functional.matrix import ContinualMatrix
from jaxcl.schema import Schema

Row = list[float | None]


class Measure(Schema):
    """A matrix of scores and the numbers derived from it; `None`: not measured, or not defined."""

    model_config = ConfigDict(allow_inf_nan=True)  # a perplexity may overflow

    metric: list[str] = Field(description="name of each task's metric")
    higher_is_better: list[bool] = Field(description="direction of each task's metric")
    matrix: list[Row] = Field(description="matrix[t][i] is the score on task i after task t")
    initial: Row | None = Field(None, description="scores before any training")
    deviation: list[Row] | None = Field(
        None, description="standard deviation over repetitions of each score in matrix; none: measured once"
    )
    initial_deviation: Row | None = Field(
        None, description="standard deviation over repetitions of the scores before any training"
    )
    op: float | None = Field(None, description="overall performance: mean of the last row over the learned tasks")
    bwt: float | None = Field(
        None, description="backward transfer: mean change of the earlier tasks since each was learned"
    )
    fwt: float | None = Field(None, description="forward transfer: gain on a task before it was trained on")
    forgetting: float | None = Field(None, description="mean drop of the earlier tasks from their best score")
    forgetting_rate: float | None = Field(None, description="mean drop of the earlier tasks since each was learned")
    gain: float | None = Field(None, description="mean gain at the end over the model before any training")
    intransigence: float | None = Field(None, description="mean gap to a joint model right after learning")


class Attempt(Schema):
    """A start of a run, which is started again after every interruption."""

    step: int = Field(description="step of the run that it began after")
    changed: dict[str, str | None] = Field(
        {}, description="versions that are not those of the attempt before; none: not installed any more"
    )


class Results(Measure):
    """The content of `results.json`."""

    method: str = Field(description="name of the method")
    seed: int = Field(description="seed of the run")
    tasks: list[str] = Field(description="names of the tasks, in the order learned")
    kinds: dict[str, str] = Field({}, description="kind of each task's rows, given or inferred: text, pairs, ...")
    joint: bool = Field(False, description="all tasks were learned at once: the matrix has one row")
    finished: bool = Field(False, description="whether the last task was learned and evaluated")
    dev: Row | None = Field(None, description="scores on dev rows at the end; none: not measured")
    further: dict[str, Measure] = Field({}, description="other measures of the same tasks, by name")
    seconds: float = Field(description="wall-clock seconds of the whole run, without pauses between restarts")
    timing: dict[str, float] = Field(
        {},
        description="seconds by part, over all attempts: training (steps that count), compiling, lost (steps made "
        "again), recovery, startup, data, setup, method, evaluation, checkpoints",
    )
    task_seconds: list[float] = Field([], description="wall-clock seconds of each task")
    steps: dict[str, int] = Field({}, description="optimizer steps by task")
    skipped: dict[str, int] = Field({}, description="by task: steps that changed nothing: loss or gradient not finite")
    spikes: dict[str, list[int]] = Field({}, description="by task: its steps whose loss was a spike, from 1")
    rewinds: dict[str, int] = Field({}, description="by task: how often it went back to a checkpoint")
    parameters: int | None = Field(None, description="number of parameters of the model")
    stored_bytes: int | None = Field(None, description="bytes kept of earlier tasks: memory and teacher store")
    peak_memory_bytes: int | None = Field(None, description="peak memory in use on a device, if the device reports it")
    device: str | None = Field(None, description="number and kind of devices")
    data: dict[str, dict[str, Any]] = Field({}, description="by task: examples, tokens, cut examples, fill rate")
    versions: dict[str, str] = Field(description="versions of Python and packages that the run began with")
    attempts: list[Attempt] = Field([], description="the starts of the run that led to these results, in order")
    extra: dict[str, Any] = Field({}, description="other results of a method or experiment")

    def continual_matrix(self) -> ContinualMatrix:
        """The matrix, to be continued by a resumed run."""
        return ContinualMatrix.from_lists(self.matrix, self.initial, self.higher_is_better, joint=self.joint)

    @property
    def latest_versions(self) -> dict[str, str]:
        """The versions of the last attempt."""
        found: dict[str, str | None] = dict(self.versions)
        for attempt in self.attempts:
            found |= attempt.changed
        return {name: version for name, version in found.items() if version is not None}

    def check_matrices(self) -> None:
        """Checks the shapes of all matrices.

        Raises:
          ValueError: one does not fit the number of tasks.
        """
        for part in (self, *self.further.values()):
            for rows, initial in ((part.matrix, part.initial), (part.deviation or [], part.initial_deviation)):
                ContinualMatrix.from_lists(rows, initial, part.higher_is_better, joint=self.joint)

    def plain(self) -> dict[str, Any]:
        """The content of the file as plain values."""
        content: dict[str, Any] = _plain(self.model_dump())
        return content

    def write(self, path: Path) -> None:
        """Writes JSON atomically."""
        write_json(path, self.model_dump())

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads a file that `write` wrote.

        Raises:
          UserError: the file is missing, not JSON, or not a jaxcl result; names file and field.
        """
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
            found.check_matrices()
            return found
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a UTF-8 text file") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path}: not a jaxcl result: {where + ': ' if where else ''}{first['msg']}") from None
        except ValueError as error:
            raise UserError(f"{path}: not a jaxcl result: matrix: {error}") from None


def measure(
    matrix: ContinualMatrix,
    metric: list[str],
    reference: list[float] | None = None,
    deviation: ContinualMatrix | None = None,
) -> dict[str, Any]:
    """The fields of a `Measure` from its matrix, to pass on as `Measure(**...)` or `Results(..., **...)`.

    Args:
      matrix: the scores.
      metric: name of each task's metric.
      reference: scores of a joint model, for intransigence.
      deviation: standard deviations of the scores over repetitions, if measured.
    """
    spread = deviation if deviation is not None and (deviation.rows() or deviation.initial_row()) else None
    return {
        "metric": metric,
        "higher_is_better": list(matrix.higher_is_better),
        "matrix": matrix.rows(),
        "initial": matrix.initial_row(),
        "deviation": spread.rows() if spread else None,
        "initial_deviation": spread.initial_row() if spread else None,
        "op": _number(matrix.overall_performance()),
        "bwt": _number(matrix.backward_transfer()),
        "fwt": _number(matrix.forward_transfer()),
        "forgetting": _number(matrix.forgetting()),
        "forgetting_rate": _number(matrix.forgetting_rate()),
        "gain": _number(matrix.gain()),
        "intransigence": None if reference is None else _number(matrix.intransigence(reference)),
    }


def installed_versions() -> dict[str, str]:
    """Installed versions of Python, jaxcl and the packages that affect numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "tokenizers")
    versions = {"python": platform.python_version()}
    for name in ("jaxcl", *names):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "jaxcl" not in versions:  # run from a checkout that is not installed
        from jaxcl import __version__

        versions["jaxcl"] = __version__
    return versions


def predictions_file(folder: Path, after: int, task_index: int) -> Path:
    """The file of one task's predictions; see `write_predictions`."""
    return folder / f"{_stage(after)}_task{task_index:02d}.jsonl"


def write_predictions(folder: Path, after: int, task_index: int, task: str, rows: list[dict[str, Any]]) -> Path:
    """Writes one task's predictions as JSON lines, each with `after` and `task` in addition to its own fields.

    Args:
      folder: `predictions/` of the run folder.
      after: index of the task learned last, -1 before any training.
      task_index: index of the task scored.
      task: its name.
      rows: one per example, as in `Scored.rows`.

    Returns:
      The file; its name contains only the indices, since a task can have any name.
    """
    path = predictions_file(folder, after, task_index)
    lines = (json.dumps({"after": after, "task": task, **row}, ensure_ascii=False) for row in rows)
    _replace(path, "".join(f"{line}\n" for line in lines))
    return path


def write_tables(folder: Path, after: int, tables: Mapping[str, Any]) -> Path:
    """Writes a method's arrays (`Method.tables`) after a task as `.npz`.

    Args:
      folder: `importance/` of the run folder.
      after: index of the task learned last, -1 before any training.
      tables: arrays by name.

    Returns:
      The file.
    """
    path = folder / f"{_stage(after)}.npz"
    write_arrays(path, tables)
    return path


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name as `.npz`, atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON, atomically.

    Args:
      path: the file.
      content: mappings, sequences, strings, numbers, numpy scalars and arrays; numbers that are not finite become null,
        because JSON cannot represent them.
    """
    _replace(path, json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        # A lone surrogate (from a pair that a byte-level tokenizer split) cannot be encoded in UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _stage(after: int) -> str:
    return "before" if after < 0 else f"after{after:02d}"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
