"""What a run remembers of its tasks: which examples it keeps, where they are, and the rows that come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcl.data.chat_rows import messages_of
from jaxcl.data.choosing import (
    FEW_ANSWERS,
    count_fitting,
    equal_shares,
    priorities,
    rank_examples,
    reservoir_counts,
)
from jaxcl.data.examples import ExampleTable
from jaxcl.data.fingerprint import rows_print
from jaxcl.data.memory import Memory, MemoryPipeline, TaskMemory, draw_count, draw_examples
from jaxcl.data.memory_files import file_names, hash_of, read_examples, read_texts, write_examples
from jaxcl.data.pairs import PairRows
from jaxcl.data.pipeline import Pipeline
from jaxcl.data.plan import count_sizes
from jaxcl.data.rows import EncodedRows, HostBatch
from jaxcl.errors import UserError
from jaxcl.methods.options import Budget
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components
from jaxcl.run.fingerprints import load_memory
from jaxcl.run.folder import RunFolder
from jaxcl.sharding.processes import on_each, on_first
from jaxcl.training.checkpoint import Saved
from jaxcl.training.config import micro_batch_size
from jaxcl.training.feed import place_batch
from jaxcl.training.loops import Loops

Texts = Iterable[Mapping[str, Any]]


class Kept(NamedTuple):
    """What is remembered.

    Attributes:
      memory: which examples are kept of each task.
      tables: the kept examples, by task, in the order of `TaskMemory.kept`; none for a task of which nothing is kept.
    """

    memory: Memory
    tables: Mapping[int, ExampleTable]

    def task(self, index: int) -> TaskMemory:
        """What is kept of a task."""
        return next(one for one in self.memory.tasks if one.task == index)


def load_kept(folder: RunFolder, seed: int, saved: Saved | None) -> Kept:
    """What a run remembered when a checkpoint was written.

    Args:
      folder: the run folder.
      seed: seed of the run.
      saved: the checkpoint; `None`: nothing is remembered.

    Raises:
      UserError: a file is missing, or is not the one that the checkpoint belongs to; names it.
    """
    memory = load_memory(folder.memory, seed, saved)
    return Kept(memory, {one.task: read_examples(folder.examples, one) for one in memory.tasks if one.kept})


def remember(parts: Components, kept: Kept, index: int, params: Params, loops: Loops | None = None) -> Kept:
    """What is remembered once one more task is learned; unchanged if the method keeps nothing.

    Args:
      parts: the parts of the run.
      kept: what is remembered of earlier tasks.
      index: the task that was learned.
      params: the model that has learned it.
      loops: see `mean_losses`.

    Raises:
      UserError: the budget is smaller than any example.
    """
    replay = parts.method.replay
    if replay is None or parts.method.joint:
        return kept
    rows, room = parts.train_rows(index), replay.room
    allotted = Allotted({}, draw_count(len(rows), replay.fraction, replay.minimum), None)
    if room is None and replay.choose == "random":
        chosen = draw_examples(len(rows), replay.fraction, replay.minimum, seed=kept.memory.seed, task=index)
    else:
        order = _ranked(parts, rows, kept.memory.seed, params, loops)
        if room is not None:
            costs = rows.examples.costs[order] if room.unit == "bytes" else np.ones(len(order), np.int64)
            # One that is larger than a task's last share would leave nothing of its task.
            if (fits := costs <= room.amount // parts.phases).any():
                order, costs = order[fits], costs[fits]
            allotted = allot(room, kept, index, order, costs, count=len(rows), reservoir=replay.choose == "reservoir")
        chosen = order[: allotted.new].tolist()
    memory = kept.memory.cut(allotted.earlier, after=index).with_task(
        index,
        parts.phase_name(index),
        count=len(rows),
        examples=chosen,
        limit=allotted.limit,
        rows=parts.train_prints[index],
        sizes=_sizes(rows),
    )
    return _with_tables(kept, memory, index, rows.examples)


def remember_written(
    parts: Components, kept: Kept, index: int, rows: Sequence[Mapping[str, str]], dropped: Mapping[str, int]
) -> Kept:
    """What is remembered once the model has written samples of one more task.

    Args:
      parts: the parts of the run.
      kept: what is remembered of earlier tasks.
      index: the task.
      rows: the samples, with `prompt` and `answer`.
      dropped: how many were dropped, by reason.
    """
    table = parts.encode_written(rows, index, parts.phase_name(index)).examples
    memory = kept.memory.with_task(
        index,
        parts.phase_name(index),
        count=len(rows),
        examples=range(len(rows)),
        synthetic=True,
        dropped=dict(dropped),
        rows=rows_print(rows)["ordered"],
        sizes=_sizes(parts.train_rows(index)),
    )
    return _with_tables(kept, memory, index, table)


class Allotted(NamedTuple):
    """How many examples are kept: of earlier tasks, by task; of the new one; and the reservoir's limit."""

    earlier: Mapping[int, int]
    new: int
    limit: float | None


