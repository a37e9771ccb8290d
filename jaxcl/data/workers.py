"""Work in programs of their own, one per few cores, because a process runs Python code on one core at a time.

A worker is `python -m jaxcl.data.workers`. It reads pickled work from its input, so that, unlike with
`multiprocessing`, the program that starts it is not imported again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from jaxcl.errors import UserError

#: Cores for a worker: its tokeniser uses all of them, the Python code around it one.
CORES = 4


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(work: Callable[[Any], object], items: Sequence[Any], count: int | None = None) -> None:
    """Calls `work` with each item, in worker programs if there are cores for two.

    Args:
      work: the function; if it cannot be pickled, it is called here.
      items: picklable arguments.
      count: number of workers; none: one per `CORES` cores.

    Raises:
      UserError: the first error that a call raised; further items are not begun.
      RuntimeError: a worker ended without a word, or a call raised another error.
    """
    count = min(len(items), cores() // CORES if count is None else count)
    if count < 2 or not _is_picklable(work):
        for item in items:
            work(item)
        return
    left, lock, failed = iter(items), threading.Lock(), threading.Event()

    def serve(worker: subprocess.Popen[bytes]) -> None:
        while not failed.is_set():
            with lock:
                item = next(left, left)
            if item is left:
                return
            try:
                _ask(worker, item)
            except BaseException:
                failed.set()
                raise

    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(work, max(1, cores() // count))) for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            try:
                for done in [pool.submit(serve, worker) for worker in workers]:
                    done.result()
            except BaseException:  # an interruption as well
                failed.set()
                for worker in workers:
                    worker.kill()
                raise


def _is_picklable(value: object) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def program(module: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a module of jaxcl as a program which finds what this one does.

    Args:
      module: its dotted name.
      **variables: further variables of the environment.
    """
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # -P: the current folder is searched only if it is here.
    return [sys.executable, "-P", "-m", module], {**os.environ, "PYTHONPATH": paths, **variables}


@contextlib.contextmanager
def _started(work: Callable[[Any], object], threads: int) -> Iterator[subprocess.Popen[bytes]]:
    command, environment = program("jaxcl.data.workers", RAYON_NUM_THREADS=str(threads))
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        _send(worker, work)
        yield worker
    finally:
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        worker.kill()
        worker.wait()


def _send(worker: subprocess.Popen[bytes], value: Any) -> None:
    if worker.stdin is not None:
        pickle.dump(value, worker.stdin)
        worker.stdin.flush()


def _ask(worker: subprocess.Popen[bytes], item: Any) -> None:
    try:
        _send(worker, item)
        error = pickle.load(worker.stdout) if worker.stdout is not None else None
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise RuntimeError(f"a worker that encodes rows ended with code {worker.wait()}") from None
    if isinstance(error, Exception):
        raise error


def _work(given: IO[bytes], said: IO[bytes]) -> None:
    work = pickle.load(given)
    while True:
        try:
            item = pickle.load(given)
        except EOFError:
            return
        error: Exception | None = None
        try:
            work(item)
        except (UserError, OSError) as caught:
            error = caught
        except Exception as caught:
            error = RuntimeError(f"{type(caught).__name__}: {caught}")
        pickle.dump(error, said)
        said.flush()


if __name__ == "__main__":
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _work(sys.stdin.buffer, answers)
