"""Checkpoints of a run, written atomically in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxcl.errors import UserError
from jaxcl.sharding.processes import from_first, is_first
from jaxcl.training.checksums import Damaged, check_checksums, read_again, write_checksums
from jaxcl.training.kept import Kept
from jaxcl.training.orbax_noise import ignore_late_writes
from jaxcl.training.positions import ProcessJsonHandler, ProcessJsonRestore, ProcessJsonSave
from jaxcl.training.schedule import Clock
from jaxcl.training.state import TrainState

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("no space left", "quota exceeded", "file too large", "resource_exhausted")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint on disk.

    Attributes:
      number: its number, increasing with every save of the run.
      progress: the caller's note, as given to `Checkpoints.save`.
      mark: name of a checkpoint that is kept beyond the latest ones; `None` for the others.
    """

    number: int
    progress: dict[str, Any]
    mark: str | None = None


class Checkpoints:
    """The checkpoints of one run, numbered in the order they are saved.

    Each holds params, optimizer and method state, the position in the data of every process, and a JSON note of the
    run's progress. `save` copies the arrays to the host and returns; they are written while the training continues. A
    checkpoint appears under its number only when it is complete. Use this class as a context manager, or call `close`.

    All processes of a run have to call the same methods.
    """

    def __init__(self, folder: str | Path, *, keep: int = 1, keep_marked: int | None = None) -> None:
        """Opens the folder and creates it if absent; remains of interrupted saves are removed.

        Args:
          folder: folder of the checkpoints.
          keep: number of latest checkpoints kept.
          keep_marked: number of latest marked checkpoints kept in addition; `None` for all.

        Raises:
          UserError: the folder cannot be created or read.
        """
        ignore_late_writes()
        self.folder = Path(folder).absolute()
        self._kept = Kept(keep, keep_marked)
        self._damaged: dict[int, str] = {}
        self._whole: set[int] = set()
        self._saving = -1
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "state"):
            # Random bits hardly compress, and compressing takes processor time beside the training.
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers.add(item, ocp.args.PyTreeSave, arrays)
            handlers.add(item, ocp.args.PyTreeRestore, arrays)
        handlers.add("progress", ocp.args.JsonSave, ocp.handlers.JsonCheckpointHandler())
        handlers.add("progress", ocp.args.JsonRestore, ocp.handlers.JsonCheckpointHandler())
        handlers.add("data", ProcessJsonSave, ProcessJsonHandler())
        handlers.add("data", ProcessJsonRestore, ProcessJsonHandler())
        with self._reading():
            self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)
        for number in self._manager.all_steps():
            try:
                mark = self._read(number).mark
            except Damaged:  # must not keep the run from one that is whole
                continue
            if mark is not None:
                self._kept.marks[number] = mark

    @classmethod
    def reading(cls, folder: Path) -> Checkpoints:
        """The checkpoints of a run that is not training now; none of them is removed.

        Raises:
          UserError: there are no checkpoints.
        """
        if not folder.is_dir():
            raise UserError(f"{folder.parent}: the run has no checkpoint yet")
        return cls(folder, keep=sys.maxsize)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError:
            if value is None:  # a failed save must not hide the error that ended the run
                raise

    def latest(self) -> Saved | None:
        """The latest complete checkpoint; `None` if there is none.

        Raises:
          UserError: one of its files is not as it was written; names it.
        """
        self.wait()
        number = self._manager.latest_step()
        return None if number is None else self._checked(number)

    def notes(self) -> list[Saved]:
        """All checkpoints whose note can be read, oldest first, without comparing their files."""
        numbers = (number for number in sorted(self._manager.all_steps()) if number not in self._damaged)
        return [self._read(number) for number in numbers]

    def latest_whole(self) -> Saved | None:
        """The latest checkpoint without damage, to go on from; `None` if there are no checkpoints.

        Later ones, which are damaged, are removed, so that their numbers are free; process 0 prints a line about each.

        Raises:
          UserError: all are damaged, or one cannot be read; nothing is removed.
        """
        self.wait()
        reasons: dict[int, str] = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                saved = self._checked(number)
            except Damaged as error:
                reasons[number] = str(error)
                continue
            for damaged, reason in reasons.items():
                if is_first():
                    print(f"{reason}; removed, the run goes on from checkpoint {number}", file=sys.stderr)
                self._manager.delete(damaged)
                self._kept.marks.pop(damaged, None)
                self._damaged.pop(damaged, None)  # the next save has its number
            return saved
        if reasons:
            raise UserError(f"{reasons[max(reasons)]}; no earlier checkpoint is whole")
        return None

    def find(self, mark: str) -> Saved | None:
        """The latest checkpoint with this mark; `None` if there is none.

        Raises:
          UserError: one of its files is not as it was written; names it.
        """
        self.wait()
        numbers = [number for number in self._manager.all_steps() if self._kept.marks.get(number) == mark]
        return self._checked(max(numbers)) if numbers else None

    def go_back(self, number: int | None) -> None:
        """Removes the checkpoints that were saved after one.

        Args:
          number: the last one that stays; `None`: none does.
        """
        self.wait()
        for later in self._manager.all_steps():
            if number is None or later > number:
                self._manager.delete(later)
                self._kept.marks.pop(later, None)
                self._damaged.pop(later, None)
                self._whole.discard(later)

    def save(self, state: TrainState, *, progress: dict[str, Any], data: Any = None, mark: str | None = None) -> int:
        """Saves a state between two steps; waits only for the previous save.

        Args:
          state: the state; may be donated to a step as soon as this returns.
          progress: what the caller needs to resume, JSON-serialisable.
          data: this process's position in its data (`Feed.get_state`), JSON-serialisable.
          mark: name by which `find` finds this checkpoint; it is kept beyond the latest ones.

        Returns:
          The number of the checkpoint.

        Raises:
          UserError: the disk is full, or this or the previous checkpoint could not be written; earlier ones are intact.
        """
        self.wait()
        number = (self._manager.latest_step() if self._manager.all_steps() else -1) + 1
        self._kept.marks.pop(number, None)  # may remain from a failed save
        self._saving = number
        self._whole.discard(number)
        if mark is not None:
            self._kept.marks[number] = mark
        rest = _all_but_params(state)
        with self._writing():
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(state.params),
                    state=ocp.args.PyTreeSave(rest),
                    progress=ocp.args.JsonSave({"progress": progress, "mark": mark}),
                    data=ProcessJsonSave(data),
                ),
                force=True,
            )
        return number

    def restore(self, target: TrainState, saved: Saved) -> tuple[TrainState, Any]:
        """Reads a whole checkpoint.

        Args:
          target: shapes, dtypes and shardings (`Trainer.target`).
          saved: which checkpoint.

        Returns:
          The state with the target's shardings, and this process's position in its data.

        Raises:
          UserError: it cannot be read, or does not match the target.
        """
        rest = _all_but_params(target)
        with self._reading():
            restored = self._manager.restore(
                saved.number,
                args=ocp.args.Composite(
                    params=_like(target.params),
                    state=_like(rest),
                    data=ProcessJsonRestore(),
                ),
            )
        rest = {**restored["state"], "clock": Clock(**restored["state"]["clock"])}
        return TrainState(params=restored["params"], **rest), restored["data"]

    def params_and_moments(self, target: TrainState, saved: Saved) -> dict[str, PyTree]:
        """Reads what the optimizer works on: `params`, `opt_state` and `low_bits`.

        Args:
          target: shapes, dtypes and shardings (`Trainer.target`).
          saved: which checkpoint; may be of a run of fewer tasks.

        Raises:
          UserError: they cannot be read, or do not match the target.
        """
        wanted = {name: leaf for name, leaf in _all_but_params(target).items() if name in ("opt_state", "low_bits")}
        moments = _like(wanted, partial_restore=True)
        params = self.params(target.params, saved)
        with self._reading(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(self.folder / str(saved.number) / "state", args=moments)
        return {"low_bits": {}, **restored, "params": params}

    def params(self, target: PyTree, saved: Saved) -> PyTree:
        """Reads only the params of a checkpoint.

        Args:
          target: their shapes, dtypes and shardings (`Trainer.target.params`).
          saved: which checkpoint.

        Raises:
          UserError: they cannot be read, or do not match the target.
        """
        with self._reading():
            restored = self._manager.restore(saved.number, args=ocp.args.Composite(params=_like(target)))
        return restored["params"]

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then closes threads and files.

        Raises:
          UserError: the last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    def _seal(self) -> None:
        """Writes the checksums of the checkpoint that is being saved, just before it appears under its number."""
        if is_first():
            for folder in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                write_checksums(folder)

    def _checked(self, number: int) -> Saved:
        """A checkpoint's note, after its files have been compared with their checksums, once."""
        if number not in self._whole and number not in self._damaged:
            self._judge(number, check_checksums)
            self._whole.add(number)
        return self._read(number)

    def _read(self, number: int) -> Saved:
        content = self._judge(number, _read_note)
        return Saved(number, content["progress"], content["mark"])

    def _judge(self, number: int, look: Callable[[Path], Any]) -> Any:
        """What process 0 finds in a checkpoint; if it finds damage, all processes know and remember it.

        Args:
          number: of the checkpoint.
          look: looks into its folder; returns something JSON-serialisable.

        Raises:
          Damaged: it is damaged, now or in an earlier call.
          UserError: it cannot be read.
        """
        if number not in self._damaged:
            found = json.loads(from_first(lambda: json.dumps(_verdict(look, self.folder / str(number)))))
            if "damage" not in found:
                return found["content"]
            self._damaged[number] = f"checkpoint {number} cannot be used: {found['damage']}"
        raise Damaged(self._damaged[number])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            with contextlib.suppress(Exception):
                self._manager.reload()  # it no longer lists those that the failed one would have replaced
            reason = "the disk is full" if _is_full(error) else _first_line(error)
            raise UserError(
                f"checkpoints {self.folder}: could not be written: {reason}; earlier checkpoints are intact"
            ) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = _first_line(error)
            if "tree structures do not match" in reason:
                reason = "their state has another structure; Method.init has changed since they were written"
            raise UserError(f"checkpoints {self.folder}: cannot be read: {reason}") from error


def _verdict(look: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    try:
        return {"content": look(folder)}
    except Damaged as error:
        return {"damage": str(error)}


def _read_note(folder: Path) -> dict[str, Any]:
    """A checkpoint's `progress` and `mark`.

    Raises:
      Damaged: it has none that can be used.
      UserError: it cannot be read.
    """
    path = folder / "progress" / "metadata"
    content = read_again(path, Path.read_bytes)
    try:
        note = json.loads(content)
    except (ValueError, RecursionError):
        note = None
    if not (isinstance(note, dict) and isinstance(note.get("progress"), dict) and "mark" in note):
        raise Damaged(f"{path} is no usable note of the run's progress")
    return note


def _all_but_params(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds besides the params; low bits only if there are any."""
    fields = ("step", "opt_state", "method_state", *(["low_bits"] if state.low_bits else []))
    clock = {name: value for name, value in state.clock._asdict().items() if value is not None}
    return {"clock": clock, **{field: getattr(state, field) for field in fields}}


def _like(target: PyTree, *, partial_restore: bool = False) -> ocp.args.PyTreeRestore:
    """A request for arrays with the target's shapes, dtypes and shardings; all that are stored, unless partial."""
    arrays = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=arrays, partial_restore=partial_restore)


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        words = str(error).lower()
        if getattr(error, "errno", None) in _FULL or any(word in words for word in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
