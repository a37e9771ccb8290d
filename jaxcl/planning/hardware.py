"""Limits of chips, and topologies by name."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from jaxcl.errors import UserError


class Chip(NamedTuple):
    """Limits of one chip.

    Attributes:
      memory: bytes that a program can use.
      flops: bfloat16 operations per second.
      bandwidth: bytes per second between chip and main memory.
      interconnect: bytes per second from one chip to others, over all links.
    """

    memory: float
    flops: float
    bandwidth: float
    interconnect: float


# https://cloud.google.com/tpu/docs, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (peak compute, HBM, HBM
# bandwidth, interchip interconnect); memory without the part that the compiler reserves.
CHIPS = {
    "v4": Chip(31.75 * 2**30, 275e12, 1.2e12, 300e9),
    "v5e": Chip(15.75 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip(94.75 * 2**30, 459e12, 2.765e12, 600e9),
    "v6e": Chip(31.25 * 2**30, 918e12, 1.64e12, 448e9),
    # Two GPUs of 24 GB over PCIe (data sheet "NVIDIA L4"; "NVIDIA Ada GPU architecture", RTX 4090): dense bfloat16
    # with sums in float32; memory without some 0.5 GiB for CUDA.
    "l4": Chip(22 * 2**30, 121e12, 300e9, 32e9),
    "rtx4090": Chip(23.5 * 2**30, 165e12, 1.008e12, 32e9),
}
_GPUS = ("l4", "rtx4090")


_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class Topology(NamedTuple):
    """Chips in a grid.

    Attributes:
      name: as given by the user, such as `v5p:4x4x4`.
      kind: key of `CHIPS`.
      chips: number of chips.
    """

    name: str
    kind: str
    chips: int

    @property
    def chip(self) -> Chip:
        """Limits of one chip."""
        return CHIPS[self.kind]

    @property
    def gpu(self) -> bool:
        """Whether the chips are GPUs, for which there is no compiler without one."""
        return self.kind in _GPUS


def parse_topology(name: str) -> Topology:
    """A topology by name.

    Examples:
      >>> parse_topology("v5p:4x4x4").chips
      64

    Raises:
      UserError: an unknown kind of chip, or not a grid.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"topology {name!r}: expected KIND:AxB or KIND:AxBxC, such as v5e:4x4 or v5p:4x4x4; kinds: "
            f"{', '.join(CHIPS)}",
            exit_code=2,
        )
    return Topology(name, match[1], math.prod(map(int, match[2].split("x"))))


def find_devices(topology: Topology) -> Any:
    """Device descriptions to compile for; needs `libtpu`, but no TPU. `None` if it is not installed, and for GPUs.

    Raises:
      UserError: libtpu does not support the grid.
    """
    if topology.gpu or importlib.util.find_spec("libtpu") is None:
        return None
    from jax.experimental import topologies

    # Nothing is run, so libtpu must not look for chips, lock them or log that there are none.
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        # Without it, a v4 chip would be two devices.
        options = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
        return topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **options)
    except Exception as error:  # libtpu raises many types
        raise UserError(f"topology {topology.name}: {str(error).splitlines()[0]}", exit_code=2) from error
