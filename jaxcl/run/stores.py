"""Recognises the teacher stores that belong to a checkpoint, by the digest of what each holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from jaxcl.data.teacher_store import store_digest
from jaxcl.errors import UserError
from jaxcl.run.folder import RunFolder
from jaxcl.run.note import note_of
from jaxcl.sharding.processes import from_first, of_all_processes, on_first
from jaxcl.training.checkpoint import Saved

StorePrints = dict[str, dict[str, str]]
"""Digests by name of file, by number of the task."""

_DIGEST_BYTES = 32


def check_stores(folder: RunFolder, saved: Saved | None) -> StorePrints:
    """The stores that belong to a checkpoint, after they have been compared with its note.

    There may have been another number of processes, with a file each, so files are compared as they were written. All
    processes must call this.

    Args:
      folder: the run folder.
      saved: the checkpoint; `None`: no store belongs to the run.

    Returns:
      The digests; for a checkpoint from before they were noted, those of what is there.

    Raises:
      UserError: a store is missing, is another one, or does not belong to the run; names it.
    """
    if saved is None:
        return {}
    note = note_of(saved)
    if note.stores is None:
        return dict(json.loads(from_first(lambda: json.dumps(_found(folder, map(int, note.memory))))))
    known = note.stores
    on_first(lambda: _compare(folder, known))
    return known


def _found(folder: RunFolder, tasks: Iterable[int]) -> StorePrints:
    """The digests of the stores of some tasks that are there."""
    found = {str(task): {path.name: store_digest(path) for path in folder.stores(task)} for task in tasks}
    return {task: files for task, files in found.items() if files}


def _compare(folder: RunFolder, known: Mapping[str, Mapping[str, str]]) -> None:
    for task, files in known.items():
        found = {path.name: path for path in folder.stores(int(task))}
        for name in sorted(files.keys() | found.keys()):
            if name not in found:
                words = "is missing: it holds what is stored with remembered rows"
            elif name not in files:
                words = f"does not belong to the run, whose stores of task {task} are others"
            elif store_digest(found[name]) != files[name]:
                words = "is not the store that the run wrote"
            else:
                continue
            raise UserError(f"{folder.teacher / name} {words}; restore it, or start a new run in another output")


def written_stores(folder: RunFolder, task: int, *, written: bool) -> dict[str, str]:
    """The digests of the stores of a task that was just learned, one per process that has rows; all must call this.

    Args:
      folder: the run folder.
      task: number of the task.
      written: whether this process wrote one.
    """
    own = np.zeros(_DIGEST_BYTES, np.uint8)
    if written:
        own = np.frombuffer(bytes.fromhex(store_digest(folder.store(task, jax.process_index()))), np.uint8)
    digests = of_all_processes(own)
    return {folder.store(task, process).name: one.tobytes().hex() for process, one in enumerate(digests) if one.any()}
