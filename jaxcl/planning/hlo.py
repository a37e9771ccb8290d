"""Compiled programs as text: what is computed how often."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
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
      dtype: as in the text, `bf16` for example.
      sizes: size of each axis.
      fast: it lies in the chip's fast memory, not in its main memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> float:
        """Its size, without padding."""
        known = _BYTES.get(self.dtype)
        digits = re.search(r"\d+", self.dtype)
        each = known if known is not None else int(digits[0]) / 8 if digits else 0
        return math.prod(self.sizes) * each


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: its name, the same nowhere else in the computation.
      opcode: what it does.
      results: the arrays it makes; several for a tuple.
      operands: names of what it reads.
      called: names of computations it runs.
      text: the whole line.
      root: it is the computation's result.
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
      computations: by name.
      entry: name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` wrote."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]), line)
            current[instruction.name] = instruction
    return Program(computations, entry)


def times(program: Program, unknown: int = 1) -> Iterator[tuple[str, float, bool]]:
    """How often each computation is run in one call of the program.

    Args:
      program: as parsed.
      unknown: turns of loops whose number the program computes.

    Yields:
      Name of a computation, how often it runs, and whether it is a part of one fused instruction. One that is called
      from several places comes several times. Of branches, each is counted as if taken.
    """
    todo = [(program.entry, 1.0, False)]
    while todo:
        name, count, fused = todo.pop()
        yield name, count, fused
        for one in program.computations[name].values():
            repeated = count * trips(program, one, unknown) if one.opcode == "while" else count
            inside = fused or one.opcode not in ("while", "call", "conditional")
            todo += [(called, repeated, inside) for called in one.called if called in program.computations]


def trips(program: Program, loop: Instruction, unknown: int = 1) -> int:
    """Turns of a `while`: what the compiler noted, else what follows from its counter, else `unknown`.

    A loop that may end early (writing text) is counted to its bound.

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
    """Whole numbers in a computation and in those it runs."""
    for one in computation.values():
        if constant := _CONSTANT.search(one.text):
            yield int(constant[1])
        for called in one.called:
            yield from _constants(program, program.computations.get(called, {}))


def _step(body: Computation, place: int) -> int:
    """By how much a turn advances the counter at a place of what the loop carries; 1 where that cannot be read."""
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
    """Splits behind an opening bracket, at the bracket that closes it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""
