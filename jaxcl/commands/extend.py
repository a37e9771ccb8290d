"""`jaxcl extend`: one more task for a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.config import ExperimentConfig
from jaxcl.config.experiment import with_data_root
from jaxcl.config.file import ConfigError, apply_overrides, takes_text, validate
from jaxcl.data.spec import TaskSpec
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.methods import find_method
from jaxcl.run.folder import RunFolder
from jaxcl.run.sequence import Outcome, run


def extend(
    folder: Path,
    task: Sequence[str],
    length: float | None = None,
    *,
    data_gone: bool = False,
    data_changed: bool = False,
    trust: bool = False,
) -> Outcome:
    """Lets a finished run learn one more task; it is scored again on the data of the earlier tasks.

    The run continues from its last checkpoint, with the method's state. Its folder then contains a run over all tasks.
    After an interruption, the same call resumes it.

    Args:
      folder: the run folder.
      task: `KEY=VALUE`, the keys of the task's section in the configuration; `name` and `source` at least.
      length: the task's epochs or steps, in the run's unit; `None`: the number for every task, if the run has a single
        one.
      data_gone: the earlier tasks' data no longer exists: only the folder is needed, and the earlier tasks are not
        scored again.
      data_changed: go on even if the data is not that which the run began with; what changed is said.
      trust: whether the run's configuration may name code outside jaxcl; see `jaxcl.config.trust`.

    Returns:
      The results over all tasks, and the path of the report.

    Raises:
      UserError: the folder does not contain a finished run, or the task cannot be learned; the folder is unchanged.
    """
    opened = RunFolder.open(folder)
    stored, content = opened.config_file, with_data_root(opened.content(trust=trust))
    before = validate(ExperimentConfig, content, str(stored))
    if find_method(before.method.name).joint:
        raise UserError(f"{folder}: {before.method.name} learns all tasks at once; there is no next one to learn")
    added = apply_overrides({}, task, lambda path, _: takes_text(TaskSpec, path))
    names = [one.name for one in before.tasks]
    if names[-1] == added.get("name") and len(names) > 1:
        # Either the same call again, to be resumed or already finished, or another task with the same name.
        earlier = _without_last(content)
        if validate(ExperimentConfig, _with_task(earlier, added, length, stored), str(stored)) == before:
            return run(before, data_changed=data_changed)
    results = Results.read(opened.results)
    grown = _with_task(_without_data(content, results.kinds) if data_gone else content, added, length, stored)
    config = validate(ExperimentConfig, grown, str(stored))
    if not results.finished or results.tasks != names:
        raise UserError(f"{folder}: the run is not finished; finish it first: jaxcl run {stored}")
    return run(config, grown_from=before, data_changed=data_changed)


def _without_data(content: dict[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The configuration with `data_gone` for all tasks, and with their kinds, which data cannot show any more."""
    tasks = [{**one, "data_gone": True, "kind": one["kind"] or kinds.get(one["name"])} for one in content["tasks"]]
    return {**content, "tasks": tasks}


def _with_task(content: dict[str, Any], task: dict[str, Any], length: float | None, origin: Path) -> dict[str, Any]:
    """A configuration with one more task at the end."""
    training = dict(content["training"])
    unit = "steps" if training["steps"] is not None else "epochs"
    listed = isinstance(training[unit], list)
    if listed and length is None:
        raise ConfigError(
            f"{origin}: training.{unit} lists one number per task; give that of the new task with --length"
        )
    if length is not None:
        count = len(content["tasks"])
        known = training[unit] if listed else [1 if training[unit] is None else training[unit]] * count
        training[unit] = [*known, length]
    return {**content, "tasks": [*content["tasks"], task], "training": training}


def _without_last(content: dict[str, Any]) -> dict[str, Any]:
    """The configuration without its last task."""
    training = dict(content["training"])
    for unit in ("steps", "epochs"):
        if isinstance(training[unit], list):
            training[unit] = training[unit][:-1]
    return {**content, "tasks": content["tasks"][:-1], "training": training}
