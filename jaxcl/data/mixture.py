"""A task of several sources with weights: its encoded examples, and its training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxcl.data.pipeline import Pipeline
from jaxcl.data.plan import Plan, Shape, plan_epoch
from jaxcl.data.rows import EncodedRows, HostBatch, Noise, RowFields
from jaxcl.data.shares import Shares, exactly
from jaxcl.data.spec import DataConfig

#: Batches within which the shares hold if batches have several lengths; with one length, they hold in every batch.
WINDOW = 32


class MixedRows(EncodedRows):
    """The encoded examples of several sources of one task, one source after another.

    Attributes:
      sources: the examples of each source, all of the same group.
      weights: weight of each source.
      by: what the weights are shares of.
      shares: share of each source in the rows of batches.
    """

    def __init__(
        self, sources: Sequence[EncodedRows], weights: Sequence[float], by: Literal["tokens", "rows"], *, name: str
    ) -> None:
        """Joins sources.

        Args:
          sources: the examples of each source, all of the same group and task; none is empty.
          weights: weight of each source, above 0.
          by: what the weights are shares of: tokens, or examples.
          name: name of the task.
        """
        self.sources = list(sources)
        self.weights = list(weights)
        self.by = by
        self.name = name
        self.group = self.sources[0].group
        self.task = self.sources[0].task
        sizes = [Fraction(rows.total if by == "tokens" else rows.units, len(rows)) for rows in self.sources]
        self.shares = Shares([exactly(weight) / size for weight, size in zip(self.weights, sizes, strict=True)]).shares
        self.starts = np.concatenate([[0], np.cumsum([len(rows) for rows in self.sources], dtype=np.int64)])

    def changed(self, change: Callable[[EncodedRows], EncodedRows]) -> MixedRows:
        """The same mixture of other rows of each source."""
        return MixedRows([change(rows) for rows in self.sources], self.weights, self.by, name=self.name)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def epoch(self) -> Fraction:
        """Rows in an epoch: the source with the largest weight is seen once; of several, that with the most rows."""
        heaviest = max(range(len(self.sources)), key=lambda one: (self.weights[one], len(self.sources[one])))
        return len(self.sources[heaviest]) / self.shares[heaviest]

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Those of all sources."""
        return np.concatenate([rows.sizes for rows in self.sources])

    @property
    def total(self) -> int:
        """Tokens of all examples."""
        return sum(rows.total for rows in self.sources)

    @property
    def units(self) -> int:
        """See `EncodedRows.units`."""
        return sum(rows.units for rows in self.sources)

    def leaves(self) -> list[EncodedRows]:
        """The examples of each source."""
        return [leaf for rows in self.sources for leaf in rows.leaves()]

    def smallest(self, shapes: Sequence[Shape]) -> Int[np.ndarray, " examples"]:
        """See `EncodedRows.smallest`."""
        return np.concatenate([rows.smallest(shapes) for rows in self.sources])

    def shapes(self, others: Sequence[Any]) -> list[Shape]:
        """See `EncodedRows.shapes`."""
        first, *rest = self.leaves()
        return first.shapes([*rest, *(leaf for other in others for leaf in other.leaves())])

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """The row of an example of one of the sources, see `EncodedRows.row`."""
        source = int(np.searchsorted(self.starts, max(index, 0), side="right")) - 1
        return self.sources[source].row(index - int(self.starts[source]) if index >= 0 else -1, shape, noise)

    def describe(self) -> dict[str, Any]:
        """Counts of all sources together, and by source with its share of the rows of batches."""
        found = {rows.name: rows.describe() for rows in self.sources}
        names = dict.fromkeys(name for counts in found.values() for name in counts)
        together = {name: [counts.get(name, 0) for counts in found.values()] for name in names}
        mix = {
            name: {"weight": weight, "row_share": round(float(share), 4), **counts}
            for (name, counts), weight, share in zip(found.items(), self.weights, self.shares, strict=True)
        }
        return {name: sum(one) for name, one in together.items() if all(isinstance(i, int) for i in one)} | {"mix": mix}


class _Part(NamedTuple):
    """Examples that are passed through in epochs of their own: numbers `start` to `stop - 1`, `rows` per epoch."""

    start: int
    stop: int
    rows: Fraction


class _Lane(NamedTuple):
    """Parts whose rows share batches; `window` batches are planned together."""

    parts: list[_Part]
    shares: Shares
    window: int


