"""Task sources: from `scheme:rest` to rows of text, whatever the storage format."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxcl.data.cache import Cache
from jaxcl.data.embedded import Embedded
from jaxcl.data.formats.base import ListRecords, Record, Records
from jaxcl.data.formats.find import SCHEMES, find_records
from jaxcl.data.hubs import hub_records, read_hf, read_tfds
from jaxcl.data.messages import has_conversation
from jaxcl.data.opening import RowReader, divide, held_out, limited, open_splits, read_rows
from jaxcl.data.repeats import without_repeats
from jaxcl.data.spec import EndTaskSpec, GeneralSpec, Kind, SourceSpec, TaskSpec
from jaxcl.data.split import JoinedRows, ListRows, Rows
from jaxcl.data.values import class_names, same_class
from jaxcl.errors import UserError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class TaskData:
    """The rows of a task.

    Attributes:
      name: name of the task.
      kind: `pairs`: rows have `prompt` and `answer`; `chat`: the same, and the prompt is a JSON list of the messages
        before the last answer; `text`: rows have `text`; `labelled`: rows have `text`, `label` and optionally `pair`.
      train: training rows, never empty.
      dev: development rows; may be empty.
      test: test rows, never empty.
      labels: class names of a labelled task, sorted unless the source gives an order.
      where: file or name that the rows of each split come from, for messages.
      mixed: the sources of a mixture, whose rows are the task's, one source after another; else empty.
    """

    name: str
    kind: Kind
    train: Rows
    dev: Rows
    test: Rows
    labels: tuple[str, ...] = ()
    where: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    mixed: tuple[TaskData, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether the rows have a prompt and an answer."""
        return self.kind in ("pairs", "chat")


class Raw(NamedTuple):
    """What a scheme finds.

    Attributes:
      splits: records by split.
      where: where each split came from.
      labels: class names that the source orders.
      images: field that holds images, of a source that has one whatever the configuration says.
    """

    splits: dict[str, Records]
    where: dict[str, str]
    labels: tuple[str, ...] = ()
    images: str | None = None


def source_kind(spec: SourceSpec) -> Kind | None:
    """The kind of a source's rows where its name says it; reads nothing.

    Returns:
      The kind; none for the schemes whose records can be of any kind: json, jsonl, tfds and hf.

    Raises:
      UserError: there is no such embedded source.

    >>> source_kind(SourceSpec(source="stdlib:python_topics"))
    'text'
    """
    if isinstance(spec, TaskSpec) and spec.mix:
        return next(filter(None, map(source_kind, spec.mix)), None)
    scheme, _, rest = spec.source.partition(":")
    if scheme == "stdlib":
        from jaxcl.data.stdlib import stdlib_kind

        return stdlib_kind(rest)
    if scheme == "drawn":
        return "pairs"
    return "text" if scheme == "text" else None


def expected_kind(spec: TaskSpec | GeneralSpec) -> Kind:
    """The kind that a task's rows have as far as can be said without reading them.

    Where neither the task's section nor its source's name says it, a task with an end task is taken for text, and any
    other for prompts and answers.

    Raises:
      UserError: there is no such embedded source.

    >>> expected_kind(TaskSpec(name="x", source="json:x"))
    'pairs'
    """
    if kind := spec.kind or source_kind(spec):
        return kind
    ended = isinstance(spec, TaskSpec) and spec.end_task is not None
    return "pairs" if spec.prompt_template or not ended else "text"


def load_task(spec: TaskSpec, seed: int = 0, cache: Cache | None = None, *, deduplicate: bool = False) -> TaskData:
    """Opens a task of the sequence.

    Args:
      spec: the task's section of the configuration.
      seed: seed of held-out splits and of the choice of rows under the limits `train`, `dev` and `test`.
      cache: with a cache, the rows of files are read whenever they are needed, and what had to be counted is
        remembered; without, all rows are read into memory.
      deduplicate: leave out training rows that repeat an earlier one, see `without_repeats`.

    Raises:
      UserError: the source is unknown, cannot be read, is empty, or lacks a field; or the sources of a mixture have
        rows of different kinds.
    """
    if spec.mix:
        return _load_mix(spec, seed, cache, deduplicate)
    return _load(spec, spec.name, spec.kind, spec.prompt_template, seed, cache, deduplicate)


def load_general(
    spec: GeneralSpec, seed: int = 0, cache: Cache | None = None, *, deduplicate: bool = False
) -> TaskData:
    """Opens the general rows that all tasks are mixed with; see `load_task`.

    Args:
      spec: the section of the configuration.
      seed: see `load_task`.
      cache: see `load_task`.
      deduplicate: see `load_task`.
    """
    with _named("data.general"):
        return _load(spec, "general", spec.kind, spec.prompt_template, seed, cache, deduplicate)


