"""The cost of one call of a compiled program per chip: operations, memory traffic, traffic between chips.

The compiler's own count takes the body of a loop once, whatever its trip count, and does not see into Pallas kernels.
Here loops are multiplied by their trip counts, and splash attention is counted by its products: half of them behind a
causal mask, all of them in a vision tower (the scope that `jaxcl.models.vision` names). Of a grouped product
(`jax.lax.ragged_dot`), in which some compilers write every group with all rows, each row is counted with its own
group. Of layers of which only some have a window, each counts with its own attention
(`jaxcl.models.attention.in_window` names the two).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from jaxcl.planning.hlo import Computation, Instruction, Program, Shape, times

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move no data, or their work is counted elsewhere.
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
        *("while", "call", "conditional", "opt-barrier", "copy-done", "async-start", "async-update", "async-done"),
    }
)
_SLICES = ("dynamic-slice", "slice", "gather")
_Started = Mapping[str, set[str]]
_GROUPED = "grouped_product"  # the scope that the model names them by
_RAGGED = "ragged-dot-none"  # what the compiler for v5p calls its kernel for them
# Products per kernel, each 2 * rows * length * length * head_dim operations (Dao, 2023: FlashAttention-2, section 3).
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_VISION = re.compile(r'op_name="[^"]*\bvision\)*/')
_WINDOW = re.compile(r'op_name="[^"]*\bwindow_(\d+|none)\b')


class Collective(NamedTuple):
    """All collectives of one kind.

    Attributes:
      runs: number of executions.
      bytes: total bytes that a chip sends.
    """

    runs: float
    bytes: float


class Cost(NamedTuple):
    """The cost of one call for one chip.

    Attributes:
      flops: operations of matrix products and attention.
      bytes: bytes read from and written to main memory.
      collectives: collectives by kind.
      vision_flops: those operations that a tower and a connector take.
    """

    flops: float
    bytes: float
    collectives: Mapping[str, Collective]
    vision_flops: float = 0.0

    @property
    def sent(self) -> float:
        """Bytes that a chip sends to others."""
        return sum(one.bytes for one in self.collectives.values())


def count_cost(
    program: Program, *, causal: bool, loop_trips: int = 1, experts: int = 1, window_share: float = 1.0
) -> Cost:
    """The cost of a program.

    Args:
      program: the parsed program.
      causal: whether splash attention skips the blocks of later keys, which are half of all.
      loop_trips: trip count assumed for data-dependent loops.
      experts: groups of the grouped products (`jaxcl.models.experts`), those on other chips included: evenly
        spread rows are assumed.
      window_share: share of the layers that attend to a window only. Any other branch counts as taken.
    """
    shares = {"window": window_share, "whole": 1.0 - window_share, None: 1.0}
    flops = memory = vision = 0.0
    collectives: dict[str, Collective] = defaultdict(lambda: Collective(0.0, 0.0))
    started = _started(program)
    for name, count, fused in times(program, loop_trips, lambda branch: shares[_attends(branch, program)]):
        computation = program.computations[name]
        for one in computation.values():
            sees = _VISION.search(one.text) is not None
            own = count * _flops(one, computation, causal and not sees) / (experts if _GROUPED in one.text else 1)
            flops, vision = flops + own, vision + own * sees
            if not fused:
                memory += count * _traffic(one, computation, program, started)
            kind = _collective(one, name)
            if kind is None or _continues(one, name, started):
                continue
            before = collectives[kind]
            collectives[kind] = Collective(before.runs + count, before.bytes + count * _sent(kind, one, computation))
    return Cost(flops, memory, dict(collectives), vision)


def _attends(branch: str, program: Program) -> str | None:
    """Whether a branch is attention to a `window`, to the `whole` row, or neither."""
    todo, done = [branch], {branch}
    while todo:
        for one in program.computations[todo.pop()].values():
            if found := _WINDOW.search(one.text):
                return "whole" if found[1] == "none" else "window"
            called = {name for name in one.called if name in program.computations} - done
            todo += called
            done |= called
    return None


def _flops(one: Instruction, computation: Computation, causal: bool) -> float:
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
        left = computation[one.operands[0]].results[0].sizes
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(one.results[0].sizes) * math.prod(left[axis] for axis in axes)
    if one.opcode == "convolution":
        return _convolution(one, computation)
    if one.opcode == "custom-call" and one.name.startswith(_RAGGED):
        return _ragged(one, computation)
    kernel = re.match(r"splash_\w*?_(fwd|dq|dkv)", one.name) if one.opcode == "custom-call" else None
    if kernel:
        return _splash(one, computation, _SPLASH[kernel[1]], causal)
    return 0.0


def _ragged(one: Instruction, computation: Computation) -> float:
    """Operations of a grouped product that is a kernel, as if every group had all rows.

    Its last two operands are the factors: rows of inputs and kernels `[groups, ...]`, or, for the gradient of kernels,
    rows of inputs and of outputs.
    """
    left, right = (computation[name].results[0].sizes for name in one.operands[-2:])
    result = one.results[0].sizes
    groups = (right if len(result) == 2 else result)[0]
    return 2.0 * groups * math.prod(left) * result[-1]


def _convolution(one: Instruction, computation: Computation) -> float:
    """Operations of a convolution, to which the TPU compiler also converts matrix products.

    Positions in padding or between dilated inputs are not counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    if labels is None:
        return 0.0
    source, kernel = (computation[name].results[0].sizes for name in one.operands[:2])
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", _window(one.text))}
    total = 2.0 * kernel[labels[2].index("i")]
    total *= math.prod(one.results[0].sizes[labels[3].index(letter)] for letter in "bf")
    for axis, letter in enumerate(sorted(letter for letter in labels[1] if letter.isdigit())):
        size = source[labels[1].index(letter)]
        taps, outputs = kernel[labels[2].index(letter)], one.results[0].sizes[labels[3].index(letter)]
        stride, left, right = (int(window[key][axis]) if key in window else 1 for key in ("stride", "lhs", "rhs"))
        before = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
        places = (out * stride + tap * right - before for out in range(outputs) for tap in range(taps))
        total *= sum(0 <= place <= (size - 1) * left and place % left == 0 for place in places)
    return total


