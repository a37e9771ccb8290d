"""The part of a report about clients: who took part in which round, what travelled, how clients differ, privacy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxcl.reporting.page import figure, number, section, size, table, text
from jaxcl.reporting.run_data import RunData
from jaxcl.reporting.style import DASH, FAINT, MUTED, grid, series_colour, short, styled, svg

_HEIGHT = 0.22  # inches per client, at most
_MOST = 40  # clients that have a label of their own
_CELLS = 4000  # more are one image


def clients_section(run: RunData) -> str:
    """The section; empty for a run of one client alone."""
    rounds = [row for row in run.rounds if row.get("kind") == "round"]
    if not rounds:
        return ""
    lost = sum("lost" in row for row in rounds)
    note = (
        "A column per round, a row per client. Bytes are those of arrays, from and to all clients of a round together; "
        "down: to the clients."
    )
    warning = f'<p class="warn">{lost} of {len(rounds)} rounds changed nothing: no usable sum.</p>' if lost else ""
    return section(
        "Clients",
        figure(rounds_picture(rounds, run.tasks)),
        warning,
        _traffic(run, rounds),
        _scores(run),
        _privacy(run),
        note=note,
    )


def rounds_picture(rounds: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Which client was in which round, and the norm of the server's step.

    Args:
      rounds: rows of `rounds.jsonl` of the kind `round`.
      tasks: names of the tasks.
    """
    names = sorted({str(name) for row in rounds for name in row["clients"]}, key=lambda name: (len(name), name))
    cells = np.zeros((len(names), len(rounds)))
    for place, row in enumerate(rounds):
        for name in map(str, row["clients"]):
            cells[names.index(name), place] = 2 if name in row["refused"] or "lost" in row else 1
    with styled("rounds"):
        high = min(0.9 + _HEIGHT * len(names), 6.0)
        chart, (norms, map_) = grid(
            1, 2, height=(high + 1.4) / 2, sharex=True, gridspec_kw={"height_ratios": [1.4, high]}
        )
        numbers = np.arange(1, len(rounds) + 1)
        norms.plot(
            numbers,
            [row["update_norm"] for row in rounds],
            color=series_colour(0),
            marker="o",
            markersize=3,
            linewidth=1.2,
        )
        norms.set_ylabel("server's step")
        norms.yaxis.set_major_locator(MaxNLocator(3))
        colours = ListedColormap(["none", series_colour(0), series_colour(1)])
        map_.pcolormesh(
            np.arange(len(rounds) + 1) + 0.5, np.arange(len(names) + 1) + 0.5, cells, cmap=colours, vmin=0, vmax=2,
            edgecolors=FAINT, linewidth=0.4, rasterized=cells.size > _CELLS,
        )  # fmt: skip
        map_.set_ylim(len(names) + 0.5, 0.5)
        if len(names) <= _MOST:
            map_.set_yticks(np.arange(1, len(names) + 1), names)
        map_.set_ylabel("client")
        map_.set_xlabel("round")
        map_.grid(visible=False)
        map_.xaxis.set_major_locator(MaxNLocator(integer=True))
        _mark_tasks(norms, map_, [row["task"] for row in rounds], tasks)
        kinds = [Patch(color=series_colour(0), label="took part")]
        if (cells == 2).any():
            kinds.append(Patch(color=series_colour(1), label="left out"))
        chart.legend(handles=kinds, loc="outside lower right", ncols=2)
        return svg(chart, "Rounds by client, and the norm of the server's step in each round")


def _mark_tasks(upper: Axes, lower: Axes, of_rounds: Sequence[int], tasks: Sequence[str]) -> None:
    """Writes the tasks' names above, and separates them by lines through both."""
    starts = [place for place, task in enumerate(of_rounds) if not place or task != of_rounds[place - 1]]
    for start, end in itertools.pairwise([*starts, len(of_rounds)]):
        if start:
            for axes in (upper, lower):
                axes.axvline(start + 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        task = of_rounds[start]
        room = int((end - start) / len(of_rounds) * 100) - 3
        title = f"{task + 1} {short(tasks[task], room)}" if room > 6 and 0 <= task < len(tasks) else f"{task + 1}"
        where = upper.get_xaxis_transform()
        upper.text(start + 0.5, 1.03, f" {title}", transform=where, color=MUTED, fontsize=8, va="bottom")


def _traffic(run: RunData, rounds: Sequence[Mapping[str, Any]]) -> str:
    """Rounds, clients left out and bytes by task."""
    rows = []
    for index, name in enumerate(run.tasks):
        mine = [row for row in rounds if row["task"] == index]
        shared = [row for row in run.rounds if row.get("kind") == "shared" and row["task"] == index]
        if not mine:
            continue
        refused = sum(len(row["refused"]) for row in mine)
        up, down = (sum(row[name] for row in mine) for name in ("bytes_up", "bytes_down"))
        other = sum(row["bytes_up"] + row["bytes_down"] for row in shared)
        rows.append(
            [
                text(name),
                str(len(mine)),
                str(refused),
                size(up / len(mine), 1024, "B"),
                size(down / len(mine), 1024, "B"),
                size(up + down, 1024, "B"),
                size(other, 1024, "B") if other else DASH,
            ]
        )
    heads = ["Task", "Rounds", "Left out", "Up, per round", "Down, per round", "In all rounds", "Shared by the method"]
    return table(heads, rows, numbers=range(1, len(heads)))


def _scores(run: RunData) -> str:
    """The scores of the server's model on the rows of each client, after the last task, and their spread."""
    by_client = _own(run).get("scores")
    if not isinstance(by_client, Mapping) or not by_client:
        return ""
    last = {name: matrix[-1] for name, matrix in by_client.items() if matrix}
    rows = [[text(name), *(number(score) for score in scores)] for name, scores in last.items()]
    columns = list(zip(*last.values(), strict=False))
    found = [[score for score in column if score is not None] for column in columns]
    rows.append(["<i>standard deviation</i>", *(number(float(np.std(column))) if column else DASH for column in found)])
    heads = ["Client", *map(text, run.tasks[: len(columns)])]
    return f"<h3>The server's model on each client's own rows</h3>{table(heads, rows, numbers=range(1, len(heads)))}"


def _privacy(run: RunData) -> str:
    own = _own(run)
    epsilon = own.get("epsilon")
    if not isinstance(epsilon, Mapping):
        return ""
    # JSON has no infinity.
    rows = [
        [text(name), number(value, 2) if isinstance(value, int | float) else "∞"] for name, value in epsilon.items()
    ]
    delta = own.get("delta")
    lead = (
        f'<p class="note">Epsilon for delta {text(delta)}: what the model reveals about all of a client\'s data, over '
        "all rounds that it was in.</p>"
    )
    return f"<h3>Privacy</h3>{lead}{table(['Client', 'Epsilon'], rows, numbers=[1])}"


def _own(run: RunData) -> Mapping[str, Any]:
    own = (run.results.get("extra") or {}).get("federated")
    return own if isinstance(own, Mapping) else {}
