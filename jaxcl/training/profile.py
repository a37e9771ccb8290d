"""A trace of a few steps of a run, for xprof and TensorBoard."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import jax
from jaxtyping import PyTree


class Profiler:
    """Traces the steps from `first` to `last` of a run on this process, and nothing before or after them.

    Steps are counted over all tasks, as in `metrics.jsonl`. Where a run goes on behind `first`, nothing is traced.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: tuple[int, int] | None) -> None:
        """Prepares; nothing is written before step `first`.

        Args:
          folder: gets `plugins/profile/TIME/` with the trace, as TensorBoard looks for it.
          steps: first and last step; `None` traces nothing.
        """
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._running = False

    def step(self, number: int, before: PyTree) -> contextlib.AbstractContextManager[Any]:
        """The context in which step `number` is dispatched.

        Args:
          number: the step, from 1.
          before: arrays of the step before; the trace begins when they are there.
        """
        if number == self._first:
            jax.block_until_ready(before)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would be most of the file
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, after: PyTree) -> None:
        """Ends the trace behind its last step; `after` are arrays of step `number`, waited for."""
        if self._running and number >= self._last:
            jax.block_until_ready(after)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if a trace is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
