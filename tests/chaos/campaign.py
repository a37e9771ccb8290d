"""Kills runs at random points until they end, and compares them with one that nothing disturbed."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.same_runs import differences
from jaxcl.config.file import dump_yaml
from jaxcl.run.remote.objects import Objects
from jaxcl.run.remote.reading import bring_down, read_states
from tests.chaos.member import BUCKET, LOCAL, Doom, member, run
from tests.tiny.devices import flags
from tests.tiny.runs import PAIRS, SEEKR

METHODS: dict[str, Any] = {
    "das": {"name": "das", "importance_examples": 8},
    "seekr": SEEKR,
    "replay": {"name": "replay", "replay": {"fraction": 0.25}},
}
# Checkpoints also between the rows of the log and in the middle of a task.
CONTENT: dict[str, Any] = {
    **PAIRS,
    "training": {"batch_size": 8, "steps": [5, 4], "log_every": 2, "checkpoint_every": 3},
    "evaluation": {"batch_size": 4, "limit": 4, "max_new_tokens": 24},
}
# Seconds in which a process has to end after another one was killed: by docs/scale.md 15, on a machine with other work.
_STATED = 60.0
_LONGEST = 1800.0
_FILES = ("memory.json", "memory/*", "teacher/*", "predictions/*", "importance/*", "tokenizer/*")
_UNFINISHED = (".tmp", "partial", "orbax-checkpoint-tmp")


@dataclass
class Tally:
    """What came of some kills.

    Attributes:
      kills: how many there were.
      runs: runs that were killed and ended in the end.
      phases: where the kills fell.
      alone: processes that ended by themselves after the other one was killed.
      seconds: what it took, without the undisturbed run.
      wrong: what differs, or how a run ended that did not.
    """

    kills: int = 0
    runs: int = 0
    phases: collections.Counter[str] = field(default_factory=collections.Counter)
    alone: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds what came of other kills."""
        self.kills, self.runs, self.alone = self.kills + other.kills, self.runs + other.runs, self.alone + other.alone
        self.seconds += other.seconds
        self.phases.update(other.phases)
        self.wrong += other.wrong

    def plain(self) -> dict[str, Any]:
        """Its values for a record."""
        return {**dataclasses.asdict(self), "phases": dict(self.phases), "seconds": round(self.seconds, 1)}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Tally:
        """The tally of a line of a record."""
        phases = collections.Counter(line["phases"])
        return cls(line["kills"], line["runs"], phases, line["alone"], line["seconds"], list(line["wrong"]))


