"""What kills a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from jaxcl.run.sequence import TaskSequence


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
