"""Start-up of a run with one or many processes, and work that only process 0 does."""

from __future__ import annotations

import collections
import math
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
from jaxcl.sharding.clusters import ProcessId, find_process_id, tpu_metadata
from jaxcl.sharding.peers import Watch
from jaxcl.sharding.roll_call import TOKEN_KEY, roll_call

_START_KEY, _START_SECONDS = "JAXCL_START_TIMEOUT", 300.0
# How long a process may be silent, and how much longer until jax's own service gives it up. The service has no
# signs of life from this program, which may be busy, but from a thread of its runtime.
_PEER_KEY, _PEER_SECONDS, _SERVICE_FACTOR = "JAXCL_PEER_TIMEOUT", 60.0, 1.5
# For `Watch` to say which process is gone.
_VERDICT_SECONDS = 10.0
# If all processes fail, process 0 exits last: the runtime of the others aborts when it is gone.
_LAST_SECONDS = 2.0
# Time for jax's own start, after the roll call.
_CONNECT_SECONDS = 60
_LONGEST_MESSAGE = 4096

_joined = False
_watch: Watch | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | None = None,
) -> bool:
    """Connects this process with the others of the run; does nothing if there is only one.

    From then on a process that dies or hangs ends this one, see `peers.Watch`; `JAXCL_PEER_TIMEOUT` is the number of
    seconds (default 60) without a sign of life after which one counts as hanging.

    Call it before anything uses a device. What the arguments leave open is inferred from the environment, see
    `clusters.find_process_id`. Further calls in the same process do nothing.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      timeout: seconds to wait for the others; default: `JAXCL_START_TIMEOUT`, or 300.

    Returns:
      Whether there are several processes.

    Raises:
      UserError: the settings are incomplete; a process did not report within `timeout`; the port of process 0 is in
        use; or the processes differ in versions or number of devices. The same line in every process that reached
        process 0.
    """
    global _joined, _watch
    if _joined:
        return True
    arguments = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": num_processes,
        "JAX_PROCESS_ID": process_id,
    }
    given = {key: str(value) for key, value in arguments.items() if value is not None}
    process = find_process_id({**os.environ, **given}, tpu_metadata())
    if process is None or process.count == 1:
        return False
    timeout = _timeout(os.environ, _START_KEY, _START_SECONDS) if timeout is None else timeout
    patience = _timeout(os.environ, _PEER_KEY, _PEER_SECONDS)
    versions = {"jax": jax.__version__, "jaxcl": jaxcl.__version__}
    links = roll_call(process, versions, timeout=timeout, token=os.environ.get(TOKEN_KEY, ""))
    _watch = Watch(process, links, timeout=patience)
    _watch.start()
    _start_runtime(process, patience)
    _joined = True
    _check_devices(process)
    return True


def is_first() -> bool:
    """Whether this is process 0, which writes small files and prints."""
    return jax.process_index() == 0


def on_first(action: Callable[[], object]) -> None:
    """Runs an action on process 0; the other processes wait for it.

    All processes must call it.

    Args:
      action: what to run, such as writing small files.

    Raises:
      UserError: the action failed on process 0; the same line in every process.
    """
    if jax.process_count() == 1:
        action()
        return
    on_each(lambda: action() if is_first() else None)


def on_each(action: Callable[[], object]) -> None:
    """Runs an action in every process; each waits for the others.

    All processes must call it.

    Args:
      action: what to run, such as a share of common work.

    Raises:
      UserError: the action failed in another process; its line.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    problem, code = _first_error(error) if jax.process_count() > 1 else ("", 1)
    if error is not None:
        raise error
    if problem:
        raise UserError(problem, exit_code=code)


def from_first(action: Callable[[], str]) -> str:
    """What an action on process 0 returns, in every process.

    All processes must call it.

    Args:
      action: what to run, such as reading a small file that all must see alike.

    Raises:
      UserError: the action failed on process 0; the same line in every process.
    """
    found = b""

    def act() -> None:
        nonlocal found
        found = action().encode()

    on_first(act)
    if jax.process_count() > 1:
        length = int(multihost_utils.broadcast_one_to_all(np.array(len(found), np.int64)))
        content = np.frombuffer(found, np.uint8) if is_first() else np.zeros(length, np.uint8)
        found = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()
    return found.decode()


def everywhere(found: bool) -> bool:
    """Whether something is true in every process; all processes must call it."""
    return bool(of_all_processes(np.array(found)).all())


def of_all_processes(value: np.ndarray) -> np.ndarray:
    """The arrays that the processes give, one after the other along a new first axis; all must call it.

    Args:
      value: of the same shape and dtype in every process.
    """
    if jax.process_count() == 1:
        return value[None]
    return np.asarray(multihost_utils.process_allgather(value))


def wait_for_all(point: str) -> None:
    """Waits until every process has reached this call; `point` names it in errors."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def leave(code: int) -> None:
    """Ends this process at once, if it is one of several; prints the current exception.

    For failures: the usual end of a Python program waits minutes for the other processes, which wait for this one.
    Whatever started them sees the exit code and ends the others.

    Args:
      code: exit code.
    """
    if not _joined:
        return
    announce(code)
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(_LAST_SECONDS)
    os._exit(code)


def announce(code: int) -> None:
    """Tells the other processes that this one is about to end alone, with an exit code."""
    if _watch is not None:
        _watch.leave(code)


def part() -> None:
    """Tells the other processes that this one ends as intended; what then comes from them ends it no more.

    A program that ends as programs do says so by itself, but not one whose exit handlers are not run.
    """
    if _watch is not None:
        _watch.part()


def await_verdict() -> None:
    """Gives the watch over the other processes time to say which one is gone; it then ends this process.

    For errors that another process's end makes here. Returns if none of them is gone.
    """
    if _watch is not None:
        time.sleep(_VERDICT_SECONDS)


def _first_error(error: Exception | None) -> tuple[str, int]:
    """The error of the first process that has one and its exit code; an empty text if none has."""
    process = jax.process_index()
    words = (
        "" if error is None else str(error) if isinstance(error, UserError) else f"process {process} failed: {error!r}"
    )
    content = words.encode()[:_LONGEST_MESSAGE]
    message = np.zeros(_LONGEST_MESSAGE + 8, np.uint8)
    message[: len(content)] = np.frombuffer(content, np.uint8)
    message[-1] = getattr(error, "exit_code", 1)
    received = np.asarray(multihost_utils.process_allgather(message)).reshape(-1, len(message))
    found = received[int(np.argmax(received[:, 0] != 0))]
    return bytes(found[:_LONGEST_MESSAGE]).rstrip(b"\0").decode(errors="replace"), int(found[-1])


def _start_runtime(process: ProcessId, patience: float) -> None:
    # Its handler would intercept SIGTERM, which `training.interrupt` handles.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            process.coordinator,
            process.count,
            process.index,
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=math.ceil(_SERVICE_FACTOR * patience),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"could not join the run's other processes at {process.coordinator}: {_line(error)}") from error


def _check_devices(process: ProcessId) -> None:
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise UserError(f"process {process.index} of {process.count} has no usable devices: {_line(error)}") from error
    counts = collections.Counter(device.process_index for device in found)
    first = counts[0]
    for index in range(process.count):
        if counts[index] != first:
            raise UserError(
                f"processes must have equal numbers of devices: process 0 has {first}, process {index} has "
                f"{counts[index]}"
            )


def _timeout(environment: Mapping[str, str], key: str, default: float) -> float:
    value = environment.get(key) or str(default)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{key}={value}: expected a positive number of seconds", exit_code=2)
    return seconds


def _line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