def allot(
    room: Budget,
    kept: Kept,
    index: int,
    order: Int[np.ndarray, " examples"],
    costs: Int[np.ndarray, " examples"],
    *,
    count: int,
    reservoir: bool,
) -> Allotted:
    """Divides a budget over the tasks so far.

    Args:
      room: the budget.
      kept: what is remembered of earlier tasks.
      index: the task that was learned.
      order: its examples, those first that are kept first.
      costs: what each of these takes of the budget.
      count: number of all its examples.
      reservoir: by priority over all tasks together, instead of equally over tasks.

    Raises:
      UserError: the budget is smaller than the first example of each task.
    """
    seed = kept.memory.seed
    earlier = [one for one in kept.memory.tasks if one.task < index and one.kept]
    all_costs = [*(_costs(kept.tables[one.task], one, room) for one in earlier), costs]
    limit = None
    if reservoir:
        drawn = [priorities(one.count, seed=seed, task=one.task)[list(one.ranked)] for one in earlier]
        drawn.append(priorities(count, seed=seed, task=index)[order])
        before = [one.limit for one in kept.memory.tasks if one.task < index]
        counts, limit = reservoir_counts(drawn, all_costs, room.amount, before[-1] if before else None)
    else:
        shares = equal_shares(room.amount, [int(one.sum()) for one in all_costs])
        counts = [count_fitting(one, share) for one, share in zip(all_costs, shares, strict=True)]
    if not any(counts):
        raise UserError(
            f"method.replay.budget: {room.amount} {room.unit} are too few for one example of each task; the first of "
            f"task {index} takes {costs[0]}"
        )
    return Allotted({one.task: count for one, count in zip(earlier, counts, strict=False)}, counts[-1], limit)


def few_answers(rows: EncodedRows) -> list[bytes] | None:
    """The answer of each example, if a task has few different ones (`FEW_ANSWERS`); none otherwise, and for text."""
    if rows.group != PairRows.group:
        return None
    table, answers = rows.examples, list[bytes]()
    different: set[bytes] = set()
    for index in range(len(rows)):
        answers.append(table.last_learned(index).tobytes())
        different.add(answers[-1])
        if len(different) > FEW_ANSWERS:
            return None
    return answers


def mean_losses(
    parts: Components, params: Params, pipeline: Pipeline, loops: Loops | None = None
) -> Float[np.ndarray, " examples"]:
    """Mean cross-entropy of each example over its scored tokens, in nats, without dropout.

    Each process computes its rows of every batch; all get all losses.

    Args:
      parts: the parts of the run.
      params: the params of the model.
      pipeline: the examples, of one source.
      loops: those of the run, which may be stopped; `None`: they run through.
    """
    network, chunk = parts.network, parts.method.options.loss_chunk

    def losses(params: Params, batch: Batch) -> Mapping[str, Array]:
        states = network.hidden(params, batch).states
        return {"losses": example_losses(network, params, states, batch, chunk), "example": batch.example}

    compiled = parts.trainer.compile(losses)
    found = np.zeros(pipeline.examples)

    def each(batch: HostBatch) -> Mapping[str, Array]:
        return dict(compiled(params, place_batch(batch, parts.layout.batch)))

    for result in (loops or Loops()).each(each, pipeline.once(None, 0, jax.process_index(), jax.process_count())):
        examples = np.asarray(result["example"])
        found[examples[examples >= 0]] = np.asarray(result["losses"])[examples >= 0]
    return found


def save_kept(folder: RunFolder, before: Kept, kept: Kept, texts: Callable[[], Texts]) -> Kept:
    """Writes what a task has changed in the memory, and from then on reads the examples from there.

    All processes must call this.

    Args:
      folder: the run folder.
      before: what was remembered before the task.
      kept: what is remembered now.
      texts: the new task's kept examples as text, in the order of `TaskMemory.kept`; called by process 0.

    Raises:
      UserError: a file cannot be written.
    """
    changed = [one for one in kept.memory.tasks if one.kept and not one.versions[-1].files]

    def write() -> None:
        for one in changed:
            old = next((old for old in before.memory.tasks if old.task == one.task), None)
            rows = texts() if old is None else read_texts(folder.examples, old, one.kept)
            write_examples(folder.examples, one, kept.tables[one.task], rows)

    files: dict[int, dict[str, str]] = {}
    tables = dict(kept.tables)

    def read() -> None:
        for one in changed:
            files[one.task] = {name: hash_of(folder.examples / name, one.name) for name in file_names(one)}
            tables[one.task] = read_examples(folder.examples, one)

    on_first(write)
    on_each(read)
    memory = kept.memory.with_files(files)
    on_first(lambda: memory.save(folder.memory))
    return Kept(memory, tables)


