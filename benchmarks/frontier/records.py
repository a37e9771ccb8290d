"""The records of points: JSON lines, a file per testbed, order and method; what is recorded is not run again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.frontier.testbeds import TESTBEDS
from jaxcl.methods.registry import find_method

RECORDS = Path(__file__).parents[1] / "records" / "frontier"


@dataclasses.dataclass(frozen=True)
class Point:
    """What one record belongs to.

    Attributes:
      testbed: a name in `TESTBEDS`.
      order: `A` or `B`, or names of tasks separated by commas (scored on dev rows).
      name: name of the method in tables; several may share a method with different fixed options.
      method: a registered method, or `module:Class`.
      options: the method's options that differ from its defaults; under `run`, other sections of the configuration.
      learning_rate: highest learning rate of each task.
      seed: decides the order of examples, dropout and memory.
    """

    testbed: str
    order: str
    name: str
    method: str
    options: Mapping[str, Any]
    learning_rate: float
    seed: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order learned."""
        orders = TESTBEDS[self.testbed].orders
        return orders[self.order] if self.order in orders else tuple(self.order.split(","))

    @property
    def program(self) -> str:
        """What points that share compiled programs have in common."""
        return json.dumps([self.testbed, self.order, self.name, self.method, dict(self.options)], sort_keys=True)

    @property
    def setting(self) -> str:
        """What is chosen for a method: its options and learning rate."""
        return json.dumps([dict(self.options), self.learning_rate], sort_keys=True)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "options": dict(self.options)}

    @property
    def key(self) -> str:
        """What identifies its record: the point, and how its testbed trains and scores."""
        return json.dumps([self.plain(), how(self.testbed)], sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Record:
    """A point and its measurements, see `benchmarks.frontier.point.measure`."""

    point: Point
    results: dict[str, Any]


def how(testbed: str) -> dict[str, Any]:
    """What the results of a testbed depend on besides the point, as plain values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(TESTBEDS[testbed])))
    if plain["model"] == "decoder":
        del plain["model"]  # records of decoders are older than the other kind
    return plain


def file_of(point: Point, folder: Path = RECORDS) -> Path:
    """The file of a point's record."""
    group, name = (re.sub(r"[^\w.+-]+", "_", text) for text in (f"{point.testbed}-{point.order}", point.name))
    return folder / group / f"{name}.jsonl"


def append(point: Point, results: Mapping[str, Any], folder: Path = RECORDS) -> None:
    """Adds a record; several processes may do so at once."""
    path = file_of(point, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    content = {"point": point.plain(), "how": how(point.testbed), "all_options": all_options(point)}
    line = json.dumps({**content, "hardware": hardware, "results": results})
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line + "\n")


def all_options(point: Point) -> dict[str, Any]:
    """The method's options, defaults included, as plain values."""
    own = {name: value for name, value in point.options.items() if name != "run"}
    options = find_method(point.method).Options.model_validate(own)
    plain: dict[str, Any] = options.model_dump(mode="json")
    return plain


def read(folder: Path = RECORDS) -> Iterator[Record]:
    """All records that fit the testbeds, and the methods' defaults, as they are now."""
    for path in sorted(folder.glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            content = json.loads(line)
            point = Point(**content["point"])
            if point.testbed not in TESTBEDS or content["how"] != how(point.testbed):
                continue
            known = content.get("all_options", {})  # older records have none
            if not known or known.items() <= all_options(point).items():
                yield Record(point, content["results"])
