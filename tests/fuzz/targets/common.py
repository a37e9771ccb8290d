"""What seeds are made of."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = [
    {"prompt": "1 + 1 =", "answer": "2", "text": "one é", "label": 1},
    {"prompt": "a\u2028b", "answer": "c\n", "text": "x" * 60, "label": 0.5},
]


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines_of(values: list[Any]) -> bytes:
    return b"".join(text_of(value) + b"\n" for value in values)


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def made(write: Callable[[Path], object], name: str = "file") -> bytes:
    """The bytes of a file that a library writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()