def load_end_task(spec: EndTaskSpec, name: str, seed: int = 0) -> TaskData:
    """Reads the labelled task that belongs to the text domain `name`; see `load_task`.

    Args:
      spec: the end task's section of the configuration.
      name: name of the text domain.
      seed: see `load_task`.
    """
    return _load(spec, spec.name or name, "labelled", None, seed)


def load_source(source: str, *, seed: int = 0, **options: Any) -> TaskData:
    """Reads a task, given its source alone.

    Args:
      source: `scheme:rest`.
      seed: see `load_task`.
      **options: further fields of `TaskSpec`; the default of `name` is the last part of the source.

    Raises:
      UserError: see `load_task`.

    >>> task = load_source("stdlib:unicode_bidi", train=100)
    >>> task.kind, len(task.train)
    ('pairs', 100)
    """
    name = options.pop("name", None) or re.split(r"[:/\\]", source.rstrip(":/\\"))[-1] or "task"
    return load_task(TaskSpec(name=name, source=source, **options), seed)


def _load_mix(spec: TaskSpec, seed: int, cache: Cache | None, deduplicate: bool) -> TaskData:
    found: list[TaskData] = []
    for one in spec.mix:
        name, template = f"{spec.name}: {one.name or one.source}", one.prompt_template
        with _named(f"task {name}"):
            found.append(_load(one, name, spec.kind, template, seed, cache, deduplicate))
        if found[-1].kind != found[0].kind:
            raise UserError(
                f"task {name}: its rows are {found[-1].kind}, those of {found[0].name} are {found[0].kind}; the "
                "sources of a task are of one kind"
            )
    train, dev, test = (JoinedRows([getattr(one, split) for one in found]) for split in SPLITS)
    where = {split: ", ".join(one.where[split] for one in found) for split in SPLITS}
    return TaskData(spec.name, found[0].kind, train, dev, test, where=where, mixed=tuple(found))


