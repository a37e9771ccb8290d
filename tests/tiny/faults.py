"""What kills a run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from jaxcl.run.sequence import TaskSequence
from jaxcl.training import halfway
from jaxcl.training.interrupt import StoppedTogether


class Interrupted(Exception):
    """Stands for whatever kills a process."""


@contextlib.contextmanager
def killed_at_save(number: int, *, before: bool = False, trained: bool = False) -> Iterator[None]:
    """The run in the block is killed right after its `number`th checkpoint, or right before it.

    Checkpoints count from 1: those between training and consolidation with `trained`, otherwise all others. The block
    must not get further than that.
    """
    save, count = TaskSequence._save, 0

    def save_or_die(self: Any, *arguments: Any, **options: Any) -> int | None:
        nonlocal count
        if (options["phase"] == "trained") is not trained:
            return save(self, *arguments, **options)
        count += 1
        found = None if before and count == number else save(self, *arguments, **options)
        if count == number:
            self.checkpoints.wait()
            raise Interrupted
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TaskSequence, "_save", save_or_die)
        with pytest.raises(Interrupted):
            yield


@contextlib.contextmanager
def asked_to_stop(loop: str, batch: int, code: int | None = None) -> Iterator[None]:
    """The run in the block gets SIGTERM while it computes a batch of a loop, from 1, and stops after it.

    A command, with a `code`, ends by itself.
    """
    rest = halfway._Stoppable.rest

    def signalled(self: Any, items: Any) -> Iterator[Any]:
        for item in rest(self, items):
            if (self._name, self._done + 1) == (loop, batch):
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(halfway._Stoppable, "rest", signalled)
        with pytest.raises(StoppedTogether) if code is None else contextlib.nullcontext():
            yield