def _window(text: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", text)
    return found[1].replace("lhs_dilate", "lhs").replace("rhs_dilate", "rhs") if found else ""


def _splash(one: Instruction, computation: Computation, products: int, causal: bool) -> float:
    arrays = [shape for name in one.operands if name in computation for shape in computation[name].results]
    # Queries, keys and values are the largest operands; a batch of one has no batch axis.
    query = max(arrays, key=lambda shape: math.prod(shape.sizes)).sizes
    rows, length, head_dim = math.prod(query[:-2]), query[-2], query[-1]
    pairs = length * length * (0.5 if causal else 1.0)
    named = _WINDOW.search(one.text)
    if named and named[1] != "none":
        window = min(int(named[1]), length)
        before = length * window - window * (window - 1) / 2  # of keys up to the query
        pairs = before if causal else 2 * before - length
    return products * 2.0 * rows * pairs * head_dim


def _traffic(one: Instruction, computation: Computation, program: Program, started: _Started) -> float:
    """Bytes of main memory that an instruction reads and writes."""
    if one.opcode in _FREE:
        return 0.0
    read = sum(
        _slow(shape)
        for name in dict.fromkeys(one.operands)
        if name in computation and len(computation[name].results) == 1
        for shape in computation[name].results
    )
    # The results of copy-start include its source.
    results = one.results[:1] if one.opcode == "copy-start" else one.results
    written = sum(_slow(shape) for shape in results)
    if one.opcode in _SLICES:
        return min(read, written) + written
    if one.opcode == "dynamic-update-slice":
        update = computation[one.operands[1]].results[0]
        return 2 * _slow(update)
    if _inner(one, program) is None:
        return read + written
    return _fusion_traffic(one, computation, program, started)


def _inner(one: Instruction, program: Program) -> Computation | None:
    return program.computations.get(one.called[0]) if one.opcode == "fusion" and one.called else None


def _fusion_traffic(one: Instruction, computation: Computation, program: Program, started: _Started) -> float:
    """A fusion reads only the slices that it takes from an operand, and writes only what it updates in place.

    Operands that it passes through, and collectives that it continues but did not start, are not counted here.
    """
    inner = _inner(one, program) or {}
    continued = {inside.name for inside in inner.values() if _continues(inside, one.called[0], started)}
    total = 0.0
    for parameter in (inside for inside in inner.values() if inside.opcode == "parameter"):
        number = int(parameter.text.split("parameter(")[1].split(")")[0])
        if number >= len(one.operands) or len(parameter.results) != 1:
            continue
        given = computation.get(one.operands[number])
        if given is not None and len(given.results) == 1 and not given.results[0].fast:
            total += min(parameter.results[0].bytes, _used(parameter.name, inner, program, continued))
    roots = [inside for inside in inner.values() if inside.root]
    if roots and roots[0].opcode == "tuple":
        roots = [inner[name] for name in roots[0].operands if name in inner]
    elif len(one.results) > 1:  # one instruction has all results
        return total + sum(_slow(shape) for shape in one.results)
    for root, result in zip(roots, one.results, strict=False):
        if not result.fast:
            total += _written(root, inner, program, continued)
    return total


def _written(root: Instruction, inner: Computation, program: Program, continued: Collection[str]) -> float:
    """Bytes that a fusion writes for one of its results."""
    given = _behind(root, inner, ("bitcast",))  # a copy of an operand counts as written
    if given.opcode == "parameter" or given.name in continued:
        return 0.0
    updated = _behind(root, inner, ("bitcast", "copy"))
    if updated.opcode == "dynamic-update-slice":
        return inner[updated.operands[1]].results[0].bytes
    nested = _inner(updated, program)
    if nested is not None and len(updated.results) == 1:
        return _written(next(one for one in nested.values() if one.root), nested, program, ())
    return root.results[0].bytes


def _used(name: str, inner: Computation, program: Program, continued: Collection[str] = ()) -> float:
    """Bytes that the instructions of a fusion read from a value."""
    total = 0.0
    for one in inner.values():
        if name not in one.operands or one.name in continued or (one.root and one.opcode == "tuple"):
            continue
        nested = _inner(one, program)
        if one.opcode == "bitcast":
            total += _used(one.name, inner, program, continued)
        elif nested is not None:
            numbers = [number for number, operand in enumerate(one.operands) if operand == name]
            total += sum(_used(_parameter(nested, number), nested, program) for number in numbers)
        elif one.opcode in _SLICES and one.operands[0] == name:
            total += one.results[0].bytes
        elif not (one.opcode == "dynamic-update-slice" and one.operands[0] == name):
            return math.inf  # an in-place update is counted with the result
    return total


def _parameter(inner: Computation, number: int) -> str:
    return next(name for name, one in inner.items() if f"parameter({number})" in one.text)


def _behind(one: Instruction, inner: Computation, opcodes: Collection[str]) -> Instruction:
    while one.opcode in opcodes and one.operands and one.operands[0] in inner:
        one = inner[one.operands[0]]
    return one


def _slow(shape: Shape) -> float:
    return 0.0 if shape.fast else shape.bytes


def _collective(one: Instruction, computation: str) -> str | None:
    kind = one.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # The TPU compiler's form of a reduce-scatter.
    return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind


def _continues(one: Instruction, computation: str, started: _Started) -> bool:
    """Whether a collective was started in another computation."""
    return _collective(one, computation) is not None and computation not in started.get(_channel(one), {computation})


def _started(program: Program) -> _Started:
    """The computations that start asynchronous collectives, by channel.

    The text repeats such a collective where other work overlaps with it, and where it is waited for.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name, computation in program.computations.items():
        if any('"AsyncCollectiveStart"' in one.text for one in computation.values()):
            for one in computation.values():
                if channel := _channel(one):
                    found[channel].add(name)
    return found


def _channel(one: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", one.text)
    return found[1] if found else ""


def _sent(kind: str, one: Instruction, computation: Computation) -> float:
    """Bytes that a chip sends in a ring (all-to-all: directly) of the participating chips."""
    peers = group_size(one.text)
    given = sum(shape.bytes for name in one.operands if name in computation for shape in computation[name].results)
    share = (peers - 1) / peers if peers else 1.0
    if kind == "all-gather":
        return given * (peers - 1) if peers else given
    return given * (2 * share if kind == "all-reduce" else 1.0 if kind == "collective-permute" else share)


def group_size(text: str) -> int:
    """Number of participating chips per group of a collective; 0 if the text does not say.

    Examples:
      >>> group_size("replica_groups={{0,1},{2,3}}"), group_size("replica_groups=[2,4]<=[8]")
      (2, 4)
      >>> group_size("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}")
      4
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'?(\w+)'?", found[2]) if axis in sizes)
    return 0
