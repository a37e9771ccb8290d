"""Start-up of a run of one or many processes, and what only one of them does."""

from __future__ import annotations

import collections
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxcl
from jaxcl.errors import UserError
from jaxcl.sharding.clusters import Place, find_place, tpu_metadata
from jaxcl.sharding.roll_call import roll_call

_TIMEOUT_KEY = "JAXCL_START_TIMEOUT"
# Where all fail alike, process 0 goes last: the others' runtime aborts when they lose it.
_LAST_SECONDS = 2.0
# jax's own start, once all are known to be there.
_CONNECT_SECONDS = 60
_LONGEST_MESSAGE = 4096

_joined = False


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | None = None,
) -> bool:
    """Joins this process to the others of the run; does nothing where there is only one.

    Call it before anything touches a device. Without arguments the environment tells how many processes there are and
    which one this is; see `clusters.find_place`. A second call in the same process changes nothing.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others; default: `JAXCL_START_TIMEOUT`, or 300.

    Returns:
      Whether there are several processes.

    Raises:
      UserError: the settings are incomplete; a process did not come within `timeout`, or the port of process 0 is in
        use; or the processes differ in their versions or in their number of devices. One line, in every process that
        reached process 0.
    """
    global _joined
    if _joined:
        return True
    arguments = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": num_processes,
        "JAX_PROCESS_ID": process_id,
    }
    given = {key: str(value) for key, value in arguments.items() if value is not None}
    place = find_place({**os.environ, **given}, tpu_metadata())
    if place is None or place.count == 1:
        return False
    timeout = _timeout(os.environ) if timeout is None else timeout
    roll_call(place, {"jax": jax.__version__, "jaxcl": jaxcl.__version__}, timeout=timeout)
    _start_runtime(place)
    _joined = True
    _check_devices(place)
    return True


def is_first() -> bool:
    """Whether this is process 0, which writes small files and prints."""
    return jax.process_index() == 0


def on_first(action: Callable[[], object]) -> None:
    """Does something on process 0 while the others wait until it is done.

    All processes call it alike.

    Args:
      action: what to do; writes small files, say.

    Raises:
      UserError: process 0 could not do it; the same line in every process.
    """
    if jax.process_count() == 1:
        action()
        return
    error: Exception | None = None
    if is_first():
        try:
            action()
        except Exception as caught:
            error = caught
    problem, code = _told_by_first(error)
    if error is not None:
        raise error
    if problem:
        raise UserError(problem, exit_code=code)


def wait_for_all(moment: str) -> None:
    """Waits until every process has come to this call; `moment` names it in errors."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def leave(code: int) -> None:
    """Ends this process at once, if it is one of several; an exception on its way is printed.

    For failures. The usual end of a Python program waits minutes for the other processes, which wait for this one. Who
    started them sees the exit code and ends them.

    Args:
      code: exit code.
    """
    if not _joined:
        return
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(_LAST_SECONDS)
    os._exit(code)


def _told_by_first(error: Exception | None) -> tuple[str, int]:
    """What process 0 says went wrong, and its exit code; nothing if all went well."""
    words = "" if error is None else str(error) if isinstance(error, UserError) else f"process 0 failed: {error!r}"
    content = words.encode()[:_LONGEST_MESSAGE]
    message = np.zeros(_LONGEST_MESSAGE + 8, np.uint8)
    message[: len(content)] = np.frombuffer(content, np.uint8)
    message[-1] = getattr(error, "exit_code", 1)
    told = np.asarray(multihost_utils.broadcast_one_to_all(message))
    return bytes(told[:_LONGEST_MESSAGE]).rstrip(b"\0").decode(errors="replace"), int(told[-1])


def _start_runtime(place: Place) -> None:
    # Its handler would take SIGTERM from us; stopping together is what `training.interrupt` does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            initialization_timeout=_CONNECT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"could not join the run's other processes at {place.coordinator}: {_line(error)}") from error


def _check_devices(place: Place) -> None:
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise UserError(f"process {place.index} of {place.count} has no devices to work on: {_line(error)}") from error
    counts = collections.Counter(device.process_index for device in found)
    first = counts[0]
    for index in range(place.count):
        if counts[index] != first:
            raise UserError(
                f"processes must have equally many devices: process 0 has {first}, process {index} has {counts[index]}"
            )


def _timeout(environment: Mapping[str, str]) -> float:
    value = environment.get(_TIMEOUT_KEY) or "300"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{_TIMEOUT_KEY}={value}: expected a positive number of seconds", exit_code=2)
    return seconds


def _line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
