"""Where the time of a run goes: seconds by part over all attempts, and what was done twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax

from jaxcl.reporting.goodput import PRODUCTIVE

_COMPILE = "/jax/core/compile/backend_compile_duration"
_compiled = 0.0


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _compiled
    if event == _COMPILE:
        _compiled += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Seconds of a run by part.

    `training` are steps; what XLA compiles meanwhile is `compiling`. `recovery` is reading checkpoints after an
    interruption; `lost` are steps between a checkpoint and the end of an attempt, which were made again. Time between
    attempts is in none.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """Goes on from earlier attempts.

        Args:
          seconds: what they took, by part.
        """
        self._seconds: dict[str, float] = dict(seconds or {})
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
          seconds: below 0 for what another part has counted.
        """
        if seconds:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def resume(self, seconds: Mapping[str, float], *, saved_at: float | None, signs: Iterable[Path]) -> None:
        """Goes on from a checkpoint; what the attempt before did after it is lost.

        Args:
          seconds: by part, as the checkpoint has them.
          saved_at: Unix time of the checkpoint; `None` if it does not say.
          signs: files that an attempt writes while it runs: the time of the newest is its last sign of life.
        """
        for name, earlier in seconds.items():
            self.add(name, earlier)
        alive = max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)
        if saved_at is not None:
            self.add("lost", max(0.0, alive - saved_at))

    def lose(self, saved_at: float) -> None:
        """Counts the steps since a checkpoint as lost: they are made again.

        Args:
          saved_at: Unix time of the checkpoint.
        """
        lost = min(self.seconds.get(PRODUCTIVE, 0.0), max(0.0, time.time() - saved_at))
        self.add(PRODUCTIVE, -lost)
        self.add("lost", lost)

    def _count(self) -> None:
        """Adds what has passed since the last time to the innermost open part."""
        now, compiled = time.monotonic(), _compiled
        if self._open:
            self.add("compiling", compiled - self._compiled)
            self.add(self._open[-1], now - self._since - (compiled - self._compiled))
        self._since, self._compiled = now, compiled


__all__ = ["Stopwatch"]
