"""A profiler trace of a few steps of a run, for xprof and TensorBoard."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import jax
from jaxtyping import PyTree


class Profiler:
    """Traces the steps `first` to `last` of a run on this process.

    Steps are counted over all tasks, as in `metrics.jsonl`. A run resumed after `first` is not traced.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: tuple[int, int] | None) -> None:
        """Prepares the trace; nothing is written before step `first`.

        Args:
          folder: the trace is written to `plugins/profile/TIME/` in it, where TensorBoard looks for it.
          steps: first and last step; `None`: no trace.
        """
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._running = False

    def step(self, number: int, before: PyTree) -> contextlib.AbstractContextManager[Any]:
        """The context in which step `number` is dispatched.

        Args:
          number: the step, from 1.
          before: arrays of the previous step; the trace starts when they are ready.
        """
        if number == self._first:
            jax.block_until_ready(before)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would fill most of the file
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, after: PyTree) -> None:
        """Ends the trace after its last step; `after` are arrays of step `number`, which are waited for."""
        if self._running and number >= self._last:
            jax.block_until_ready(after)
            self.close()

    def close(self) -> None:
        """Ends and writes the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