class Campaign:
    """Runs of one method in one or two processes.

    Args:
      method: a name of `METHODS`.
      processes: how many processes a run has.
      folder: where the runs go.
      remote: whether the output is a URL, and the local folder is lost with each kill, as with a machine.
      reports: whether they write reports.
    """

    def __init__(
        self, method: str, processes: int, folder: Path, *, remote: bool = False, reports: bool = False
    ) -> None:
        self._method, self._processes, self._reports, self._remote = method, processes, reports, remote
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._phase, self._seconds = "", 0.0
        self._operations: list[int] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.chaos.preload"])

    def run(self, kills: int, seed: int, done: Callable[[Tally], object] = lambda one: None) -> Tally:
        """Kills that many times; the same seed draws the same points, which times on a machine blur.

        Args:
          kills: how many times.
          seed: of the points.
          done: gets what came of each run when it has ended.
        """
        chance, tally = random.Random(seed), Tally()
        whole = self._folder / "whole"
        started = time.monotonic()
        if any(codes := self._start(whole, None)):
            tally.wrong.append(f"the undisturbed run ended with {codes}: {self._said()}")
            return tally
        self._seconds = time.monotonic() - started
        self._operations = [int((self._folder / f"note{index}").read_text()) for index in range(self._processes)]
        while tally.kills < kills and not tally.wrong:
            one = self._killed(chance, self._folder / f"run{tally.runs + 1}", kills - tally.kills)
            one.wrong += [] if one.wrong else self._differences(whole, self._folder / f"run{tally.runs + 1}")
            if not one.wrong:
                shutil.rmtree(self._folder / f"run{tally.runs + 1}")
            tally.add(one)
            done(one)
        return tally

    def _killed(self, chance: random.Random, folder: Path, kills: int) -> Tally:
        """Starts one run until it ends, with at most this many kills."""
        one, started = Tally(runs=1), time.monotonic()
        while True:
            victim, began = chance.randrange(self._processes), time.monotonic()
            doom = _draw(chance, self._operations[victim], self._seconds) if one.kills < kills else None
            codes = self._start(folder, doom, victim, one)
            if codes[victim] != -9:
                if not one.kills:  # a whole life, which did not compile as the first one did
                    self._seconds = min(self._seconds, time.monotonic() - began)
                break
            one.kills += 1
            one.phases[self._phase] += 1
            if self._remote:
                shutil.rmtree(folder / LOCAL, ignore_errors=True)
        if any(codes):
            one.wrong.append(f"{folder.name} ended with {codes}: {self._said()}")
        one.seconds = time.monotonic() - started
        return one

    def _differences(self, whole: Path, folder: Path) -> list[str]:
        undisturbed = next(self._left(whole))
        return [f"{folder.name}: {line}" for left in self._left(folder) for line in compare(undisturbed, left)]

    def _left(self, folder: Path) -> Iterator[Path]:
        """The folder that a run leaves, and for one at a URL also what another machine brings down from there."""
        if not self._remote:
            yield folder
            return
        yield folder / LOCAL
        objects = Objects(_url(folder))
        bring_down(objects, folder / "after", read_states(objects))
        yield folder / "after"

    def _start(self, folder: Path, doom: Doom | None, victim: int = 0, tally: Tally | None = None) -> list[int]:
        """Starts all processes once; their exit codes."""
        config = self._folder / f"{folder.name}.yaml"
        places = {"output": str(folder)}
        if self._remote:
            places = {"output": _url(folder), "local_output": str(folder / LOCAL)}
        config.write_text(dump_yaml({**CONTENT, "method": METHODS[self._method], **places}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        members: list[BaseProcess] = []
        for index in range(self._processes):
            environment = {"XLA_FLAGS": flags(1), "TQDM_DISABLE": "1"}
            if self._processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_PROCESS_ID": str(index),
                    "JAXCL_TOKEN": "chaos",
                }
                environment["JAX_NUM_PROCESSES"] = str(self._processes)
                # One whose peer died before it was heard of waits for it as for one that has not started yet.
                environment["JAXCL_START_TIMEOUT"] = str(_STATED / 2)
            note = self._folder / f"note{index}"
            note.unlink(missing_ok=True)
            fate = doom if index == victim else None
            options = {"command": partial(run, str(config), self._reports), "environment": environment}
            members.append(self._context.Process(target=member, args=(str(folder), fate, str(note)), kwargs=options))
        for one in members:
            one.start()
        alone, late = wait_for(members, victim)
        if tally is not None:
            tally.alone += alone
            tally.wrong += [f"{folder.name}: {line}: {self._said()}" for line in late]
        note = self._folder / f"note{victim}"
        # The note may be empty: a second thread has killed the process while the first one wrote it.
        self._phase = (note.read_text() or "unknown") if note.exists() else "before the run"
        return [-9 if one.exitcode is None else one.exitcode for one in members]

    def _said(self) -> str:
        return " | ".join(path.read_text()[-800:] for path in sorted(self._folder.glob("note*.log")))


def wait_for(members: Sequence[BaseProcess], victim: int, *, stated: float = _STATED) -> tuple[int, list[str]]:
    """Waits for all processes of a run, and ends those that do not when one of them was killed.

    Args:
      members: the processes.
      victim: index of the one that may be killed.
      stated: seconds in which all others have to end after that.

    Returns:
      How many ended by themselves after it was killed, and a line for each that did not.
    """
    members[victim].join(_LONGEST)
    killed, ended = members[victim].exitcode == -9, time.monotonic()
    alone, late = 0, []
    for index, one in enumerate(members):
        seconds = stated if members[victim].exitcode else _LONGEST
        one.join(max(0.0, ended + seconds - time.monotonic()))
        if one.exitcode is None:
            one.kill()
            one.join()
            late.append(f"process {index} did not end within {stated:g} s after process {victim}")
        elif index != victim:
            alone += killed
    return alone, late


def _url(folder: Path) -> str:
    return f"file://{folder / BUCKET}"


def _draw(chance: random.Random, operations: int, seconds: float) -> Doom:
    """Half of the kills are at file operations, where most can go wrong, the others at any time.

    Any point of a whole life can be drawn, early ones more often, since a life that goes on from a checkpoint is short.
    """
    at = chance.random() ** 2
    if chance.random() < 0.5:
        return Doom("file", 1 + int(at * operations))
    return Doom("time", at * seconds)


def compare(whole: Path, other: Path) -> Iterator[str]:
    """A line for each thing in which a run that was killed differs from one that was not."""
    yield from differences(whole, other)
    for pattern in _FILES:
        names = [{str(path.relative_to(folder)) for path in folder.glob(pattern)} for folder in (whole, other)]
        yield from (f"{name}: only in one of them" for name in sorted(names[0] ^ names[1]))
        for name in sorted(names[0] & names[1]):
            if (whole / name).read_bytes() != (other / name).read_bytes():
                yield f"{name}: other bytes"
    left = [str(path.relative_to(other)) for path in other.rglob("*") if path.name.endswith(_UNFINISHED)]
    yield from (f"{name} is left over" for name in left)


def environment(folder: Path) -> dict[str, str]:
    """What the processes read when they start: programs are compiled once for all runs, with few optimisations."""
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "programs")),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAXCL_DATA_CACHE": str(folder / "data"),
    }


def table(tallies: Mapping[str, Tally], say: Callable[[str], object] = print) -> None:
    """Prints where kills fell, and what came of them."""
    phases = sorted({phase for tally in tallies.values() for phase in tally.phases})
    say("| run | kills | runs ended | ended alone | " + " | ".join(phases) + " | differences | kills per minute |")
    say("|" + "---|" * (len(phases) + 6))
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    for name, tally in [*tallies.items(), *([("all", total)] if len(tallies) > 1 else [])]:
        fell = " | ".join(str(tally.phases[phase]) for phase in phases)
        rate = f"{60 * tally.kills / tally.seconds:.1f}" if tally.seconds else ""
        say(f"| {name} | {tally.kills} | {tally.runs} | {tally.alone} | {fell} | {len(tally.wrong)} | {rate} |")
