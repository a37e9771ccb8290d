"""`jaxcl teacher`: bytes per sample of a run's teacher store, and how its compact form changes the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.config import parse_config
from jaxcl.data.memory import TaskMemory
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.errors import UserError
from jaxcl.methods.base import Method
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.fingerprints import check_same
from jaxcl.run.folder import RunFolder
from jaxcl.run.remembering import Kept, load_kept, memory_pipeline, remembered_rows
from jaxcl.run.stores import check_stores
from jaxcl.sharding.processes import initialize
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.feed import place_batch
from jaxcl.training.kept import mark_after
from jaxcl.training.stored import Collate

_ROWS = 8  # rows per batch; small, because the outputs of an exact store are large


class Size(NamedTuple):
    """Size of a task's stored samples, in bytes; means over the samples.

    Attributes:
      samples: number of samples.
      fields: size by field.
      disk: size in the compressed files.
      full: size of float32 attention maps of all heads and float32 logits at the scored positions, without padding.
      tokens: size of the remembered tokens.
    """

    samples: int
    fields: dict[str, float]
    disk: float
    full: float
    tokens: float


class Comparison(NamedTuple):
    """Mean of a term of the loss on remembered samples, with an exact store and with the run's store."""

    exact: float
    stored: float

    @property
    def change(self) -> float:
        """Relative change; 0 if both are 0."""
        return 0.0 if self.exact == self.stored else self.stored / self.exact - 1 if self.exact else float("inf")


class Loss(NamedTuple):
    """The effect of the store's compact form.

    Attributes:
      student: the model that is compared with the task's model.
      terms: the terms of the loss, by name.
    """

    student: str
    terms: dict[str, Comparison]


def describe_teacher(path: Path, *, trust: bool = False) -> str:
    """The report of `jaxcl teacher` on a run folder.

    Args:
      path: the run folder.
      trust: whether its configuration may name code outside jaxcl; see `jaxcl.config.trust`.

    Raises:
      UserError: it is not a run folder, or the run has stored nothing (yet).
    """
    initialize()
    folder = RunFolder.open(path)
    config = parse_config(folder.content(trust=trust), str(folder.config_file))
    if not folder.memory.is_file() or not folder.stores():
        raise UserError(f"{path}: nothing is stored with remembered samples; the method is {config.method.name}")
    parts = build(config, folder)
    lines = [f"{path}: {config.method.name}"]
    with Checkpoints.reading(folder.checkpoints) as checkpoints:
        saved = checkpoints.latest()
        if saved is not None:
            check_same(parts, saved, config)
            check_stores(folder, saved)
        kept = load_kept(folder, config.seed, saved)
        models = KeptModels(parts, checkpoints)
        for task in kept.memory.tasks:
            if task.kept and (paths := folder.stores(task.task)):
                store = TeacherStore.open(paths, parts.about(task))
                size = measure_size(parts, kept, task, store, sum(path.stat().st_size for path in paths))
                lines += ["", f"{task.name}: {size.samples} samples", *_size_lines(size)]
                lines += _loss_lines(models, kept, task, store)
    return "\n".join(lines)


def measure_size(parts: Components, kept: Kept, task: TaskMemory, store: TeacherStore, disk: int) -> Size:
    """Size of a task's stored samples; see `Size`.

    Args:
      parts: the parts of the run.
      kept: what the run remembers.
      task: the task's kept samples.
      store: their stored signals, and perhaps those of samples that are not kept any more.
      disk: bytes of the store's files.
    """
    network, rows = parts.network, remembered_rows(parts, kept, task)
    tokens, scored = np.asarray(rows.sizes, float).T
    if not scored.any():  # running text
        scored = tokens
    full = 4 * (network.num_layers * network.num_heads * np.mean(tokens**2) + network.vocab_size * np.mean(scored))
    records = [store.get(example) for example in task.kept]
    fields = {name: float(np.mean([record[name].nbytes for record in records])) for name in store.fields}
    return Size(len(records), fields, disk / len(store), float(full), kept.tables[task.task].bytes / len(records))


