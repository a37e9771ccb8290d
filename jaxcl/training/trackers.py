"""Experiment trackers of other makers: Weights & Biases and MLflow, imported only when a run names them."""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxcl.data.files import write_json
from jaxcl.errors import UserError

Row = Mapping[str, Any]

_ENTRIES = {"wandb": "init", "mlflow": "MlflowClient"}
"""Names of trackers, and what their packages must have: both also leave folders of their names behind."""

_LAST_SECONDS = 60.0
"""How long the end of a run waits for rows that a tracker has not taken yet."""


class Tracker(Protocol):
    """A run of an experiment tracker; any of its methods may raise whatever the tracker raises."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by name, at a step of the run."""
        ...

    def close(self, finished: bool) -> None:
        """Ends the tracker's run; `finished` is whether the training reached its end."""
        ...


def check_tracker(name: str) -> None:
    """Whether a tracker's package is there.

    Args:
      name: `wandb` or `mlflow`.

    Raises:
      UserError: it is not, or it cannot be imported; names the command that installs it.
    """
    try:
        reason = "" if hasattr(importlib.import_module(name), _ENTRIES[name]) else "not installed"
    except ImportError as error:
        reason = "not installed" if error.name == name else f"cannot be imported ({error})"
    if reason:
        raise UserError(f"training.sinks: {name} is {reason}: pip install 'jaxcl[{name}]'", exit_code=2)


class WeightsAndBiases:
    """A run of Weights & Biases; `WANDB_MODE=offline` and its other variables hold.

    The curves' x axis is `train_step`: steps that are trained again after an interruption are logged again.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Starts the run, or goes on with that of the folder. Its files lie in `wandb/` of the run folder."""
        import wandb

        run_id = _stored_id(folder, "wandb") or uuid.uuid4().hex[:8]
        _store_id(folder, "wandb", run_id)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxcl"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=run_id,
            resume="allow",
            dir=str(folder),
        )
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.define_metric("*", step_metric="train_step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({**numbers, "train_step": step})

    def close(self, finished: bool) -> None:
        """See `Tracker`; a run that did not finish is shown as failed."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says; the configuration is logged as its parameters."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Starts the run, or goes on with that of the folder."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._param = Metric, Param
        self._client = MlflowClient()
        run_id = _stored_id(folder, "mlflow")
        if run_id is None or not self._go_on(run_id):
            run_id = self._start(folder, config)
        self._id = run_id

    def _go_on(self, run_id: str) -> bool:
        """Opens a run again; false where the tracking store does not have it (any more)."""
        try:
            self._client.update_run(run_id, status="RUNNING")
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _start(self, folder: Path, config: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxcl")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        title = os.environ.get("MLFLOW_RUN_NAME", folder.resolve().name)
        run_id = str(self._client.create_run(experiment, run_name=title).info.run_id)
        _store_id(folder, "mlflow", run_id)
        params = [self._param(key, value) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # the most that MLflow takes at once
            self._client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(1000 * time.time())
        # A task may have a name that MLflow does not allow.
        allowed = {re.sub(r"[^/\w.\- :]", "_", name): value for name, value in numbers.items()}
        metrics = [self._metric(name, value, now, step) for name, value in allowed.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, finished: bool) -> None:
        """See `Tracker`; a run that did not finish is shown as killed."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


class Tracked:
    """A sink that hands rows to a tracker in the background: neither its failure nor its slowness reaches the training.

    After the first failure there is one warning, and the tracker gets nothing more.
    """

    def __init__(self, name: str, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        """Starts the tracker's run.

        Args:
          name: `wandb` or `mlflow`.
          folder: the run folder; keeps the id of the tracker's run in `tracking.json`, so that a resumed run goes on
            with it.
          config: the run's configuration as plain values.
        """
        self._name = name
        self._failed = False
        self._rows: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._tracker: Tracker | None = None
        try:
            self._tracker = TRACKERS[name](Path(folder), config)
        except Exception as error:
            self._fail(error)
        self._thread = threading.Thread(target=self._work, name=f"jaxcl {name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queues the numbers of a row, each under `kind/name`."""
        kind = row.get("kind", "task")
        numbers = {
            f"{kind}/{key}": float(value)
            for key, value in row.items()
            if key not in ("step", "task") and isinstance(value, int | float)
        }
        self._rows.put((int(row["step"]), numbers))

    def close(self, *, finished: bool = True) -> None:
        """Waits until the tracker has taken all rows, a minute at the most, and ends its run."""
        self._rows.put(None)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self._fail(TimeoutError(f"has not taken all rows within {_LAST_SECONDS:.0f} s"))
        elif self._tracker is not None and not self._failed:
            try:
                self._tracker.close(finished)
            except Exception as error:
                self._fail(error)

    def _work(self) -> None:
        while (item := self._rows.get()) is not None:
            if self._tracker is not None and not self._failed:
                try:
                    self._tracker.log(*item)
                except Exception as error:
                    self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        print(f"{self._name}: {reason}; the run goes on without it", file=sys.stderr, flush=True)


def _stored_id(folder: Path, name: str) -> str | None:
    return _ids(folder).get(name)


def _store_id(folder: Path, name: str, run_id: str) -> None:
    write_json(folder / "tracking.json", {**_ids(folder), name: run_id})


def _ids(folder: Path) -> dict[str, str]:
    """Ids of the trackers' runs that belong to a run folder, by tracker."""
    try:
        found = json.loads((folder / "tracking.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, str)} if isinstance(found, dict) else {}


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of a configuration, as text.

    >>> dict(_flat({"seed": 0, "tasks": [{"name": "a"}]}))
    {'seed': '0', 'tasks.0.name': 'a'}
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _flat(value, f"{prefix}.{index}")
    else:
        yield prefix, str(tree)