@contextlib.contextmanager
def _named(words: str) -> Iterator[None]:
    """Lets a message begin with what in the configuration it is about."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"^task [^:]*: ", "", str(error)) if words.startswith("data.") else str(error)
        raise UserError(text if text.startswith(words) else f"{words}: {text}", exit_code=error.exit_code) from error


def _load(
    spec: SourceSpec,
    name: str,
    kind: Kind | None,
    template: str | None,
    seed: int,
    cache: Cache | None = None,
    deduplicate: bool = False,
) -> TaskData:
    raw = _read(spec)
    first = next(filter(None, map(_first, raw.splits.values())), None)
    if first is None:
        raise UserError(f"task {name}: {spec.source} is empty")
    found, names = _needed(spec, name, kind or source_kind(spec), template, first, raw.where)
    if spec.image_field is not None and found not in ("pairs", "chat"):
        raise UserError(
            f"task {name}: image_field is for prompts and conversations; the rows of {spec.source} are {found}"
        )
    reader = RowReader(found, names, template, spec.image_field or raw.images, spec.image_folder)
    read: dict[str, ListRows] = {}
    opened: dict[str, Rows] = {}
    for given, records in raw.splits.items():
        if cache is None or reader.kind == "labelled" or isinstance(records, ListRecords):
            read[given] = read_rows(records, reader)
        else:
            held = held_out(given, raw.splits)
            opened |= open_splits(records, reader, given, held, spec.heldout, seed, cache)
    labels = _labels(raw, read, spec.source) if reader.kind == "labelled" else ()
    for given, rows in read.items():
        opened |= divide(rows, given, held_out(given, raw.splits), spec.heldout, seed)
    for split in ("train", "test"):
        if not opened.get(split):
            raise UserError(f"task {name}: {raw.where.get(split, spec.source)} has no {split} rows")
    if deduplicate:
        opened["train"] = without_repeats(opened["train"], cache)
    limits = {"train": spec.train, "dev": spec.dev, "test": spec.test}
    chosen = {split: limited(opened.get(split, ListRows()), limits[split], seed, cache) for split in SPLITS}
    # A split that the source lacks is held out from the training rows.
    where = {split: raw.where.get(split, raw.where.get("train", spec.source)) for split in SPLITS}
    return TaskData(name, reader.kind, chosen["train"], chosen["dev"], chosen["test"], labels, where)


def _first(records: Records) -> Record | None:
    for part in records.parts():
        for _, record in records.read(part):
            return record
    return None


def _labels(raw: Raw, found: Mapping[str, Rows], source: str) -> tuple[str, ...]:
    """Class names: the source's, or all that occur; rows of a class that only the evaluation has count as wrong.

    Rows get the class's name as their label, however they spell it.
    """
    names = class_names((row["label"] for rows in found.values() for row in rows), raw.labels, source)
    for split, rows in found.items():
        for number, row in enumerate(rows, 1):
            where = f"{raw.where.get(split, source)} row {number}"
            if not row["label"].strip():
                raise UserError(f"{where}: the label is empty; expected a class")
            if same_class(row["label"]) not in names:
                raise UserError(f"{where}: label {row['label']!r} is not one of {', '.join(names.values())}")
            row["label"] = names[same_class(row["label"])]
    return tuple(names.values())


def _read(spec: SourceSpec) -> Raw:
    scheme, colon, rest = spec.source.partition(":")
    reader = _SCHEMES.get(scheme) if colon else None
    if reader is None or not rest:
        near = difflib.get_close_matches(scheme, _SCHEMES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"source {spec.source!r}: expected `scheme:rest` with scheme one of {', '.join(_SCHEMES)}; "
            f"nearest is {near}:{rest or '...'}"
        )
    return reader(rest, spec)


# ---------------------------------------------------------------- schemes


def _read_files(scheme: str) -> Callable[[str, SourceSpec], Raw]:
    def reader(rest: str, spec: SourceSpec) -> Raw:
        splits, labels = find_records(scheme, rest, text_field=spec.text_field)
        where = {split: records.where for split, records in splits.items()}
        return Raw(splits, dict.fromkeys(SPLITS, where["all"]) | where if "all" in where else where, labels)

    return reader


def _read_stdlib(rest: str, spec: SourceSpec) -> Raw:
    from jaxcl.data.stdlib import read_stdlib

    return _embedded(read_stdlib(rest), spec)


def _read_drawn(rest: str, spec: SourceSpec) -> Raw:
    from jaxcl.data.drawn import read_drawn

    return _embedded(read_drawn(rest), spec)._replace(images=spec.image_field or "image")


def _embedded(found: Embedded, spec: SourceSpec) -> Raw:
    # The embedded sources have fixed field names: rename them to those that the user configured.
    rename = {
        "prompt": spec.prompt_field,
        "answer": spec.answer_field,
        "text": spec.text_field,
        "label": spec.label_field,
        "image": spec.image_field or "image",
    }
    splits: dict[str, Records] = {
        split: ListRecords([{rename[k]: value for k, value in row.items()} for row in rows], spec.source)
        for split, rows in found.splits.items()
    }
    return Raw(splits, dict.fromkeys((*SPLITS, "all"), spec.source), found.labels)


def _read_hub(read: Callable[..., Any], scheme: str) -> Callable[[str, SourceSpec], Raw]:
    def reader(rest: str, spec: SourceSpec) -> Raw:
        splits, labels = read(rest, spec.data_dir, spec.label_field)
        names = {"train": "train", "dev": "validation", "test": "test"}
        kept = {split: splits[name] for split, name in names.items() if name in splits}
        if "dev" not in kept and "dev" in splits:
            kept["dev"] = splits["dev"]
        if "train" not in kept:
            raise UserError(f"source {scheme}:{rest}: no split called train; splits: {', '.join(splits) or 'none'}")
        where = {split: f"{scheme}:{rest} {names[split]}" for split in SPLITS}
        return Raw({split: hub_records(rows, where[split]) for split, rows in kept.items()}, where, labels)

    return reader


_SCHEMES: dict[str, Callable[[str, SourceSpec], Raw]] = {
    **{scheme: _read_files(scheme) for scheme in SCHEMES},
    "tfds": _read_hub(read_tfds, "tfds"),
    "hf": _read_hub(read_hf, "hf"),
    "stdlib": _read_stdlib,
    "drawn": _read_drawn,
}


# ---------------------------------------------------------------- records to rows


def _needed(
    spec: SourceSpec, name: str, kind: Kind | None, template: str | None, sample: Record, where: dict[str, str]
) -> tuple[Kind, dict[str, str]]:
    """The kind, and the fields that a row of it needs; an unknown kind is inferred from the fields of a record."""
    pairs = {"answer": spec.answer_field} | ({} if template else {"prompt": spec.prompt_field})
    labelled = {"text": spec.text_field, "label": spec.label_field}
    labelled |= {"pair": spec.pair_field} if spec.pair_field else {}
    needs: dict[Kind, dict[str, str]] = {"pairs": pairs, "labelled": labelled, "text": {"text": spec.text_field}}
    if kind is None and template:
        kind = "pairs"
    if kind is None:
        fitting = [one for one, fields in needs.items() if all(field in sample for field in fields.values())]
        if "pairs" not in fitting and has_conversation(sample):
            fitting = ["chat"]
        kind = next(iter(fitting), None)
    if kind is None:
        raise UserError(
            f"task {name}: {next(iter(where.values()), spec.source)} row 1 has the fields {_listed(sample)}; expected "
            f"{spec.prompt_field} and {spec.answer_field}, or {spec.text_field} (and {spec.label_field}), or a "
            "conversation; set prompt_field, answer_field, text_field or label_field to use other names"
        )
    return kind, needs.get(kind, {})


# ---------------------------------------------------------------- helpers


def _listed(record: Record) -> str:
    return ", ".join(map(str, record)) or "none"


__all__ = [
    "SPLITS",
    "Raw",
    "TaskData",
    "expected_kind",
    "load_end_task",
    "load_general",
    "load_source",
    "load_task",
    "source_kind",
]
