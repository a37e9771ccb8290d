"""Where the time of a run goes: seconds by part over all attempts, and what was done twice."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping

import jax

from jaxcl.reporting.goodput import PRODUCTIVE

_COMPILE = "/jax/core/compile/backend_compile_duration"
_compiled = 0.0


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _compiled
    if event == _COMPILE:
        _compiled += duration_secs


@functools.cache
def _hear_of_compiling() -> None:
    """Once per process; jax has no public way to stop listening."""
    jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Seconds of a run by part.

    `training` are steps; what XLA compiles meanwhile is `compiling`. `recovery` is reading checkpoints after an
    interruption; `lost` are steps between a checkpoint and the end of an attempt, which were made again. Time between
    attempts is in none.
    """

    def __init__(self) -> None:
        _hear_of_compiling()
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since, self._compiled = 0.0, 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part, up to this moment."""
        self._count()
        return dict(self._seconds)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to a part; nested blocks and compiling count only for their own parts.

        Args:
          name: the part.
        """
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds to a part.

        Args:
          name: the part.
          seconds: how many.
        """
        if seconds:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def resume(self, seconds: Mapping[str, float]) -> None:
        """Adds what earlier attempts took up to the checkpoint that this one goes on from.

        Args:
          seconds: by part.
        """
        for name, earlier in seconds.items():
            self.add(name, earlier)

    def lose(self, seconds: float) -> None:
        """Moves seconds of steps that are made again from `training` to `lost`.

        Args:
          seconds: how many.
        """
        self.add(PRODUCTIVE, -seconds)
        self.add("lost", seconds)

    def _count(self) -> None:
        """Adds what has passed since the last time to the innermost open part."""
        now, compiled = time.monotonic(), _compiled
        if self._open:
            self.add("compiling", compiled - self._compiled)
            self.add(self._open[-1], now - self._since - (compiled - self._compiled))
        self._since, self._compiled = now, compiled


__all__ = ["Stopwatch"]
