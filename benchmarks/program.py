"""Compiled programs that a benchmark runs in turn, and what it reports of each."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax


class Program:
    """A compiled program, what it holds, and how long it took in each round."""

    def __init__(self, function: Any, *args: Any, carried: bool = False) -> None:
        """Compiles.

        Args:
          function: jitted.
          args: its arguments.
          carried: whether its first result takes the place of its first argument, as for a training step.
        """
        started = time.perf_counter()
        self._run = function.lower(*args).compile()
        self.compile_seconds = time.perf_counter() - started
        self.temporary = self._run.memory_analysis().temp_size_in_bytes
        self._args, self._carried = list(args), carried
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def round(self) -> None:
        """Runs once."""
        processor, started = time.process_time(), time.perf_counter()
        result = jax.block_until_ready(self._run(*self._args))
        self.seconds.append(time.perf_counter() - started)
        self.processor.append(time.process_time() - processor)
        if self._carried:
            self._args[0] = result[0]

    def facts(self, base: Program) -> dict[str, Any]:
        """What is reported; the first round only warms up."""
        ratios = [a / b for a, b in zip(self.seconds[1:], base.seconds[1:], strict=True)]
        processor = [a / b for a, b in zip(self.processor[1:], base.processor[1:], strict=True)]
        return {
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "processor_ratio": statistics.median(processor),
            "processor_ratio_quartiles": statistics.quantiles(processor, n=4)[::2],
            "seconds": statistics.median(self.seconds[1:]),
            "temporary_megabytes": self.temporary / 1e6,
            "temporary_ratio": self.temporary / base.temporary,
            "compile_seconds": self.compile_seconds,
        }


def run_in_turn(programs: Iterable[Program], rounds: int) -> None:
    """Runs each once a round, in a rotating order, and one round more to warm up."""
    programs = list(programs)
    for number in range(rounds + 1):
        for place in range(len(programs)):
            programs[(place + number) % len(programs)].round()


def machine() -> dict[str, Any]:
    """What a benchmark ran on."""
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }
