"""Loops between the steps of training: over a task's examples, its memory, or what is evaluated.

`Loops` run through. A run's `Halfway` may be asked to stop between two batches, and goes on there at its next start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

Item = TypeVar("Item")


class Unfinished(Exception):
    """An item of `Loops.each` was stopped in between, and begins anew at the next start."""


class Loop:
    """One loop; this one begins at its first item and ends at its last.

    Attributes:
      kept: the values that were given to `end` when it was stopped; `None` if it begins anew.
      stopped: whether it was asked to stop before its last item.
    """

    kept: Sequence[Any] | None = None
    stopped: bool = False

    def rest(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items that are still to be done; may end before the last one."""
        return iter(items)

    def end(self, values: Sequence[Any]) -> None:
        """To be called after the last of `rest`, with what was found so far: arrays, and what JSON holds.

        Raises:
          StoppedTogether: the loop was stopped, and the values are saved.
        """


class Loops:
    """Loops that run through.

    Attributes:
      checkpoint: number of the latest checkpoint, to which loops belong.
    """

    checkpoint: int = -1

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A part of a run whose loops always come in the same order."""
        return contextlib.nullcontext()

    def loop(self, count: int = 1, fits: Callable[[Sequence[Any]], bool] = lambda values: True) -> Loop:
        """The next loop of the phase.

        Args:
          count: the number of values that it keeps.
          fits: whether kept values can be used; otherwise it begins anew.
        """
        return Loop()

    def part(self, path: Path) -> Path:
        """Where a loop writes a file that is moved to `path` once it is whole."""
        return path

    def forget(self) -> None:
        """What was kept of loops is not needed any more: what came of them is saved."""

    def check(self) -> None:
        """May be called between two batches within an item of `each`, which then begins anew.

        Raises:
          Unfinished: it stops there; caught by `each`.
        """

    def fold(self, add: Callable[[Any, Item], Any], start: PyTree, items: Iterable[Item]) -> PyTree:
        """`start` with every item added: `add(add(start, first), second)` and so on.

        The next item is added while the last one is computed, and not before that.

        Args:
          add: returns the new total, a tree like `start`. It must not change or delete the old one.
          start: a tree of arrays and numbers.
          items: those that were added in an earlier attempt are only counted.
        """
        leaves, structure = jax.tree.flatten(start)
        loop = self.loop(len(leaves))
        total = start if loop.kept is None else jax.tree.unflatten(structure, loop.kept)
        for item in loop.rest(items):
            last, total = total, add(total, item)
            jax.block_until_ready(last)
        loop.end(jax.tree.leaves(total))
        return total

    def each(self, do: Callable[[Item], Any], items: Iterable[Item]) -> list[Any]:
        """What `do` returns of each item, in order.

        Args:
          do: returns arrays that every process can read, or what JSON holds; of an earlier attempt there are lists in
            place of arrays and tuples.
          items: as many as it has done in an earlier attempt are only counted.
        """
        loop = self.loop()
        results: list[Any] = [] if loop.kept is None else list(loop.kept[0])
        try:
            for item in loop.rest(items):
                results.append(do(item))
                jax.block_until_ready(results[-2:-1])
        except Unfinished:
            loop.stopped = True
        loop.end([results])
        return results