def remove_unneeded(folder: RunFolder, memory: Memory, learned: Iterable[Iterable[int]]) -> None:
    """Removes examples that no checkpoint needs any more.

    Args:
      folder: the run folder.
      memory: the memory, as it was saved last.
      learned: the tasks in the memory at each checkpoint.
    """
    states = [memory, *(memory.of(set(tasks)) for tasks in learned)]
    needed = {name for state in states for one in state.tasks for name in one.versions[-1].files}
    for one in memory.tasks:
        for version in one.versions:
            for name in version.files.keys() - needed:
                (folder.examples / name).unlink(missing_ok=True)


def text_of(parts: Components, task: TaskMemory, table: ExampleTable) -> Iterator[dict[str, Any]]:
    """The kept examples of a task as people read them: its rows, or running text as the model sees it.

    Args:
      parts: the parts of the run, which still has the task's data.
      task: what is kept of it.
      table: the kept examples.
    """
    data = parts.tasks[task.task]
    if data.answered:
        for row in data.train.pick(task.kept):
            yield {"messages": messages_of(row)} if data.kind == "chat" else dict(row)
        return
    for tokens, spans in (table[place] for place in range(len(table))):
        pieces = np.split(tokens, np.cumsum(spans)[:-1])
        yield {"passages": [parts.tokenizer.decode(piece.tolist()) for piece in pieces]}


def remembered_rows(parts: Components, kept: Kept, task: TaskMemory) -> EncodedRows:
    """The kept examples of a task, encoded, in the order of `TaskMemory.kept`."""
    return parts.rows_of(kept.tables[task.task], task.task)


def memory_pipeline(
    parts: Components, kept: Kept, tasks: Sequence[int], *, batch_size: int | None = None, **options: Any
) -> MemoryPipeline:
    """Batches of the remembered rows of some tasks; the default size is the run's. See `MemoryPipeline`."""
    return MemoryPipeline(
        kept.memory,
        {one.task: remembered_rows(parts, kept, one) for one in kept.memory.tasks if one.task in tasks and one.kept},
        parts.config.data,
        batch_size=batch_size or parts.config.training.batch_size,
        shapes=parts.shapes,
        tasks=tasks,
        **options,
    )


def _ranked(
    parts: Components, rows: EncodedRows, seed: int, params: Params, loops: Loops | None
) -> Int[np.ndarray, " examples"]:
    """A task's examples in the order in which they are kept."""
    replay, losses, answers = parts.method.replay, None, None
    assert replay is not None
    if replay.choose == "highest_loss":
        size = micro_batch_size(parts.config.training, parts.layout.batch_ways, jax.process_count())
        # Masked text comes back under the same masks, so it is judged under them.
        pipeline = Pipeline([rows], size, parts.config.data, shapes=parts.shapes, fixed_noise=seed)
        losses = mean_losses(parts, params, pipeline, loops)
    elif replay.choose == "balanced":
        answers = few_answers(rows)
    return rank_examples(replay.choose, len(rows), seed=seed, task=rows.task, answers=answers, losses=losses)


def _with_tables(kept: Kept, memory: Memory, index: int, table: ExampleTable) -> Kept:
    """The tables of what a memory keeps: of earlier tasks, what is left of theirs; of a new one, from its `table`."""
    tables = {}
    for one in filter(lambda one: one.kept, memory.tasks):
        if one.task == index:
            tables[index] = table.take(one.kept)
        else:
            old = kept.task(one.task).kept
            same = old == one.kept
            tables[one.task] = (
                kept.tables[one.task] if same else kept.tables[one.task].take(np.searchsorted(old, one.kept).tolist())
            )
    return Kept(memory, tables)


def _costs(table: ExampleTable, task: TaskMemory, room: Budget) -> Int[np.ndarray, " examples"]:
    """What each kept example of a task takes of the budget, in the order in which they are kept."""
    if room.unit == "rows":
        return np.ones(len(task.ranked), np.int64)
    return table.costs[np.searchsorted(task.kept, task.ranked)]


def _sizes(rows: EncodedRows) -> list[tuple[int, int, int]]:
    return count_sizes(rows.sizes) if rows.group == PairRows.group else []
