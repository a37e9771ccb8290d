"""What the phases between the steps of training had done when a run was asked to stop.

A run goes on from its latest checkpoint. What it does after it (the method measures importance, signals are stored,
tasks are scored) is done in loops. When the run is asked to stop there, all processes end their loop after the same
batch. They save the totals of that loop and of those before it, and the next start continues with the next batch.

What is saved belongs to one checkpoint, number of processes, phase and place of the loop in its phase. Whatever belongs
to something else is ignored, and removed with the next checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcl.errors import UserError
from jaxcl.sharding.processes import is_first, of_all_processes, on_each
from jaxcl.training.interrupt import Agreement, Interrupts, StoppedTogether
from jaxcl.training.loops import Item, Loop, Loops, Unfinished
from jaxcl.training.values_file import read_values, write_values


class Halfway(Loops):
    """The loops of a run, which stop between two batches and are resumed there. All processes call it alike.

    Outside of a phase loops run through.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, *, checkpoint: int, about: Mapping[str, Any], saved: Callable[[], object]
    ) -> None:
        """Looks at nothing yet.

        Args:
          folder: where it is saved.
          mesh: the run's mesh.
          checkpoint: number of the latest checkpoint; -1 for none.
          about: what else it belongs to, JSON-serialisable.
          saved: called after it is saved.
        """
        self.checkpoint = checkpoint
        self._folder, self._mesh, self._saved = folder, mesh, saved
        self._about = {**about, "processes": jax.process_count(), "mesh": [list(one) for one in mesh.shape.items()]}
        self._agreement = Agreement(mesh)
        self._interrupts = Interrupts()
        self._phase: str | None = None
        self._number = 0
        self._vote: Any = False
        self._ended: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a run whose loops always come in the same order.

        Args:
          name: tells it from all others since the checkpoint.

        Raises:
          StoppedTogether: a process was asked to stop; what the phase had done is saved.
        """
        self._phase, self._number, self._vote = name, 0, False
        try:
            with Interrupts("after this batch, with what is done so far") as self._interrupts:
                yield
                if self._agreement.answer(self._agreement.ask(self._interrupts.requested is not None)):
                    self._stop({})
        finally:
            self._phase = None
            self._ended.clear()

    def loop(self, count: int = 1, fits: Callable[[Sequence[Any]], bool] = lambda values: True) -> Loop:
        """See `Loops.loop`."""
        if self._phase is None:
            return Loop()
        name = f"{self._phase}.{self._number}"
        self._number += 1
        found = self._read(name, count, fits)
        return _Stoppable(self, name, found)

    def part(self, path: Path) -> Path:
        """See `Loops.part`; what a loop that is stopped has written is kept there."""
        return self._folder / path.name

    def forget(self) -> None:
        """See `Loops.forget`; process 0 removes the files, which the others have read by then."""
        self._ended.clear()
        if is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def check(self) -> None:
        """See `Loops.check`."""
        if self._phase is not None and self.asked():
            raise Unfinished

    def asked(self) -> bool:
        """Whether any process was asked to stop; of several, at the vote before this one, which needs no waiting."""
        vote = self._agreement.ask(self._interrupts.requested is not None)
        last, self._vote = self._vote, vote
        return self._agreement.answer(vote if isinstance(vote, bool) else last)

    def ended(self, name: str, values: list[Any], *, stopped: bool) -> None:
        """A loop has ended, or was stopped: then all is saved, and the run ends.

        Args:
          name: of the loop.
          values: how many items are done, and what was given to `Loop.end`.
          stopped: whether it was stopped.
        """
        if stopped:
            self._stop({name: values})
        self._ended[name] = values

    def _stop(self, last: Mapping[str, list[Any]]) -> None:
        def write() -> None:
            for name, values in {**self._ended, **last}.items():
                write_values(self._path(name), self._belongs(name), values)

        try:
            on_each(write)
            self._saved()
        except UserError as error:
            if is_first():
                print(f"{error}; what is not in checkpoint {self.checkpoint} is done again", file=sys.stderr)
        raise StoppedTogether

    def _read(self, name: str, count: int, fits: Callable[[Sequence[Any]], bool]) -> list[Any] | None:
        """The values of a loop, if all processes have those of the same number of items."""
        path, found, done = self._path(name), None, -1
        try:
            found = read_values(path, self._belongs(name), self._mesh)
            if found is not None and len(found) == count + 1 and type(found[0]) is int:
                if not fits(found[1:]):
                    raise UserError(f"{path} does not fit what was saved with it")
                done = found[0]
        except UserError as error:
            print(f"{error}; what it holds is done again", file=sys.stderr)
        all_done = of_all_processes(np.array(done))
        return found if done >= 0 and (all_done == done).all() else None

    def _belongs(self, name: str) -> dict[str, Any]:
        return {**self._about, "checkpoint": self.checkpoint, "loop": name}

    def _path(self, name: str) -> Path:
        return self._folder / f"{re.sub('[^a-z0-9.]+', '-', name)}_process{jax.process_index():03d}.values"


class _Stoppable(Loop):
    """A loop of a phase of a run."""

    def __init__(self, halfway: Halfway, name: str, found: list[Any] | None) -> None:
        self._halfway, self._name = halfway, name
        self._done: int = 0 if found is None else found[0]
        self.kept = None if found is None else found[1:]

    def rest(self, items: Iterable[Item]) -> Iterator[Item]:
        """See `Loop.rest`."""
        for item in itertools.islice(items, self._done, None):
            if self._halfway.asked():
                self.stopped = True
                return
            yield item
            self._done += 1

    def end(self, values: Sequence[Any]) -> None:
        """See `Loop.end`."""
        self._halfway.ended(self._name, [self._done, *values], stopped=self.stopped)
