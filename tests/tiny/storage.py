"""Objects in memory under `faulty://`, where writes and reads are late, fail, or are cut, or the writer dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
    """Stands for SIGKILL in the middle of a write, of which the first `arrived` bytes are there."""

    def __init__(self, arrived: int | None = None) -> None:
        super().__init__()
        self.arrived = arrived


class FaultySystem(MemoryFileSystem):
    """Objects in memory.

    Attributes:
      fault: called before each write with its number, from 1, and its place; may raise, or say how many bytes arrive.
      reading: called before each read with its place; may raise.
      latency: seconds that each write takes.
      writes: the places that were written, in order.
    """

    protocol = "faulty"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[Callable[[int, str], int | None]]
    reading: ClassVar[Callable[[str], None]]
    latency: ClassVar[float]
    writes: ClassVar[list[str]]
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def reset(cls, *, empty: bool = True) -> None:
        """No faults any more, and nothing stored."""
        if empty:
            cls.store.clear()
            cls.pseudo_dirs[:] = [""]
        cls.fault, cls.reading = staticmethod(lambda number, place: None), staticmethod(lambda place: None)
        cls.latency, cls.writes = 0.0, []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, str):
            return super()._strip_protocol(path.replace("faulty://", "memory://", 1))
        return [cls._strip_protocol(one) for one in path]

    @classmethod
    def place(cls, text: str) -> str:
        """The place of the one object that has a text in it."""
        (found,) = (place for place in cls.store if text in place)
        return str(found)

    @classmethod
    def change(cls, text: str, content: bytes | None = None) -> None:
        """Gives the one object that has a text in its place another content; by default, flips a bit of it."""
        file = cls.store[cls.place(text)]
        if content is None:
            content = bytearray(file.getvalue())
            content[len(content) // 2] ^= 1
        file.seek(0)
        file.truncate()
        file.write(bytes(content))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Writes an object."""
        time.sleep(self.latency)
        with self._lock:
            self.writes.append(path)
            try:
                arrived = type(self).fault(len(self.writes), path)
            except Killed as killed:
                if killed.arrived is not None:
                    super().pipe_file(path, value[: killed.arrived])
                raise
            super().pipe_file(path, value if arrived is None else value[:arrived])

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        """Writes an object from a file."""
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cat_file(self, path: str, **options: Any) -> bytes:
        """Reads an object."""
        type(self).reading(path)
        return bytes(super().cat_file(path, **options))

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """Reads an object into a file."""
        Path(lpath).write_bytes(self.cat_file(rpath))


FaultySystem.reset()
fsspec.register_implementation("faulty", FaultySystem, clobber=True)
