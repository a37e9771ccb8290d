"""Parses the text of compiled programs: what is computed, and how often."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "token": 0, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
_CONSTANT = re.compile(r"\b[su](?:8|16|32|64)\[\][^ ]* constant\((\d+)\)")


class Shape(NamedTuple):
    """An array.

    Attributes:
      dtype: as in the text, for example `bf16`.
      sizes: size of each axis.
      fast: whether it is in the chip's fast memory instead of its main memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> float:
        """Size without padding."""
        known = _BYTES.get(self.dtype)
        digits = re.search(r"\d+", self.dtype)
        each = known if known is not None else int(digits[0]) / 8 if digits else 0
        return math.prod(self.sizes) * each


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: its name, unique in the computation.
      opcode: its operation.
      results: its results; several for a tuple.
      operands: names of its operands.
      called: names of the computations that it calls.
      text: the whole line, with those that it goes on in.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str
    root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: computations by name.
      entry: name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Parses the text of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, last = "", None, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]), line)
            current[instruction.name], last = instruction, instruction.name
        elif current and line not in ("", "}"):  # what kernels say of themselves can be several lines
            current[last] = current[last]._replace(text=f"{current[last].text}\n{line}")
    return Program(computations, entry)


def times(
    program: Program, unknown: int = 1, taken: Callable[[str], float] = lambda _: 1.0
) -> Iterator[tuple[str, float, bool]]:
    """How often each computation is executed in one call of the program.

    Args:
      program: the parsed program.
      unknown: trip count assumed for data-dependent loops.
      taken: from the name of a branch to how often it is executed each time that its conditional is.

    Yields:
      Name of a computation, number of executions, and whether it is part of a fused instruction. A computation that is
      called from several places is yielded several times.
    """
    todo = [(program.entry, 1.0, False)]
    while todo:
        name, count, fused = todo.pop()
        yield name, count, fused
        for one in program.computations[name].values():
            repeated = count * trips(program, one, unknown) if one.opcode == "while" else count
            inside = fused or one.opcode not in ("while", "call", "conditional")
            for called in one.called:
                if called in program.computations:
                    share = taken(called) if one.opcode == "conditional" else 1.0
                    todo.append((called, repeated * share, inside))


def trips(program: Program, loop: Instruction, unknown: int = 1) -> int:
    """Trip count of a `while`: as noted by the compiler, else inferred from its counter, else `unknown`.

    A loop that can end early (generation) counts with its bound.

    Args:
      program: the compiled program.
      loop: the `while` instruction.
      unknown: the number for loops whose trip count the program does not say.
    """
    if noted := _TRIPS.search(loop.text):
        return int(noted[1])
    names = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.text))
    condition, body = (program.computations.get(names.get(part, ""), {}) for part in ("condition", "body"))
    bounds = list(_constants(program, condition))
    if not bounds:
        return unknown
    step = 1
    for one in condition.values():
        counter = condition.get(one.operands[0]) if one.opcode == "compare" and one.operands else None
        if counter is not None and (place := re.search(r"index=(\d+)", counter.text)):
            step = _step(body, int(place[1]))
    return -(-max(bounds) // step)


def _constants(program: Program, computation: Computation) -> Iterator[int]:
    """Integer constants in a computation and in those that it calls."""
    for one in computation.values():
        if constant := _CONSTANT.search(one.text):
            yield int(constant[1])
        for called in one.called:
            yield from _constants(program, program.computations.get(called, {}))


def _step(body: Computation, place: int) -> int:
    """Increment of the counter at position `place` of the loop's carry; 1 if it cannot be read."""
    root = next((one for one in body.values() if one.root), None)
    if root is None or root.opcode != "tuple" or place >= len(root.operands):
        return 1
    advanced = body.get(root.operands[place])
    if advanced is None or advanced.opcode != "add":
        return 1
    added = (_CONSTANT.search(body[name].text) for name in advanced.operands if name in body)
    return max((int(one[1]) for one in added if one is not None), default=1)


def _instruction(name: str, rest: str, root: bool, line: str) -> Instruction:
    kind = _OPCODE.search(rest)
    before = rest[: kind.start(1)] if kind else rest
    after = rest[kind.end() :] if kind else ""
    results = tuple(_shape(found) for found in _SHAPE.finditer(before))
    inside, attributes = _closing(after)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    called = tuple(_CALLED.findall(attributes))
    if branches := _BRANCHES.search(attributes):
        called += tuple(re.findall(r"%?([\w.\-]+)", branches[1]))
    return Instruction(name, kind[1] if kind else "", results, operands, called, line, root)


def _shape(found: re.Match[str]) -> Shape:
    sizes = tuple(int(size) for size in found[2].split(",") if size)
    return Shape(found[1], sizes, "S(" in (found[3] or ""))


def _closing(text: str) -> tuple[str, str]:
    """Splits the text after an opening bracket at its closing bracket."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""
