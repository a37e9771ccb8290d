"""Start-up of a run of one or many processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from jaxcl.errors import UserError

_KEYS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> bool:
    """Joins this process to the others of the run; does nothing where there is only one.

    Call it before anything touches a device. Without arguments it reads `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, and where these are absent it recognises TPU pods and SLURM steps.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others.

    Returns:
      Whether there are several processes.

    Raises:
      UserError: the settings are incomplete, or the others did not come within `timeout`.
    """
    given = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": num_processes,
        "JAX_PROCESS_ID": process_id,
    }
    settings = {key: str(value) if value is not None else os.environ.get(key) for key, value in given.items()}
    arguments = _arguments(settings)
    if arguments is None and not _in_cluster(os.environ):
        return False
    if arguments is not None and arguments["num_processes"] == 1:
        return False
    try:
        jax.distributed.initialize(**(arguments or {}), initialization_timeout=timeout)
    except (RuntimeError, ValueError) as error:
        place = (arguments or {}).get("coordinator_address", "the cluster's coordinator")
        raise UserError(f"could not join the run's other processes at {place} within {timeout} s: {error}") from error
    return True


def _arguments(settings: Mapping[str, str | None]) -> dict[str, Any] | None:
    present = [key for key in _KEYS if settings[key]]
    if not present:
        return None
    if len(present) < len(_KEYS):
        missing = ", ".join(key for key in _KEYS if key not in present)
        raise UserError(f"{', '.join(present)} is set but {missing} is not; set all three or none", exit_code=2)
    try:
        count, index = int(settings[_KEYS[1]] or ""), int(settings[_KEYS[2]] or "")
    except ValueError as error:
        raise UserError(
            f"{_KEYS[1]}={settings[_KEYS[1]]}, {_KEYS[2]}={settings[_KEYS[2]]}: both must be whole numbers", exit_code=2
        ) from error
    if not 0 <= index < count:
        raise UserError(f"{_KEYS[2]}={index} must be from 0 to {_KEYS[1]}-1 = {count - 1}", exit_code=2)
    return {"coordinator_address": str(settings[_KEYS[0]]), "num_processes": count, "process_id": index}


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of a step with several tasks, which jax can then read by itself."""
    slurm = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "") or (slurm.isdigit() and int(slurm) > 1)
