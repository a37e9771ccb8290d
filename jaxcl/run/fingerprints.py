"""Recognises what a run depends on outside its checkpoints: data, tokenizer, weights and memory.

Fingerprints are part of the note in every checkpoint, so that they are as old as the params they belong to. When the
run is resumed or extended, or its memory is read, they are compared before anything is computed.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.config import ExperimentConfig
from jaxcl.data.chat_templates import find_template
from jaxcl.data.fingerprint import RowsPrint, files_print, rows_print, texts_print
from jaxcl.data.memory import Memory
from jaxcl.data.sources import SPLITS, TaskData
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.run.components import Components
from jaxcl.run.note import known_prints, note_of
from jaxcl.sharding.processes import of_all_processes, on_first
from jaxcl.training.checkpoint import Saved

_REMEDY = "restore it, or start a new run in another output"
_DATA_REMEDY = "restore them, go on with them deliberately (--data-changed), or start a new run in another output"


def take_fingerprints(parts: Components, saved: Saved | None = None, *, data_changed: bool = False) -> dict[str, Any]:
    """The fingerprints of a run's data, tokenizer and weights, to be stored with its checkpoints.

    Args:
      parts: the parts of the run.
      saved: the checkpoint that the run goes on from; its fingerprints are kept for tasks whose data is gone.
      data_changed: go on with data that has changed, and say what did on the standard error stream.

    Raises:
      UserError: something has changed since the checkpoint was written, or is not the same for all processes; names
        task, split and file.
    """
    known = {} if saved is None else known_prints(saved)
    found = _fingerprints(parts)
    _check_processes(found)
    for line in _data_changes(parts, known, found):
        if not data_changed:
            raise UserError(f"{line}; {_DATA_REMEDY}")
        on_first(partial(print, f"{line}; goes on with them (--data-changed)", file=sys.stderr))
    _compare(parts, known, found)
    gone = {name for name in known.get("tasks", {}) if name not in found["tasks"] and name in parts.names}
    found["tasks"] |= {name: known["tasks"][name] for name in gone}
    if found["weights"] is None:
        found["weights"] = known.get("weights")
    return found


def check_same(parts: Components, saved: Saved, run: ExperimentConfig) -> None:
    """Compares what a command reads with what a run was trained with, before it measures anything.

    Args:
      parts: the parts of the command: those of the run, or with other tasks, whose data is not compared.
      saved: the run's checkpoint.
      run: the run's own configuration.

    Raises:
      UserError: something has changed; names task, split and file.
    """
    same = {task.name for task in run.tasks if task in parts.config.tasks}
    known = dict(known_prints(saved))
    for kind in ("tasks", "end_tasks"):
        known[kind] = {name: prints for name, prints in known.get(kind, {}).items() if name in same}
    found = _fingerprints(parts)
    for line in _data_changes(parts, known, found):
        raise UserError(f"{line}; restore them")
    _compare(parts, known, found)


def check_tokenizer(tokenizer: Tokenizer, saved: Saved, where: Path) -> None:
    """Compares the tokenizer in a run folder with the one that the run was trained with.

    Args:
      tokenizer: the one in the folder.
      saved: the run's checkpoint.
      where: the folder.

    Raises:
      UserError: they differ.
    """
    if tokenizer.fingerprint != note_of(saved).fingerprints.tokenizer:
        raise UserError(f"the tokenizer ({where}) is not the one that the run was started with; restore it")


def check_weights(config: ExperimentConfig, saved: Saved) -> None:
    """Compares the weights that a run's configuration names with those that it was started with.

    Args:
      config: the configuration.
      saved: the run's checkpoint.

    Raises:
      UserError: they differ; weights that are gone are not compared.
    """
    found, known = weights_print(config.weights), note_of(saved).fingerprints.weights
    if None not in (found, known) and found != known:
        raise UserError(f"the weights ({config.weights}) are not those that the run was started with; restore them")


def load_memory(path: Path, seed: int, saved: Saved | None) -> Memory:
    """The memory of a run as it was when a checkpoint was written; what later tasks changed is left out.

    Args:
      path: `memory.json` of the run.
      seed: seed of the run.
      saved: the checkpoint; `None`: the run has none, and remembers nothing.

    Raises:
      UserError: the file is missing, or not the one that the checkpoint belongs to.
    """
    known: Mapping[str, str] = {} if saved is None else note_of(saved).memory
    if not known:
        return Memory(seed=seed)
    if not path.is_file():
        raise UserError(f"{path} is missing: it says which examples the run remembers of {len(known)} tasks; {_REMEDY}")
    memory = Memory.load(path)
    memory = memory.of(set(map(int, known)))
    found = memory_prints(memory)
    for task, expected in known.items():
        if memory.seed != seed or found.get(task) != expected:
            what = f"seed {memory.seed}, not {seed}" if memory.seed != seed else f"other examples of task {task}"
            raise UserError(f"{path} has changed since the run wrote it: {what}; {_REMEDY}")
    return memory


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
        "chat": _chat_print(parts),
        "weights": weights_print(parts.config.weights),
    }


def _check_processes(found: Mapping[str, Any]) -> None:
    """Checks that all processes have the same fingerprints: each may read copies of its own."""
    named = {f"task {name}": one for name, one in found["tasks"].items()}
    named |= {f"end task of {name}": one for name, one in found["end_tasks"].items()}
    named |= {f"data.{name}": one for name, one in found["general"].items()}
    named |= {"the chat template": found["chat"]} if found["chat"] else {}
    named |= {"the tokenizer": found["tokenizer"], "the weights": found["weights"]}
    digests = [bytes.fromhex(texts_print([json.dumps(one, sort_keys=True)])) for one in named.values()]
    everywhere = of_all_processes(np.array([list(digest) for digest in digests], np.uint8))
    there = of_all_processes(np.array([one is not None for one in named.values()]))  # weights may be gone by now
    for (index, name), process in itertools.product(enumerate(named), range(1, len(everywhere))):
        differs = (everywhere[process, index] != everywhere[0, index]).any()
        if differs and there[process, index] and there[0, index]:
            raise UserError(f"{name}: process {process} reads something else than process 0; give all the same copy")


def _chat_print(parts: Components) -> str | None:
    """Fingerprint of the chat template, if there are conversations."""
    if not any(task.kind == "chat" for task in parts.tasks):
        return None
    template = find_template(parts.config.data.chat_template, parts.tokenizer)
    return texts_print([template, json.dumps(dict(parts.tokenizer.special_tokens), sort_keys=True)])


def _task_prints(task: TaskData) -> dict[str, RowsPrint]:
    prints = {split: getattr(task, split).fingerprint for split in SPLITS}
    return prints | ({"labels": rows_print([{"label": label} for label in task.labels])} if task.labels else {})


def weights_print(weights: str | None) -> str | None:
    """Fingerprint of pre-trained `weights`; `None` without weights, or if they are gone."""
    from jaxcl.weights import locate

    if weights is None:
        return None
    try:
        kind, place = locate(weights)
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


def _data_changes(parts: Components, known: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """A line per split of a task that has changed."""
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
                yield from _changes(f"{words}{task}", before, now, data[task])


def _compare(parts: Components, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Checks that tokenizer, chat template and weights have not changed."""
    if known and found["tokenizer"] != known["tokenizer"]:
        where = parts.config.tokenizer.path or parts.config.weights or "tokenizer/ of the run"
        raise UserError(f"the tokenizer ({where}) is not the one that the run was started with; {_REMEDY}")
    if None not in (known.get("chat"), found["chat"]) and known["chat"] != found["chat"]:
        raise UserError(f"the chat template is not the one that the run was started with; {_REMEDY}")
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
            yield f"{name}: the {what} in {where} have changed since the run read them: {change}"


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
