"""The folder of a run: its files, and the check that it belongs to a configuration."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxcl.config import ExperimentConfig
from jaxcl.config.file import ConfigError, dump_yaml, read_yaml, validate
from jaxcl.config.trust import check_trust, named_code
from jaxcl.data.files import reason, replacing
from jaxcl.errors import UserError

MIRROR = ".mirror.json"
"""The file that says of which URL a folder is a copy, and of which of its states; see `jaxcl.run.remote`."""

# Seconds after which a report that is still being written is taken for that of a killed process.
_LONGEST_REPORT = 3600.0
# Keys that may change when a run is resumed: they do not affect results.
_FREE_KEYS = (
    "output",
    "local_output",
    "data_root",  # the same data at another place: compared by content, see jaxcl.run.fingerprints
    "data.cache",
    "training.log_every",
    "training.sinks",
    "training.checkpoint_every",
    "training.keep",
    "training.keep_tasks",
    "training.prefetch",
    "training.profile",
)


class RunFolder:
    """Paths of a run folder, and a lock against a second run in it.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an existing run.

        Raises:
          UserError: it is not a run folder.
        """
        folder = cls(path)
        if not folder.is_run:
            raise UserError(f"{path}: not a run folder (no config.yaml)")
        return folder

    @property
    def is_run(self) -> bool:
        """Whether the folder contains a run."""
        return self.config_file.is_file()

    def content(self, *, trust: bool = False) -> dict[str, Any]:
        """The run's configuration as plain values, with the current path of the folder as its output.

        Args:
          trust: whether it may name code outside jaxcl; see `jaxcl.config.trust`.

        Raises:
          UserError: it cannot be read, or names such code and is not trusted.
        """
        content = read_yaml(self.config_file)
        check_trust(content, str(self.config_file), trust=trust)
        return {**content, "output": str(self.path), "local_output": None}

    config_file = property(lambda self: self.path / "config.yaml")
    report = property(lambda self: self.path / "report.html")
    results = property(lambda self: self.path / "results.json")
    tensorboard = property(lambda self: self.path / "tensorboard")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    not_finite = property(lambda self: self.path / "not_finite.json")
    predictions = property(lambda self: self.path / "predictions")
    thumbnails = property(lambda self: self.path / "thumbnails")
    importance = property(lambda self: self.path / "importance")
    checkpoints = property(lambda self: self.path / "checkpoints")
    rounds = property(lambda self: self.path / "rounds.jsonl")
    tokenizer = property(lambda self: self.path / "tokenizer")
    memory = property(lambda self: self.path / "memory.json")
    mirror = property(lambda self: self.path / MIRROR)
    examples = property(lambda self: self.path / "memory")
    teacher = property(lambda self: self.path / "teacher")
    halfway = property(lambda self: self.path / "halfway")

    def store(self, task: int, process: int) -> Path:
        """The file of one process's stored signals of a task's remembered rows.

        Args:
          task: number of the task.
          process: number of the process.
        """
        return self.teacher / f"task{task:02d}_process{process:03d}.array_record"

    def stores(self, task: int | None = None) -> list[Path]:
        """The files of all processes, for one task or for all."""
        which = "*" if task is None else f"{task:02d}"
        return sorted(self.teacher.glob(f"task{which}_process*.array_record"))

    def claim(self, resolved: Mapping[str, Any]) -> None:
        """Creates the folder for a configuration, or checks that it already belongs to it.

        Args:
          resolved: the whole configuration as plain values; written to `config.yaml` in a new folder.

        Raises:
          UserError: the folder contains other files, a run of another configuration, or a run in progress.
        """
        if self.path.is_file():
            raise UserError(f"output {self.path}: is a file; name a folder")
        if self.path.is_dir() and not self.is_run and not all(_is_ours(path.name) for path in self.path.iterdir()):
            raise UserError(
                f"output {self.path}: contains files but no run (no config.yaml); name an empty or new folder"
            )
        self.lock()
        if self.is_run:
            self._check_same(resolved)
        self._remove_temporaries()
        if self.is_run:
            return
        self.describe(resolved)
        for folder in (self.predictions, self.importance):
            folder.mkdir(exist_ok=True)

    def _remove_temporaries(self) -> None:
        """Removes what killed processes of this run were writing (`replacing`).

        Nobody else writes these files, except that another program may be writing a report at this moment: it is taken
        for dead after an hour.
        """
        named = (self.tokenizer, self.examples, self.predictions, self.thumbnails, self.importance, self.halfway)
        for path in itertools.chain.from_iterable(folder.glob(".*.tmp") for folder in (self.path, *named)):
            with contextlib.suppress(FileNotFoundError):  # the report has just been finished
                recent = time.time() - path.stat().st_mtime < _LONGEST_REPORT
                if not (recent and path.name.startswith(f".{self.report.name}.")):
                    path.unlink()

    def describe(self, resolved: Mapping[str, Any]) -> None:
        """Writes `config.yaml`, atomically."""
        with replacing(self.config_file) as temporary:
            temporary.write_text(dump_yaml(resolved), encoding="utf-8")

    def release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def lock(self) -> None:
        """Creates the folder and locks it; does nothing if this object holds the lock.

        Raises:
          UserError: another process holds it, or it cannot be opened.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        place = self.path / ".lock"
        try:
            # Not through a link, whose target would be opened; held for the life of the run.
            self._lock = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise UserError(f"{place}: cannot be opened: {reason(error)}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f"output {self.path}: another process is running here; name another folder") from None
        self._lock.truncate(0)
        self._lock.write(uuid.uuid4().hex)
        self._lock.flush()

    @property
    def token(self) -> str:
        """What the process that holds the lock wrote into it, by which others know that they see the same folder."""
        try:
            return (self.path / ".lock").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def _check_same(self, resolved: Mapping[str, Any]) -> None:
        content = read_yaml(self.config_file)
        # Completing it would import what it names.
        known = {module for _, _, module in named_code(resolved)}
        if {module for _, _, module in named_code(content)} <= known:
            content = _completed(content)
        stored = dict(flatten(content))
        wanted = dict(flatten(resolved))
        for key in sorted(stored.keys() | wanted.keys()):
            before, now = stored.get(key), wanted.get(key)
            if before != now and not within(key, _FREE_KEYS):
                raise UserError(
                    f"output {self.path}: contains a run with {key}={before!r}, this one has {now!r}; "
                    "name another output, or remove the folder to start again",
                    exit_code=2,
                )


def _is_ours(name: str) -> bool:
    """Whether a start that ended before there was a `config.yaml` leaves such a file."""
    return name.startswith((".lock", ".mirror", "..mirror")) or (
        name.startswith(".config.yaml.") and name.endswith(".tmp")
    )


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, with defaults for keys that were added later."""
    try:
        return validate(ExperimentConfig, content, "stored").plain()
    except ConfigError:  # edited by hand, or from an incompatible version: compared unchanged
        return content


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists by dotted key.

    >>> list(flatten({"tasks": [{"name": "a"}], "seed": 0}))
    [('tasks.0.name', 'a'), ('seed', 0)]
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, tree


def within(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of others, or in one of them.

    >>> within("model.lora.rank", ["model"]), within("models", ["model"])
    (True, False)
    """
    return any(f"{key}.".startswith(f"{section}.") for section in sections)
