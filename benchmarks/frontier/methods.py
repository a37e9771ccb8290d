"""The methods that are compared, with the knob of each, and the grid that is searched for each: the same budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from benchmarks.frontier.records import Point

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
EXAMPLES = 128
REPLAY = {"fraction": 0.05, "every": 5}


@dataclasses.dataclass(frozen=True)
class Rival:
    """A method in the comparison.

    Attributes:
      method: a registered method, or `module:Class`.
      options: fixed options.
      knob: dotted name of its own knob; empty if it has none.
      values: of the knob, log-spaced.
      most: largest value that the knob may have.
      kind: of the testbeds that it can learn; none: all.
    """

    method: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    knob: str = ""
    values: Sequence[Any] = ()
    most: float = float("inf")
    kind: Literal["text", "pairs"] | None = None

    def grid(self) -> list[dict[str, Any]]:
        """Options of every value of the knob."""
        if not self.knob:
            return [dict(self.options)]
        return [with_option(self.options, self.knob, value) for value in self.values]


def with_option(options: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Options with one more, by its dotted name.

    >>> with_option({"replay": {"every": 5}}, "replay.fraction", 0.1)
    {'replay': {'every': 5, 'fraction': 0.1}}
    """
    first, _, rest = name.partition(".")
    return {**options, first: with_option(options.get(first, {}), rest, value) if rest else value}


def option_of(options: Mapping[str, Any], name: str) -> Any:
    """The option with a dotted name.

    >>> option_of({"replay": {"every": 5}}, "replay.every")
    5
    """
    for part in name.split("."):
        options = options[part]
    return options


_DAS = {"importance_examples": EXAMPLES, "evenness": 0.1}
_PAPER = {"importance_examples": EXAMPLES}
_BUDGETS = {"layer_budget": 0.75, "head_budget": 0.5, "query_budget": 24, "store_logits": 64, "replay": REPLAY}
_SEEKR = _BUDGETS | {"distil_heads": "rows", "logit_weight": 0.5}  # as in the paper
_ROWS = _SEEKR | {"attention_weight": "auto"}
_VALUES = _ROWS | {"distil_heads": "values", "logit_weight": 0.75}
_PULLS, _SHARES = (10.0, 40.0, 160.0), (0.1, 0.3, 1.0)
_MIX = {"fraction": 0.05, "mode": "mix"}


def _averaged(average: str) -> dict[str, Any]:
    # In 60 steps, sfa averages as often as in 150 by default.
    every = {"average_every": 10} if average == "sfa" else {}
    return {"run": {"optimizer": {"average": average, **every}}}


