"""The device mesh: the number of devices along each axis of parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import Field, model_validator

from jaxcl.errors import UserError
from jaxcl.schema import Schema

AXES = ("data", "fsdp", "tensor")


class MeshConfig(Schema):
    """Sizes of the mesh axes; their product is the number of devices.

    One size may be -1: it is inferred from the number of devices and the other sizes.
    """

    data: int = Field(-1, ge=-1, description="copies of the params, over which the batch is split; -1: inferred")
    fsdp: int = Field(1, ge=-1, description="parts of batch, params and optimizer state; -1: inferred")
    tensor: int = Field(1, ge=-1, description="parts of heads, mlp, experts and vocab within a layer; -1: inferred")

    @model_validator(mode="after")
    def _sizes(self) -> MeshConfig:
        sizes = [getattr(self, name) for name in AXES]
        if 0 in sizes:
            raise ValueError(f"a mesh size must be positive or -1, got {dict(zip(AXES, sizes, strict=True))}")
        if sizes.count(-1) > 1:
            raise ValueError(f"at most one of {', '.join(AXES)} may be -1")
        return self


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Size of every mesh axis for a number of devices.

    Args:
      config: the requested sizes.
      devices: number of devices.

    Returns:
      Axis name -> size, in the order of `AXES`; the product equals `devices`.

    Raises:
      UserError: the sizes do not multiply to `devices`.

    Examples:
      >>> mesh_sizes(MeshConfig(tensor=2), 8)
      {'data': 4, 'fsdp': 1, 'tensor': 2}
    """
    sizes = {name: int(getattr(config, name)) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if -1 in sizes.values():
        if devices % fixed:
            raise UserError(
                f"mesh: {wanted} leaves no whole number for -1 on {devices} devices; "
                f"the other sizes must multiply to a divisor of {devices}",
                exit_code=2,
            )
        sizes = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    elif fixed != devices:
        raise UserError(
            f"mesh: {wanted} needs {fixed} devices but there are {devices}; set one of them to -1", exit_code=2
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      config: sizes of the axes.
      devices: use these devices, in this order, instead of all.

    Returns:
      A mesh with the axes of `AXES` (axes of size 1 included). `tensor` is innermost: its devices communicate most
      and are placed closest to each other.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    if devices is not None:
        sizes = mesh_sizes(config, len(devices))
        return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)
    sizes = mesh_sizes(config, jax.device_count())
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types)
