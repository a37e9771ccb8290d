"""A file of values with a checksum: arrays as they lie on this process's devices, and what JSON holds.

A line of JSON says what the file belongs to and what follows: the bytes of arrays, each part of a split one once. The
SHA-256 of all that is at the end, so that a file which is not as it was written is found before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl.data.files import reason, replacing
from jaxcl.data.teacher_store import dtype_named
from jaxcl.errors import UserError

_CHUNK, _DIGEST = 2**20, 32

Place = tuple[tuple[int, int], ...]
"""The part of an array that a device holds: first and last index of each axis, the last one exclusive."""


def write_values(path: Path, about: Mapping[str, Any], values: Sequence[Any]) -> None:
    """Writes a file, atomically; waits for the arrays.

    Args:
      path: the file.
      about: what it belongs to, JSON-serialisable.
      values: arrays, of which this process's parts are written, and what JSON holds.

    Raises:
      UserError: it cannot be written.
    """
    values = [_plain(value) for value in values]
    header = {"about": about, "values": [_describe(value) for value in values]}
    digest = hashlib.sha256()
    with replacing(path) as temporary, open(temporary, "wb") as file:

        def put(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        put(json.dumps(header).encode() + b"\n")
        for value in values:
            for part in _parts(value).values():
                put(np.asarray(part).tobytes())
        file.write(digest.digest())


def read_values(path: Path, about: Mapping[str, Any], mesh: Mesh) -> list[Any] | None:
    """What `write_values` was given; arrays are split over the devices as they were.

    Args:
      path: the file.
      about: what it has to belong to.
      mesh: the run's mesh, of the shape of the one that it was written on.

    Returns:
      The values; `None` if there is no file, or it belongs to something else.

    Raises:
      UserError: it is not as it was written, or cannot be read; names it.
    """
    try:
        with open(path, "rb") as file:
            if not _is_whole(file):
                raise UserError(f"{path} is damaged")
            file.seek(0)
            header = json.loads(file.readline())
            return [_read(file, one, mesh) for one in header["values"]] if header["about"] == about else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _is_whole(file: IO[bytes]) -> bool:
    left = os.fstat(file.fileno()).st_size - _DIGEST
    digest = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return left == 0 and file.read() == digest.digest()


def _plain(value: Any) -> Any:
    """Arrays within lists as lists."""
    if isinstance(value, list | tuple | dict):
        return jax.tree.map(lambda leaf: np.asarray(leaf).tolist() if _is_array(leaf) else leaf, value)
    return value


def _is_weak(value: Any) -> bool:
    """Whether an array came from a number of Python's: compiled functions promote its dtype otherwise."""
    return isinstance(value, jax.Array) and value.weak_type and not value.ndim


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _describe(value: Any) -> dict[str, Any]:
    if not _is_array(value):
        return {"value": value}
    if _is_weak(value):
        return {"weak": value.item()}
    spec = None
    if isinstance(value, jax.Array):
        spec = list(value.sharding.spec) if isinstance(value.sharding, NamedSharding) else []
    return {"dtype": value.dtype.name, "shape": value.shape, "spec": spec, "parts": list(_parts(value))}


def _parts(value: Any) -> dict[Place, Any]:
    """The different parts of an array in this process, by place."""
    if _is_weak(value):
        return {}
    if isinstance(value, jax.Array):
        return {_place(shard.index, value.shape): shard.data for shard in value.addressable_shards}
    return {_place((), value.shape): value} if _is_array(value) else {}


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> Place:
    slices = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(one.indices(size)[:2] for one, size in zip(slices, shape, strict=True))


def _read(file: IO[bytes], described: Mapping[str, Any], mesh: Mesh) -> Any:
    """The next value of a file that is at its parts."""
    if "value" in described:
        return described["value"]
    if "weak" in described:
        return jnp.asarray(described["weak"])
    name, shape, spec = described["dtype"], tuple(described["shape"]), described["spec"]
    dtype = dtype_named(name)
    parts: dict[Place, np.ndarray] = {}
    for ends in described["parts"]:
        sizes = [last - first for first, last in ends]
        count = math.prod(sizes) * dtype.itemsize
        if not 0 <= count <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"a part of {count} bytes")
        content = file.read(count)
        parts[tuple((first, last) for first, last in ends)] = np.frombuffer(content, dtype).reshape(sizes)
    if spec is None:
        return next(iter(parts.values())).copy()
    sharding = NamedSharding(mesh, PartitionSpec(*[tuple(one) if isinstance(one, list) else one for one in spec]))
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[_place(index or (), shape)])
