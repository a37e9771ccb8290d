"""Matches tensors of a checkpoint with parameters; finds missing and unexpected tensors and wrong shapes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.lora import is_adapter
from jaxcl.models.soft_tokens import is_soft
from jaxcl.weights.axes import Index
from jaxcl.weights.source import Source
from jaxcl.weights.tables import Row, Table

_HEAD, _CLASSIFIER = "head/", "classifier/"
_LISTED = 8
_log = logging.getLogger(__name__)


class Names(Protocol):
    """The tensors of a checkpoint, before any is read."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...


class Match(NamedTuple):
    """A parameter and the tensors that fill it.

    Attributes:
      row: name and layout.
      names: one tensor, or one per layer that has one (see `Row.first`), or of each of these one per expert.
      start: where it begins along the row's axis `along`; not 0 only in tensors that hold several parameters.
    """

    row: Row
    names: tuple[str, ...]
    start: int = 0

    def read(self, source: Source, name: str, index: Index) -> np.ndarray:
        """Part of one of the tensors, counted from where the parameter begins."""
        if not self.start:
            return source.read(name, index)
        cuts, along = list(index), self.row.along
        cuts[along] = slice(cuts[along].start + self.start, cuts[along].stop + self.start)
        return source.read(name, tuple(cuts))


class Plan(NamedTuple):
    """Which params are read and which are randomly initialised.

    Attributes:
      matches: the tensors by path of the parameter.
      fresh: paths of params of heads, adapters and soft tokens that the checkpoint lacks.
      twins: pairs of tensors that must hold the same values.
    """

    matches: dict[str, Match]
    fresh: tuple[str, ...]
    twins: tuple[tuple[str, str], ...]

    def tell(self, where: str) -> None:
        """Logs in one line what is read and what is not."""
        more = len(self.fresh) - _LISTED
        listed = ", ".join(self.fresh[:_LISTED]) + (f" and {more} more" if more > 0 else "")
        # A head that starts at random is worth a warning; adapters and soft tokens always do.
        surprising = any(path.startswith((_HEAD, _CLASSIFIER)) for path in self.fresh)
        _log.log(
            logging.WARNING if surprising else logging.INFO,
            "%s: %d params read; randomly initialised: %s",
            where,
            len(self.matches),
            listed or "none",
        )


def match(source: Names, table: Table, shapes: Mapping[str, Any], *, draw: bool, fresh_head: bool = False) -> Plan:
    """Assigns every tensor of a checkpoint to a parameter.

    Args:
      source: the checkpoint.
      table: its names and layouts.
      shapes: objects with a `shape` by path of the parameter.
      draw: whether params of classifiers, adapters and soft tokens may be missing in the checkpoint.
      fresh_head: whether those of the head that predicts tokens may be missing, too.

    Raises:
      UserError: a tensor is missing, unexpected or of a wrong shape; the message names it.
    """
    present = {table.modern(name): name for name in source.shapes}
    table = table.as_in(present)
    prefixed = any(name.startswith(table.prefix) for name in present)
    own = {name for path in shapes for name in _names(table.row(path), table, prefixed)}
    twins = _twins(table, present, own, prefixed)
    used: set[str] = {name for _, name in twins}
    matches: dict[str, Match] = {}
    missing: dict[str, str] = {}
    for path, leaf in shapes.items():
        row = table.row(path)
        names = _names(row, table, prefixed, leaf.shape[: row.lead])
        used.update(names)
        if lost := [name for name in names if name not in present]:
            missing[path] = lost[0]
        else:
            before = row.together[: row.together.index(path)] if row.together else ()
            start = sum(_source_shape(table.row(one), shapes[one])[row.along] for one in before)
            matches[path] = Match(row, tuple(present[name] for name in names), start)
    drawn = (_HEAD, _CLASSIFIER) if fresh_head or not draw else (_CLASSIFIER,)
    fresh = tuple(path for path in missing if path.startswith(drawn) or is_adapter(path) or is_soft(path))
    _check_missing(source, missing, fresh, draw)
    _check_extra(source, table, [name for name in present if name not in used], prefixed)
    _check_shapes(source, table, matches, shapes)
    both = tuple((present[one], present[other]) for one, other in twins if present[one] != present[other])
    plan = Plan(matches, fresh, both)
    plan.tell(source.where)
    return plan


def _twins(table: Table, present: dict[str, str], own: set[str], prefixed: bool) -> list[tuple[str, str]]:
    """The table's twins that are present and not params of their own; where the first is missing, the second serves."""
    found = []
    for first, second in table.twins:
        first = first if prefixed else first.removeprefix(table.prefix)
        if second in present and second not in own:
            present.setdefault(first, present[second])
            found.append((first, second))
    return found


def _names(row: Row, table: Table, prefixed: bool, sizes: Sequence[int] = ()) -> tuple[str, ...]:
    own = row if prefixed else row._replace(name=row.name.removeprefix(table.prefix))
    return own.names(sizes)


def _check_missing(source: Names, missing: dict[str, str], fresh: Iterable[str], draw: bool) -> None:
    body = [name for path, name in missing.items() if path not in fresh and not path.startswith(_HEAD)]
    if body:
        raise UserError(f"{source.where}: the tensor {body[0]} is missing{_more(body)}")
    head = [name for path, name in missing.items() if path not in fresh]
    if head:
        raise UserError(
            f"{source.where}: the tensor {head[0]} is missing{_more(head)}: the checkpoint lacks a head that the model "
            "has; to train one that starts at random, set fresh_head to true"
            + ("; if the head is the embedding, model.tie_embeddings" if "head/kernel" in missing else "")
        )
    drawable = list(missing.values())
    if drawable and not draw:
        first = next(iter(missing))
        part = "an adapter" if is_adapter(first) else "the soft tokens" if is_soft(first) else "a head"
        raise UserError(
            f"{source.where}: the tensor {drawable[0]} is missing{_more(drawable)}: the checkpoint lacks {part} that "
            "the model has (load_params initialises it randomly if given a key)"
        )


def _check_extra(source: Names, table: Table, extra: list[str], prefixed: bool) -> None:
    unknown = []
    heads = {
        name for row in table.rows if row.path.startswith((_HEAD, _CLASSIFIER)) for name in _names(row, table, prefixed)
    }
    for name in sorted(extra):
        if name in heads:
            _log.info("%s: %s belongs to a head that the model does not have: ignored", source.where, name)
        elif not table.ignores(name):
            unknown.append(name)
    if unknown:
        raise UserError(f"{source.where}: the model has no parameter for the tensor {unknown[0]}{_more(unknown)}")


def _source_shape(row: Row, leaf: Any) -> tuple[int, ...]:
    """The shape that a parameter takes in its tensor."""
    return row.layout.source_shape(leaf.shape[row.lead :])


def _check_shapes(source: Names, table: Table, matches: Mapping[str, Match], shapes: Mapping[str, Any]) -> None:
    for path, (row, names, _) in matches.items():
        parts = [_source_shape(table.row(one), shapes[one]) for one in row.together or (path,)]
        expected = list(parts[0])
        expected[row.along] = sum(part[row.along] for part in parts)
        for name in names:
            if source.shapes[name] != tuple(expected):
                raise UserError(
                    f"{source.where}: the tensor {name} has shape {list(source.shapes[name])}; the model's {path} "
                    f"needs {expected}"
                )


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
