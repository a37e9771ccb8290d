"""The kept examples of a task on disk: their tokens to learn from, and their text to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.examples import ExampleTable, read_shards, write_shards
from jaxcl.data.files import reason, replacing
from jaxcl.data.memory import TaskMemory
from jaxcl.errors import UserError

_REMEDY = "restore it, or start a new run in another output"


def file_names(task: TaskMemory) -> tuple[str, str]:
    """Names of the files of the task's latest version: tokens and spans, and text."""
    after = task.versions[-1].after
    stem = f"task{task.task:02d}" + ("" if after == task.task else f"_after{after:02d}")
    return f"{stem}.arrow", f"{stem}.jsonl"


def write_examples(folder: Path, task: TaskMemory, table: ExampleTable, texts: Iterable[Mapping[str, Any]]) -> None:
    """Writes the files of a task's latest version, each atomically.

    Args:
      folder: the folder `memory` of the run.
      task: which examples are kept; at least one.
      table: the kept examples, in the order of `task.kept`.
      texts: them as text, in the same order.

    Raises:
      UserError: a file cannot be written.
    """
    tokens, text = (folder / name for name in file_names(task))
    with replacing(tokens) as temporary:
        first = table.shards[0]
        write_shards(temporary, table.shards, first.tokens.values.dtype, pixels=first.pixels is not None)
    with replacing(text) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, row in zip(task.kept, texts, strict=True):
            file.write(json.dumps({"example": number, **row}, ensure_ascii=False) + "\n")


def read_examples(folder: Path, task: TaskMemory) -> ExampleTable:
    """The kept examples of a task, memory-mapped.

    Args:
      folder: the folder `memory` of the run.
      task: which examples are kept; its files are compared with their hashes, if it names them.

    Raises:
      UserError: a file is missing or not as it was written; names it.
    """
    for name, expected in task.versions[-1].files.items():
        if hash_of(folder / name, task.name) != expected:
            raise UserError(
                f"{folder / name} has changed since the run wrote it: it holds what is remembered of task "
                f"{task.name}; {_REMEDY}"
            )
    return ExampleTable(read_shards(folder / file_names(task)[0]))


def read_texts(folder: Path, task: TaskMemory, kept: Sequence[int]) -> list[dict[str, Any]]:
    """Some of a task's kept examples as text.

    Args:
      folder: the folder `memory` of the run.
      task: which examples are kept.
      kept: numbers of the examples to read.
    """
    lines = (folder / file_names(task)[1]).read_text(encoding="utf-8").split("\n")
    rows = {row.pop("example"): row for row in map(json.loads, filter(None, lines))}
    return [rows[number] for number in kept]


def hash_of(path: Path, task: str) -> str:
    """Hash of a file.

    Args:
      path: the file.
      task: name of the task whose examples it holds, for messages.

    Raises:
      UserError: it is missing or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it holds what is remembered of task {task}; {_REMEDY}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