RIVALS: dict[str, Rival] = {
    "sequential": Rival("sequential"),
    "replay": Rival("replay", {"replay": REPLAY}, "replay.fraction", (0.02, 0.05, 0.15), most=1.0),
    "replay (distance)": Rival(
        "replay", {"replay": REPLAY | {"spacing": "distance"}}, "replay.fraction", (0.02, 0.05, 0.15), most=1.0
    ),
    "replay (highest loss)": Rival(
        "replay", {"replay": REPLAY | {"choose": "highest_loss"}}, "replay.fraction", (0.02, 0.05, 0.15), most=1.0
    ),
    "ewc": Rival("ewc", {"fisher_examples": EXAMPLES}, "strength", (100.0, 500.0, 2000.0)),
    "lwf": Rival("lwf", {}, "weight", (0.3, 1.0, 3.0)),
    "lwf (start)": Rival("lwf", {"teacher": "start", "temperature": 1.0}, "weight", (0.3, 1.0, 3.0)),
    "sdft": Rival("sdft", {}, "teacher_rate", (0.003, 0.01, 0.03), most=1.0, kind="pairs"),
    "osft": Rival("osft", {}, "share", (0.25, 0.5, 0.75)),
    "ssu": Rival("ssu", {"importance_examples": EXAMPLES}, "share", (0.25, 0.5, 0.75)),
    "mofo": Rival("mofo", {}, "share", (0.05, 0.15, 0.5), most=1.0),
    "agem": Rival("agem", {"replay": _MIX}, "replay.fraction", (0.02, 0.05, 0.15), most=1.0),
    "derpp": Rival("derpp", {"replay": REPLAY}, "alpha", (0.1, 0.5, 2.0)),
    "seekr": Rival("seekr", _VALUES, "attention_share", _SHARES),
    # Controls and parts: heads drawn at random, outputs alone; the paper's rows, and a weight that stays as it is.
    "seekr (random heads)": Rival("seekr", _VALUES | {"importance": "random"}, "attention_share", _SHARES),
    "seekr (outputs)": Rival("seekr", _SEEKR | {"attention_weight": 0.0}, "logit_weight", (0.25, 0.5, 0.75)),
    "seekr (rows)": Rival("seekr", _ROWS, "attention_share", _SHARES),
    "seekr (rows, random heads)": Rival("seekr", _ROWS | {"importance": "random"}, "attention_share", _SHARES),
    "seekr (fixed weight)": Rival("seekr", _SEEKR, "attention_weight", (1.0, 10.0, 100.0)),
    "das": Rival("das", _DAS, "strength", _PULLS),
    "das (mask)": Rival("das", _DAS | {"hold": "mask"}, "mask_strength", (0.3, 1.0, 3.0)),
    "das (mask, mean kept)": Rival("das", _DAS | {"hold": "mask", "keep_mean": True}, "mask_strength", (0.3, 1.0, 3.0)),
    "das (both)": Rival("das", _DAS | {"hold": "both"}, "strength", _PULLS),
    # Controls: the same, knowing less of what matters.
    "das (permuted)": Rival("das", _DAS | {"selection": "permuted"}, "strength", _PULLS),
    "das (layers)": Rival("das", _DAS | {"selection": "layer"}, "strength", _PULLS),
    "das (uniform)": Rival("das", _DAS | {"evenness": 1.0}, "strength", _PULLS),
    "das_paper": Rival("das_paper", _PAPER | {"contrast_weight": 0.0}, "shared", ("free", "mean", "frozen")),
    "das_paper (contrast)": Rival("das_paper", _PAPER, "contrast_weight", (0.1, 0.3, 1.0)),
    "joint": Rival("joint"),
    # What can be added to any method, here to plain fine-tuning.
    "sequential (ema)": Rival(
        "sequential", _averaged("ema"), "run.optimizer.average_rate", (0.01, 0.03, 0.1), most=0.9
    ),
    "sequential (sfa)": Rival("sequential", _averaged("sfa"), "run.optimizer.average_rate", (0.1, 0.25, 0.6), most=0.9),
    "sequential (wise)": Rival(
        "sequential", _averaged("wise"), "run.optimizer.average_rate", (0.25, 0.5, 0.75), most=0.9
    ),
    "sequential (general)": Rival("sequential", {}, "run.data.general.share", (0.1, 0.2, 0.4), most=0.9),
    "sequential (frozen)": Rival(
        "sequential", {}, "run.optimizer", ({"freeze_layers": 1}, {"freeze_embeddings": True})
    ),
    "sequential (dft)": Rival("sequential", {"loss_gate": "probability"}),
    "sequential (eaft)": Rival("sequential", {"loss_gate": "entropy"}),
}


def tuning_points(
    testbed: str,
    name: str,
    rival: Rival,
    *,
    order: str = "A",
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = (0,),
) -> list[Point]:
    """The grid of a method on the order that settings are chosen on."""
    return [
        Point(testbed, order, name, rival.method, options, rate, seed)
        for options, seed, rate in itertools.product(rival.grid(), seeds, learning_rates)
    ]


def beyond(best: Point, rival: Rival, tried: Sequence[Point]) -> list[Point]:
    """The next points where the best one of a method lies at an edge of what was tried: of learning rates, of its knob.

    Args:
      best: the best point.
      rival: its method.
      tried: all points of the method, the best one among them.
    """
    rate = _next([one.learning_rate for one in tried], best.learning_rate, float("inf"))
    found = [] if rate is None else [dataclasses.replace(best, learning_rate=rate)]
    if rival.knob and not isinstance(rival.values[0], str):
        values = [float(option_of(one.options, rival.knob)) for one in tried]
        value = _next(values, float(option_of(best.options, rival.knob)), rival.most)
        if value is not None:
            found.append(dataclasses.replace(best, options=with_option(best.options, rival.knob, value)))
    return found


def cross(best: Point, rival: Rival, tried: Sequence[Point]) -> list[Point]:
    """The best point with every learning rate that was tried, and with every value of the knob.

    Args:
      best: the best point.
      rival: its method.
      tried: all points of the method.
    """
    points = [dataclasses.replace(best, learning_rate=rate) for rate in sorted({one.learning_rate for one in tried})]
    if rival.knob:
        values = dict.fromkeys(option_of(one.options, rival.knob) for one in tried)
        points += [dataclasses.replace(best, options=with_option(best.options, rival.knob, one)) for one in values]
    return list({one.key: one for one in points}.values())


def _next(values: Sequence[float], best: float, most: float) -> float | None:
    """A value as far beyond the edge that `best` lies on as its neighbour lies within; `None` within the range."""
    ordered = sorted(set(values))
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    value = float(f"{best * best / ordered[1 if best == ordered[0] else -2]:.3g}")
    return value if value <= most else None
