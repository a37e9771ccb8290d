"""Compiles a program for chips that are not available here: the memory and time that it needs."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from pydantic import Field

from jaxcl.planning.cost import count_cost
from jaxcl.planning.hardware import Chip
from jaxcl.planning.hlo import parse
from jaxcl.schema import Schema

# The compiler's messages if a program does not fit: all its memory, or that of its temporaries.
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The last text that the TPU compiler dumps. jax's own `as_text` parses the program with an older XLA, which fails on
# newer instructions (jax 0.10, libtpu 0.0.52, v5p: "async-update instruction should have 1 operands").
_COMPILED = "*.after_codegen.txt"


class Traffic(Schema):
    """All collectives of one kind in one call."""

    runs: float = Field(description="number of executions")
    bytes: float = Field(description="bytes that a chip sends")


class StepPlan(Schema):
    """What one call of a program needs on one chip."""

    fits: bool = Field(description="whether it fits into the chip's memory, according to the compiler")
    bytes_per_chip: float = Field(description="memory needed: arguments, results, temporaries and code")
    activations: float | None = Field(None, description="temporaries among them; none if the compiler failed")
    arguments: dict[str, float] = Field(description="bytes of arguments and of other resident arrays, by part")
    flops: float | None = Field(None, description="operations of matrix products and attention")
    vision_flops: float | None = Field(None, description="of them, those of a tower and a connector; none: no images")
    bytes: float | None = Field(None, description="bytes read from and written to main memory")
    collectives: dict[str, Traffic] = Field({}, description="collectives by kind")
    seconds: dict[str, float] = Field({}, description="lower bounds for compute, memory and interconnect, each alone")
    roofline_seconds: float | None = Field(None, description="the largest of these: at best, all three overlap")
    utilisation: float | None = Field(None, description="share of the chip's peak compute, with roofline_seconds")
    compile_seconds: float = Field(description="seconds of the compilation")


def plan_step(
    lowered: Any,
    arguments: Mapping[str, Any],
    chip: Chip,
    *,
    causal: bool,
    loop_trips: int = 1,
    experts: int = 1,
    window_share: float = 1.0,
    resident: Mapping[str, Any] | None = None,
) -> StepPlan:
    """Compiles a program and determines its needs.

    Args:
      lowered: result of `jax.jit(...).lower`.
      arguments: the program's arguments by part, as `jax.ShapeDtypeStruct` with shardings.
      chip: the chip's limits.
      causal: see `count_cost`.
      loop_trips: see `count_cost`.
      experts: see `count_cost`.
      window_share: see `count_cost`.
      resident: arrays that are on the chip at the same time but are not arguments, likewise by part.
    """
    started = time.monotonic()
    parts = {name: bytes_per_device(tree) for name, tree in arguments.items()}
    residents = {name: bytes_per_device(tree) for name, tree in (resident or {}).items()}
    held = sum(residents.values())
    try:
        compiled, text = compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), sum(parts.values()))
        if needed is None:
            raise
        return StepPlan(
            fits=False,
            bytes_per_chip=needed + held,
            arguments=parts | residents,
            compile_seconds=round(time.monotonic() - started, 1),
        )
    seconds = round(time.monotonic() - started, 1)
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + held
    )
    cost = count_cost(parse(text), causal=causal, loop_trips=loop_trips, experts=experts, window_share=window_share)
    least = {
        "compute": cost.flops / chip.flops,
        "memory": cost.bytes / chip.bandwidth,
        "interconnect": cost.sent / chip.interconnect,
    }
    roofline = max(least.values())
    return StepPlan(
        fits=total <= chip.memory,
        bytes_per_chip=total,
        activations=memory.temp_size_in_bytes,
        arguments=parts | residents,
        flops=cost.flops,
        vision_flops=cost.vision_flops or None,
        bytes=cost.bytes,
        collectives={kind: Traffic(runs=one.runs, bytes=one.bytes) for kind, one in cost.collectives.items()},
        seconds=least,
        roofline_seconds=roofline,
        utilisation=least["compute"] / roofline if roofline else None,
        compile_seconds=seconds,
    )


def compile_with_text(lowered: Any) -> tuple[Any, str]:
    """The compiled program of a result of `jax.jit(...).lower`, and its text."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Without a TPU, programs compiled for one cannot be read back from the cache: jax warns and compiles again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry", UserWarning)
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(Path(folder).glob(_COMPILED))
        return compiled, texts[-1].read_text() if texts else compiled.as_text()


def _needed(message: str, arguments: float) -> float | None:
    """Bytes that a program would have needed, from the compiler's error; `None` for any other error.

    Examples:
      >>> _needed("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", 1e9) == 20 * 2**30
      True
      >>> _needed("the total memory required for HLO temporaries (2.00G) exceeds available HBM (1G)", 5.0) == 2**31 + 5
      True
    """
    if found := _NEEDED.search(message):
        return float(found[1]) * _UNITS[found[2].upper()]
    if found := _TEMPORARIES.search(message):
        return float(found[1]) * _UNITS[found[2].upper()] + arguments
    return None


def bytes_per_device(tree: Any) -> float:
    """Bytes per device of sharded arrays (`jax.ShapeDtypeStruct`), without those in host memory."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host":
            continue
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        dtype = jax.dtypes.canonicalize_dtype("uint32") if _is_key(leaf) else leaf.dtype
        size = 1
        for axis in shape:
            size *= axis
        total += size * dtype.itemsize * (2 if _is_key(leaf) else 1)
    return total


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))
