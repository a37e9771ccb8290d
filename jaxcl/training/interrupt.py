"""Clean stops: a signal sets a flag that is checked between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxcl.training.signals import STOPPING


class StoppedTogether(KeyboardInterrupt):
    """All processes have agreed to stop; a checkpoint, or what a phase between steps had done, was saved."""


class Interrupts:
    """While active, the first signal only sets `requested`; a second one raises `KeyboardInterrupt` at once.

    In a command of jaxcl the second one ends the process, whatever it is doing: see `jaxcl.training.signals`.

    Signals are SIGINT, SIGTERM and SIGUSR1; schedulers send the latter two when a time limit is near.

    A step donates its input, so an exception in the middle of a step would leave no state to save.

    Attributes:
      requested: the signal received, or `None`.
    """

    def __init__(self, stops: str = "after this step, with a checkpoint") -> None:
        """Nothing is changed yet.

        Args:
          stops: where it stops, for the line that the first signal prints.
        """
        self._line = f"\nstopping {stops}; once more to stop at once\n".encode()
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python allows handlers only in the main thread; in other threads the caller handles signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        # Not print, which the signal may have interrupted.
        os.write(2, self._line)


class Agreement:
    """A vote on whether any process wants to stop: without it, one would stop and the others wait for it forever.

    The result is one step old, like the metrics, and needs no synchronisation of its own.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._local = len(mesh.local_devices)
        self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, stop: bool) -> Int[Array, ""] | bool:
        """Starts the vote of one step."""
        if self._alone:
            return stop
        votes = np.full(self._local, int(stop), np.int32)
        return self._maximum(jax.make_array_from_process_local_data(self._sharding, votes))

    def answer(self, vote: Int[Array, ""] | bool) -> bool:
        """Result of a vote."""
        return bool(vote)
