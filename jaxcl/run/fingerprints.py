"""Recognises what a run depends on outside its checkpoints: data, tokenizer, weights and memory.

Fingerprints are part of the note in every checkpoint, so that they are as old as the params they belong to. When the
run is resumed or extended, or its memory is read, they are compared before anything is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcl.data.fingerprint import RowsPrint, files_print, rows_print, texts_print
from jaxcl.data.memory import Memory
from jaxcl.data.sources import SPLITS, TaskData
from jaxcl.errors import UserError
from jaxcl.run.components import Components
from jaxcl.sharding.processes import on_first
from jaxcl.training.checkpoint import Saved

_REMEDY = "restore it, or start a new run in another output"


def take_fingerprints(parts: Components, saved: Saved | None = None) -> dict[str, Any]:
    """The fingerprints of a run's data, tokenizer and weights, to be stored with its checkpoints.

    Args:
      parts: the parts of the run.
      saved: the checkpoint that the run goes on from; its fingerprints are kept for tasks whose data is gone.

    Raises:
      UserError: something has changed since the checkpoint was written; names task, split and file.
    """
    known = {} if saved is None else saved.progress["fingerprints"]
    found = _fingerprints(parts)
    if jax.process_count() == 1:
        _compare(parts, known, found)
    else:
        on_first(lambda: _compare(parts, known, found))
        _compare(parts, known, found)  # another process may read its own copy of the data
    gone = {name for name in known.get("tasks", {}) if name not in found["tasks"] and name in parts.names}
    found["tasks"] |= {name: known["tasks"][name] for name in gone}
    if found["weights"] is None:
        found["weights"] = known.get("weights")
    return found


def load_memory(path: Path, seed: int, saved: Saved | None) -> Memory:
    """The memory of a run as it was when a checkpoint was written; tasks learned later are left out.

    Args:
      path: `memory.json` of the run.
      seed: seed of the run.
      saved: the checkpoint; `None`: the run has none, and remembers nothing.

    Raises:
      UserError: the file is missing, or not the one that the checkpoint belongs to.
    """
    known: Mapping[str, str] = {} if saved is None else saved.progress["memory"]
    if not known:
        return Memory(seed=seed)
    if not path.is_file():
        raise UserError(f"{path} is missing: it says which examples the run remembers of {len(known)} tasks; {_REMEDY}")
    memory = Memory.load(path)
    found = memory_prints(memory)
    for task, expected in known.items():
        if memory.seed != seed or found.get(task) != expected:
            what = f"seed {memory.seed}, not {seed}" if memory.seed != seed else f"other examples of task {task}"
            raise UserError(f"{path} has changed since the run wrote it: {what}; {_REMEDY}")
    return memory.model_copy(update={"tasks": tuple(one for one in memory.tasks if str(one.task) in known)})


def memory_prints(memory: Memory) -> dict[str, str]:
    """A hash of what is remembered of each task, by its number."""
    return {str(one.task): texts_print([one.model_dump_json()]) for one in memory.tasks}


def _fingerprints(parts: Components) -> dict[str, Any]:
    specs = parts.config.tasks
    tasks = {task.name: _task_prints(task) for task, spec in zip(parts.tasks, specs, strict=True) if not spec.data_gone}
    end_tasks = {specs[index].name: _task_prints(task) for index, task in parts.end_tasks.items()}
    return {
        "tasks": tasks,
        "end_tasks": end_tasks,
        "general": {} if parts.general is None else {"general": _task_prints(parts.general)},
        "tokenizer": parts.tokenizer.fingerprint,
        "weights": _weights(parts),
    }


def _task_prints(task: TaskData) -> dict[str, RowsPrint]:
    prints = {split: getattr(task, split).fingerprint for split in SPLITS}
    return prints | ({"labels": rows_print([{"label": label} for label in task.labels])} if task.labels else {})


def _weights(parts: Components) -> str | None:
    """Fingerprint of the pre-trained weights; `None` without weights, or if they are gone."""
    from jaxcl.weights import locate

    if parts.config.weights is None:
        return None
    try:
        kind, place = locate(parts.config.weights)
    except UserError:
        return None
    if place.is_file():
        files = [place]
    else:
        files = [path for path in place.glob("**/*" if kind == "orbax" else "*.safetensors") if path.is_file()]
    try:
        return files_print(files)
    except OSError as error:
        raise UserError(f"weights {place}: cannot be read: {error.strerror or error}") from None


def _compare(parts: Components, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    tasks = {task.name: task for task in parts.tasks}
    ends = {parts.config.tasks[index].name: task for index, task in parts.end_tasks.items()}
    general = {} if parts.general is None else {"general": parts.general}
    for words, name, data in (
        ("task ", "tasks", tasks),
        ("end task of ", "end_tasks", ends),
        ("data.", "general", general),
    ):
        for task, before in known.get(name, {}).items():
            if (now := found[name].get(task)) is not None:
                for line in _changes(f"{words}{task}", before, now, data[task]):
                    raise UserError(line)
    if known and found["tokenizer"] != known["tokenizer"]:
        where = parts.config.tokenizer.path or parts.config.weights or "tokenizer/ of the run"
        raise UserError(f"the tokenizer ({where}) is not the one that the run was started with; {_REMEDY}")
    if None not in (known.get("weights"), found["weights"]) and known["weights"] != found["weights"]:
        raise UserError(f"the weights ({parts.config.weights}) are not those that the run was started with; {_REMEDY}")


def _changes(name: str, before: Mapping[str, RowsPrint], now: Mapping[str, RowsPrint], data: TaskData) -> Iterator[str]:
    for split in sorted(before.keys() | now.keys(), key=[*SPLITS, "labels"].index):
        old, new = before.get(split), now.get(split)
        if old is None or new is None or old["ordered"] != new["ordered"]:
            rows = [{"label": label} for label in data.labels] if split == "labels" else getattr(data, split)
            where = data.where.get(split, data.where.get("train", "its source"))
            what = "classes" if split == "labels" else f"{split} rows"
            change = _change(old or rows_print([]), new or rows_print([]), rows)
            yield f"{name}: the {what} in {where} have changed since the run read them: {change}; {_REMEDY}"


def _change(old: RowsPrint, new: RowsPrint, rows: Any) -> str:
    """What happened to rows, as far as fingerprints show it."""
    if old["content"] == new["content"]:
        return f"the same {new['rows']} in another order"
    if old["rows"] == new["rows"]:
        return f"{new['rows']} as before, some of them edited"
    counts = f"{old['rows']} before, {new['rows']} now"
    appended = (
        old["rows"] < new["rows"] and rows_print(itertools.islice(rows, old["rows"]))["ordered"] == old["ordered"]
    )
    return f"{counts}, appended" if appended else f"{counts}, {'added' if old['rows'] < new['rows'] else 'removed'}"
