"""The note that every checkpoint of a run has of its progress: its form, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.schema import Schema
from jaxcl.training.checkpoint import Saved

FORMAT = 1
"""Number of the form that is written; notes from before there was one have none."""

Phase = Literal["training", "trained", "learned"]

# Fields of a server or client of federated training, which other readers do not need.
_FEDERATED = {"rounds", "rows", "agreed", "weights", "clients", "taken", "logged"}


class RowsNote(Schema):
    """Fingerprint of rows; see `RowsPrint`."""

    rows: int = Field(description="number of rows")
    ordered: str = Field(description="hash of the rows in their order")
    content: str = Field(description="hash that does not depend on their order")


class PrintsNote(Schema):
    """What `take_fingerprints` returns."""

    tasks: dict[str, dict[str, RowsNote]] = Field(description="of each task's splits")
    end_tasks: dict[str, dict[str, RowsNote]] = Field({}, description="of each end task's splits")
    general: dict[str, dict[str, RowsNote]] = Field({}, description="of the general rows")
    tokenizer: str = Field(description="of the tokenizer")
    chat: str | None = Field(None, description="of the chat template")
    weights: str | None = Field(None, description="of the weights")


class WatchNote(Schema):
    """What `Watch.plain` returns."""

    model_config = ConfigDict(allow_inf_nan=True)

    skipped: int = Field(0, description="steps that changed nothing")
    streak: int = Field(0, description="how many of them were the last ones")
    spikes: list[int] = Field([], description="steps whose loss was a spike")
    left: list[list[int]] = Field([], description="for each return to a checkpoint, its step and the one that was left")
    losses: dict[str, list[float]] = Field({}, description="the last losses by kind of batch")


class Note(Schema):
    """A run's progress at a checkpoint."""

    format: int = Field(0, description="number of the note's form")
    task: int = Field(ge=-1, description="index of the task that the checkpoint is in or after; -1: before the first")
    phase: Phase = Field(
        description="within the task's steps, after the last one, or after what the method makes of the task"
    )
    tasks: int | None = Field(None, description="number of tasks of the run")
    timing: dict[str, float] = Field({}, description="seconds so far, by part")
    fingerprints: PrintsNote = Field(description="of what the run depends on outside its checkpoints")
    memory: dict[str, str] = Field(description="hash of what is remembered of each task, by its number")
    stores: dict[str, dict[str, str]] | None = Field(
        None, description="digest of each teacher store's file by its name, by task; none: not known then"
    )
    results: Results | None = Field(None, description="the results so far")
    logged_steps: int | None = Field(None, description="steps that metrics.jsonl has rows of; none: not known then")
    watch: WatchNote | None = Field(None, description="what was watched in the task's training")


class ServerNote(Note):
    """What the server of federated training notes."""

    rounds: int = Field(description="rounds of the task so far; 0: it is learned")
    rows: int = Field(description="rows of rounds.jsonl")
    agreed: bool = Field(description="whether the clients know something together in this task")
    weights: list[tuple[int, float]] = Field(description="weights of the clients that have begun the task")
    clients: list[tuple[int, int]] = Field(description="number of each client's checkpoint")
    taken: list[tuple[int, int]] = Field(description="rounds that each client was in")


class ClientNote(Note):
    """What a client of federated training notes."""

    logged: int = Field(description="step of the run up to which it has logged")


NoteT = TypeVar("NoteT", bound=Note)


def read_note(saved: Saved, kind: type[NoteT]) -> NoteT:
    """The note of a checkpoint.

    Args:
      saved: the checkpoint.
      kind: whose note it has to be.

    Raises:
      UserError: it has another form than this version of jaxcl writes or knows from earlier ones; names the field.
    """
    others = _FEDERATED - kind.model_fields.keys()
    content = {name: value for name, value in saved.progress.items() if name not in others}
    form = content.get("format", 0)
    if isinstance(form, int) and form > FORMAT:
        raise _unreadable(saved, f"has format {form}, this version of jaxcl reads up to {FORMAT}")
    try:
        note = kind.model_validate(content)
        if note.results is not None:
            note.results.check_matrices()
        return note
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unreadable(saved, f"has another form: {where + ': ' if where else ''}{first['msg']}") from None
    except ValueError as error:
        raise _unreadable(saved, f"has another form: results.matrix: {error}") from None


def note_of(saved: Saved) -> Note:
    """`read_note` for what the notes of all kinds of runs have."""
    return read_note(saved, Note)


def known_prints(saved: Saved) -> Mapping[str, Any]:
    """The fingerprints in a checkpoint's note, as plain values."""
    return note_of(saved).fingerprints.model_dump()


def _unreadable(saved: Saved, words: str) -> UserError:
    what = f"checkpoint {saved.number}: its note of the run's progress"
    return UserError(f"{what} {words}; go on with the version of jaxcl that wrote it")