class MixturePipeline(Pipeline):
    """Endless training batches of examples of which some are mixtures (`MixedRows`).

    Rows are counted through all batches. The source of each follows from `Shares`, and each source is passed through in
    shuffled epochs of its own. There are no filler rows. With one length of rows the shares hold in every batch, to the
    row. With several, `WINDOW` batches are planned together: their rows follow from the shares, and are put into
    batches by length. Rows that cannot share batches, such as text and pairs, take turns by steps, likewise in fixed
    shares.

    A task that is not a mixture has as many rows per epoch as it has examples; joint training on several tasks mixes
    them in these proportions.
    """

    def __init__(
        self,
        sources: Sequence[EncodedRows],
        batch_size: int,
        config: DataConfig,
        *,
        shapes: Sequence[Shape] | None = None,
        origin: str = "task",
    ) -> None:
        """See `Pipeline`."""
        super().__init__(sources, batch_size, config, shapes=shapes, origin=origin)
        by_group: dict[str, list[_Part]] = {}
        for rows, start in zip(self.sources, self._offsets.tolist(), strict=False):
            by_group.setdefault(rows.group, []).extend(_parts(rows, start))
        self._lanes = []
        for number, parts in enumerate(by_group.values()):
            window = 1 if self._groups.count(number) == 1 else WINDOW
            self._lanes.append(_Lane(parts, Shares([part.rows for part in parts]), window))
        counts = [sum((part.rows for part in lane.parts), Fraction(0)) for lane in self._lanes]
        steps = [-(-count // batch_size) for count in counts]
        self._turns = Shares([Fraction(count) for count in steps])
        self.steps_per_epoch = sum(steps)
        self._orders: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def tokens_per_step(self) -> Fraction:
        """See `Pipeline.tokens_per_step`; in the shares of the mixture."""
        rows = [leaf for one in self.sources for leaf in one.leaves()]
        parts = [part for lane in self._lanes for part in lane.parts]
        parts.sort(key=lambda part: part.start)
        tokens = sum(part.rows * Fraction(one.total, len(one)) for part, one in zip(parts, rows, strict=True))
        return Fraction(tokens) / self.steps_per_epoch

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> HostBatch:
        """See `Pipeline.batch_at`."""
        number, turn = self._turns.at(step)
        window, place = divmod(turn, self._lanes[number].window)
        return self._build(self._planned(seed, number, window), place, (seed, step), process_index, process_count)

    def once(
        self, limit: int | None = None, seed: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> Iterator[HostBatch]:
        """One pass, see `Pipeline.once`; with a limit and a seed, the examples are in the shares of the mixture."""
        if limit is None or seed is None or limit >= self.examples:
            yield from super().once(limit, seed, process_index, process_count)
            return
        parts = [part for lane in self._lanes for part in lane.parts]
        counts = Shares([part.rows for part in parts]).before(limit)
        wanted = [min(count, part.stop - part.start) for part, count in zip(parts, counts, strict=True)]
        chosen = [
            part.start + np.random.default_rng((seed, number)).permutation(part.stop - part.start)[:count]
            for number, (part, count) in enumerate(zip(parts, wanted, strict=True))
        ]
        yield from self._pass(np.sort(np.concatenate(chosen)), seed, process_index, process_count)

    def _planned(self, seed: int, number: int, window: int) -> Plan:
        """The batches of a window of a lane."""
        key = (seed, number, window)
        plan = self._plans.get(key)
        if plan is None:
            rows = self._rows_of(seed, number, window)
            plan = plan_epoch(self._buckets[rows], self._groups, self.batch_size, seed, window)
            plan = Plan(plan.shapes, rows[plan.rows])
            self._plans = dict([*self._plans.items(), (key, plan)][-4:])  # as in `Pipeline._plan`
        return plan

    def _rows_of(self, seed: int, number: int, window: int) -> Int[np.ndarray, " rows"]:
        lane = self._lanes[number]
        size = lane.window * self.batch_size
        first, last = (lane.shares.before((window + step) * size) for step in (0, 1))
        found = []
        for index, part in enumerate(lane.parts):
            taken, count = np.arange(first[index], last[index]), part.stop - part.start
            for epoch in range(first[index] // count, -(-last[index] // count)):
                places = taken[taken // count == epoch] % count
                found.append(part.start + self._order(seed, number, index, epoch, count)[places])
        return np.concatenate(found)

    def _order(self, seed: int, number: int, index: int, epoch: int, count: int) -> Int[np.ndarray, " examples"]:
        key = (seed, number, index, epoch)
        order = self._orders.get(key)
        if order is None:
            order = np.random.default_rng((*key, 1)).permutation(count)
            kept = 2 * sum(len(lane.parts) for lane in self._lanes)
            self._orders = dict([*self._orders.items(), (key, order)][-kept:])
        return order


def _parts(rows: EncodedRows, start: int) -> list[_Part]:
    if not isinstance(rows, MixedRows):
        return [_Part(start, start + len(rows), Fraction(len(rows)))]
    bounds = (start + rows.starts).tolist()
    shares = zip(bounds[:-1], bounds[1:], rows.shares, strict=True)
    return [_Part(first, last, rows.epoch * share) for first, last, share in shares]


__all__ = ["WINDOW", "MixedRows", "MixturePipeline"]
