"""One of two processes with two devices each: trains, saves, restores, collects, stops on request. Run as a program."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.batch import Batch
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.sharding.processes import initialize, wait_for_all
from jaxcl.training import checksums
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.halfway import Halfway
from jaxcl.training.interrupt import StoppedTogether
from jaxcl.training.loop import train_task
from jaxcl.training.loops import Loops
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.task import RunningTask, signal_records
from jaxcl.training.trainer import Trainer
from jaxcl.training.watch import NotFinite, Watch
from tests.tiny.trainer import AXES, SHAPES, TinyMethod, make_params, make_rows

STEPS = 6


def share(rows: dict[str, Any]) -> dict[str, Any]:
    """This process's half of a batch."""
    size = len(rows["tokens"]) // jax.process_count()
    part = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    return {name: value[part] if isinstance(value, np.ndarray) else value for name, value in rows.items()}


class Shared:
    def __init__(self, stop_at: int | None = None, poisoned: tuple[int, ...] = ()) -> None:
        self.position, self.stop_at, self.poisoned = 0, stop_at, poisoned

    def __next__(self) -> dict[str, Any]:
        self.position += 1
        if self.position == self.stop_at and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        rows = make_rows(self.position, uneven=True)
        if self.position in self.poisoned:
            rows["weights"][-1, 0] = np.nan  # a row of the last process
        return share(rows)

    def get_state(self) -> int:
        return self.position

    def set_state(self, state: int) -> None:
        self.position = state

    def once(self, limit: int | None, seed: int) -> Any:
        yield share(make_rows(1))
        yield share({**make_rows(2), "example": np.array([8, 9, 10, -1, -1, -1, -1, -1])})


class Signalling(TinyMethod):
    def signals(self, params: Any, state: Any, batch: Batch, key: Any) -> Any:
        return {"first": batch.tokens[:, 0] + 0.0 * params["head"]["bias"][0]}


def total_of(sums: Any, params: Any, batch: Batch) -> Any:
    return sums + batch.weights.sum() + params["head"]["bias"].sum()


class Five(Shared):
    """Five batches; the last process gets a signal before one of them."""

    def once(self, limit: int | None, seed: int) -> Any:
        for number in range(1, 6):
            if number == self.stop_at and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield share(make_rows(number))


def stop_halfway(trainer: Trainer, params: Any, folder: Path) -> dict[str, Any]:
    """A total as large as the params, and split like them, which one process is asked to stop in the midst of."""
    added: list[int] = []

    def add(total: Any, params: Any, batch: Batch) -> Any:
        share = batch.weights.sum() + batch.tokens.sum()
        return jax.tree.map(lambda one, leaf: 0.7 * one + leaf / share, total, params)

    def total(loops: Loops, stop_at: int | None = None) -> Any:
        added.append(0)
        task = task_of(trainer, params, Five(stop_at), loops)
        compiled, start = (
            task.compile(add),
            task.compile(lambda tree: jax.tree.map(lambda leaf: 0 * leaf, tree))(params),
        )

        def counted(total: Any, batch: Batch) -> Any:
            added[-1] += 1
            return compiled(total, params, batch)

        return task.fold(counted, start)

    def halfway() -> Halfway:
        return Halfway(folder, trainer.layout.mesh, checkpoint=0, about={}, saved=lambda: None)

    expected = total(Loops())
    with contextlib.suppress(StoppedTogether), (one := halfway()).phase("x"):
        total(one, stop_at=2)
    with (other := halfway()).phase("x"):
        found = total(other)

    def local(tree: Any) -> list[bytes]:
        return [np.asarray(shard.data).tobytes() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]

    (file,) = folder.glob(f"*{jax.process_index():03d}.values")
    if jax.process_index() == jax.process_count() - 1:
        file.write_bytes(file.read_bytes()[:-1])  # what one process cannot use, none does
    with (third := halfway()).phase("x"):
        again = total(third)
    same = local(found) == local(expected) == local(again)
    placed = jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, expected)
    return {"added": added, "same": same and placed}


def task_of(trainer: Trainer, params: Any, rows: Shared, loops: Loops | None = None) -> RunningTask:
    return RunningTask(
        index=0,
        name="x",
        count=1,
        key=jax.random.key(3),
        seed=0,
        pipeline=rows,
        memory=rows,
        params_before=lambda: params,
        compiler=trainer.compile,
        loops=loops,
    )


