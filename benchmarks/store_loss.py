"""How far SEEKR's compact store changes the output term of the replay loss, for stores of several sizes.

    python -m benchmarks.store_loss RUN [--stored 64,128,256,512] [--drawn 0,0.125] [--draws 5]

RUN is the folder of a finished run by `seekr`. The model after each task is read again for the task's samples, as
`jaxcl teacher` does, but under `method.store_logits` and `method.store_drawn` as given here; a later model of the run
(for the last task: the one that the run began with) is held against it. Prints one JSON object: by task, the term under
an exact store, and by setting the relative change of it in percent, mean and deviation over draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.recorded import over_seeds
from jaxcl.commands.teacher import KeptModels
from jaxcl.config import parse_config
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.methods.seekr import Seekr
from jaxcl.models.batch import Batch
from jaxcl.run.components import Components, build
from jaxcl.run.folder import RunFolder
from jaxcl.run.remembering import load_kept, memory_pipeline
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.feed import place_batch
from jaxcl.training.stored import Collate

Params = Any


class OutputTerm:
    """The mean output term of remembered rows, read from the teacher as the method's store would hold it."""

    def __init__(self, method: Seekr, parts: Components) -> None:
        self._read = parts.trainer.compile.per_row(method.read)
        self._loss = parts.trainer.compile(method.loss)

    def of(self, batches: list[Batch], teacher: Params, student: Params, state: Any, key: Any) -> float:
        """The term, with tokens drawn by `key`; `state` is any of the method's, which remembered rows do not read."""
        total = np.zeros(2)
        for batch in batches:
            assert batch.teacher is not None
            stored = self._read(teacher, batch, batch.teacher["heads"], batch.teacher["queries"], key)
            terms = self._loss(student, state, dataclasses.replace(batch, teacher=stored), key)
            total += [float(terms["logits"].sum), float(terms["logits"].count)]
        return float(total[0] / total[1])


def changes(folder: RunFolder, options: argparse.Namespace) -> dict[str, Any]:
    """The summary of all tasks."""
    parts = build(parse_config(folder.content()), folder)
    if not isinstance(parts.method, Seekr):
        raise SystemExit(f"{folder.path}: a run by {parts.config.method.name}, not by seekr")
    method, found = parts.method, {}
    variants = {}
    for count, share in itertools.product(map(int, options.stored.split(",")), map(float, options.drawn.split(","))):
        config = method.options.model_copy(update={"store_logits": count, "store_drawn": share})
        variants[f"{count}, {share:g} drawn"] = OutputTerm(
            type(method)(config, method.network, method.num_tasks), parts
        )
    collate = Collate(method, parts.trainer.target.params, parts.trainer.target.method_state)
    exact = OutputTerm(method.exact().method, parts)
    with Checkpoints.reading(folder.checkpoints) as checkpoints:
        models = KeptModels(parts, checkpoints)
        kept = load_kept(folder, parts.config.seed, checkpoints.latest())
        for task in kept.memory.tasks:
            stores = {task.task: TeacherStore.open(folder.stores(task.task), parts.about(task))}
            pipeline = memory_pipeline(parts, kept, [task.task], stores=stores, collate=collate)
            batches = [place_batch(rows, parts.layout.batch) for rows in pipeline.once()]
            teacher, (student, whose) = models.after(task.task), models.later(task.task)
            if teacher is None:
                raise SystemExit(f"{folder.path}: the model after {task.name} is not kept (training.keep_tasks)")
            state = parts.trainer.init_method(student)
            reference = exact.of(batches, teacher, student, state, jax.random.key(0))
            keys = jax.random.split(jax.random.key(1), options.draws)
            of_task: dict[str, Any] = {"student": whose, "exact": reference}
            for name, variant in variants.items():
                terms = [variant.of(batches, teacher, student, state, key) for key in keys]
                of_task[name] = over_seeds([100 * (term / reference - 1) for term in terms])
            found[task.name] = of_task
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stored", default="64,128,256,512", help="tokens stored of each position")
    parser.add_argument("--drawn", default="0,0.125", help="shares of them that are drawn from the rest")
    parser.add_argument("--draws", type=int, default=5, help="times that everything is drawn")
    options = parser.parse_args()
    print(json.dumps(changes(RunFolder(options.run), options), indent=1))


if __name__ == "__main__":
    main()