def measure_loss(
    parts: Components, kept: Kept, task: TaskMemory, store: TeacherStore, teacher: Params, student: Params
) -> dict[str, Comparison]:
    """The terms of the replay loss on a task's samples, with the store and with an exact store.

    The exact store has the same heads and queries, computed again with the task's model.

    Args:
      parts: the parts of a run whose method has a lossy store (`ToolHooks.exact`).
      kept: what the run remembers.
      task: the task's kept samples.
      store: their stored signals.
      teacher: params of the task's model.
      student: params compared with them.
    """
    method, compiler = parts.method, parts.trainer.compile
    exact = method.exact()
    assert exact is not None
    read = compiler.per_row(exact.read)
    sums_of = {name: compiler(_sums(one)) for name, one in (("stored", method), ("exact", exact.method))}
    state = parts.trainer.init_method(student)
    ways = parts.layout.batch_ways
    pipeline = memory_pipeline(
        parts,
        kept,
        [task.task],
        batch_size=ways * -(-min(_ROWS, parts.config.training.batch_size) // ways),
        stores={task.task: store},
        collate=Collate(method, parts.trainer.target.params, parts.trainer.target.method_state),
    )
    totals: dict[str, dict[str, np.ndarray]] = {name: {} for name in sums_of}
    for rows in pipeline.once(process_index=jax.process_index(), process_count=jax.process_count()):
        batch = place_batch(rows, parts.layout.batch)
        again = read(teacher, batch, jax.random.key(0))
        for name, batch_of in (("stored", batch), ("exact", dataclasses.replace(batch, teacher=again))):
            for term, pair in sums_of[name](student, state, batch_of, jax.random.key(0)).items():
                totals[name][term] = totals[name].get(term, 0) + np.asarray(pair, np.float64)
    means = {name: {term: float(a / max(b, 1.0)) for term, (a, b) in found.items()} for name, found in totals.items()}
    return {term: Comparison(value, means["stored"][term]) for term, value in means["exact"].items()}


def _sums(method: Method) -> Callable[..., dict[str, Any]]:
    """A function that returns sum and count of each term of the method's loss."""

    def sums(*args: Any) -> dict[str, Any]:
        return {name: (term.sum, term.count) for name, term in method.loss(*args).items()}

    return sums


class KeptModels:
    """The models of a run that are still available: those of kept checkpoints, and the initial one."""

    def __init__(self, parts: Components, checkpoints: Checkpoints) -> None:
        """Opens nothing yet.

        Args:
          parts: the parts of the run.
          checkpoints: its checkpoints.
        """
        self.parts = parts
        self._checkpoints = checkpoints

    def after(self, task: int) -> Params | None:
        """Params after a task; `None` if they were not kept."""
        saved = self._checkpoints.find(mark_after(task))
        return None if saved is None else self._checkpoints.params(self.parts.trainer.target.params, saved)

    def later(self, task: int) -> tuple[Params, str]:
        """Params that differ from those after a task, and their description: the latest, or else the initial ones."""
        latest = self._checkpoints.latest()
        if latest is None or latest.mark == mark_after(task):
            return initial_params(self.parts), "the run's initial model"
        return self._checkpoints.params(self.parts.trainer.target.params, latest), "the run's latest model"


def _size_lines(size: Size) -> Iterator[str]:
    fields = ", ".join(f"{name} {number:,.0f}" for name, number in size.fields.items())
    total = sum(size.fields.values())
    yield f"  bytes per sample: {total:,.0f} ({fields}); {size.disk:,.0f} in the compressed file"
    yield f"  its tokens in the memory: {size.tokens:,.0f} bytes"
    yield f"  full float32 maps and logits: {size.full:,.0f} bytes per sample, {size.full / total:,.1f} times as many"


def _loss_lines(models: KeptModels, kept: Kept, task: TaskMemory, store: TeacherStore) -> list[str]:
    parts = models.parts
    if parts.method.exact() is None:
        return [f"  loss of information: none; {parts.config.method.name} stores its signals unchanged"]
    teacher = models.after(task.task)
    if teacher is None:
        return ["  loss of information: not measured, the task's model was not kept (training.keep_tasks)"]
    student, words = models.later(task.task)
    terms = measure_loss(parts, kept, task, store, teacher, student)
    lines = [f"  loss of information, {words} compared with the task's:"]
    for name, term in terms.items():
        lines.append(f"    {name:<10} exact {term.exact:.6g}, as stored {term.stored:.6g}: {100 * term.change:+.3f}%")
    return lines
