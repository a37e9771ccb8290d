"""Whether a run has come to its end: what its results say, and its checkpoints confirm."""

from __future__ import annotations

from jaxcl.config import ExperimentConfig
from jaxcl.evaluation.results import Results
from jaxcl.methods.registry import find_method
from jaxcl.run.folder import RunFolder
from jaxcl.run.note import note_of
from jaxcl.training.checkpoint import Checkpoints


def finished_results(folder: RunFolder, config: ExperimentConfig) -> Results | None:
    """The results of a run that has come to its end; `None`: it has not.

    `finished` in `results.json` alone proves nothing, since anybody can edit it: there must be a row of scores for
    every task, and the newest checkpoint must be that after the last one, unless all were removed since. All processes
    must call this.

    Args:
      folder: the run folder.
      config: the run's configuration.

    Raises:
      UserError: the results or the newest checkpoint's note cannot be read.
    """
    if not folder.results.is_file():
        return None
    results = Results.read(folder.results)
    last = 0 if find_method(config.method.name).joint else len(config.tasks) - 1
    whole = results.tasks == [task.name for task in config.tasks] and len(results.matrix) == last + 1
    return results if results.finished and whole and _at_the_end(folder, last) else None


def _at_the_end(folder: RunFolder, last: int) -> bool:
    if not folder.checkpoints.is_dir():
        return True
    with Checkpoints.reading(folder.checkpoints) as checkpoints:
        notes = checkpoints.notes()
    if not notes:
        return True
    note = note_of(notes[-1])
    return (note.task, note.phase) == (last, "learned")


__all__ = ["finished_results"]