def not_finite(trainer: Trainer, **options: Any) -> dict[str, Any]:
    """Trains on rows of which one is bad at some steps, the last time too often in a row."""
    state = trainer.start_task(trainer.init(make_params()), STEPS)
    feed, watch = trainer.feed(Shared(poisoned=(2, 4, 5)), prefetch=0), Watch(limit=2)
    try:
        train_task(trainer, state, feed, watch=watch, **{**options, "sinks": []})
    except NotFinite as error:
        return {"message": str(error), "step": error.step, **watch.plain()}
    return {}


def read_errors(folder: Path, state: Any) -> dict[str, Any]:
    """What this process finds in two checkpoints: while reads fail in one of the processes, then with one damaged."""
    with Checkpoints(folder, keep=2) as checkpoints:
        for index in range(2):
            checkpoints.save(state, progress={"index": index}, data=0)
    found: dict[str, Any] = {}
    measure = checksums._measure
    for name, process, count in (("once", 0, 1), ("elsewhere", jax.process_count() - 1, 99), ("always", 0, 99)):
        left = count if jax.process_index() == process and (process or name != "elsewhere") else 0

        def failing(path: Path) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                raise OSError(errno.EIO, "Input/output error")
            return measure(path)

        checksums._measure = failing
        with Checkpoints(folder, keep=2) as checkpoints:
            try:
                saved = checkpoints.latest_whole()
                found[name] = None if saved is None else saved.number
            except UserError as error:
                found[name] = str(error).replace(str(folder), "")
    checksums._measure = measure
    if jax.process_index() == 0:
        next((folder / "1" / "data").glob("process_*")).write_text("1")
    wait_for_all("damaged")
    with Checkpoints(folder, keep=2) as checkpoints:
        saved = checkpoints.latest_whole()
        found["damaged"] = None if saved is None else saved.number
        found["left"] = [one.number for one in checkpoints.notes()]
    return found


def main(folder: Path) -> dict[str, Any]:
    several = initialize()
    devices = jax.devices()[: None if several else 1]
    mesh = make_mesh(MeshConfig(fsdp=len(devices) // 2 or 1), devices)
    layout = Layout.create(mesh, AXES, SHAPES)
    optimizer = OptimizerConfig(learning_rate=0.05, warmup=2)
    trainer = Trainer(Signalling(dropout=0.2), optimizer, layout, accumulate=2, seed=0)
    losses: list[float] = []

    class Sink:
        def write(self, row: Any) -> None:
            losses.append(row["loss"])

        def close(self) -> None:
            pass

    options: dict[str, Any] = {"total": STEPS, "task": 0, "name": "x", "log_every": 1, "progress": False}
    options["sinks"] = [Sink()]
    with Checkpoints(folder) as checkpoints:
        state = trainer.start_task(trainer.init(make_params()), STEPS)
        feed = trainer.feed(Shared(stop_at=3 if several else None), prefetch=0)
        if several:
            with contextlib.suppress(KeyboardInterrupt):
                train_task(
                    trainer, state, feed, save=lambda s, data: checkpoints.save(s, progress={}, data=data), **options
                )
            saved = checkpoints.latest()
            assert saved is not None
            state, position = checkpoints.restore(trainer.target, saved)
            stopped = int(state.step)
            assert position == stopped, (position, stopped)
            feed = trainer.feed(Shared(), prefetch=1)
            feed.set_state(position)
        state = train_task(trainer, state, feed, **options)
    task = task_of(trainer, state.params, Shared())
    seen = {str(example): float(record["first"]) for example, record in signal_records(trainer, state, task)}
    sums: Any = np.float32(0)
    for batch in task.examples():
        sums = trainer.compile(total_of)(sums, state.params, batch)
    whole = jax.jit(lambda tree: tree, out_shardings=layout.replicated)(state.params)
    return {
        "losses": losses,
        "seen": seen,
        "count": len(seen),
        "sum": float(sums),
        "read_errors": read_errors(folder.with_name(f"{folder.name}-read"), state),
        "stopped": stop_halfway(trainer, state.params, folder.with_name(f"{folder.name}-halfway")),
        "not_finite": not_finite(trainer, **options),
        "params": [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(whole)],
    }


if __name__ == "__main__":
    result = json.dumps(main(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(result)
