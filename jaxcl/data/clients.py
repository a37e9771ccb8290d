"""One data set over several clients of federated training, for experiments; or a folder per client.

Which client has a row is a pure function of a seed, the rows' answers and their number, the same in every process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxcl.data.cache import Cache
from jaxcl.data.sources import TaskData
from jaxcl.data.split import ListRows, Rows, StreamedRows
from jaxcl.errors import UserError

# Draws of shares, until each client has a row.
_DRAWS = 100


def even_clients(count: int, clients: int, *, seed: int) -> Int[np.ndarray, " rows"]:
    """The client of each row: at random, and as many rows for each, up to one.

    Args:
      count: number of rows.
      clients: number of clients.
      seed: another seed deals the rows out otherwise.

    Raises:
      UserError: there are fewer rows than clients.

    >>> np.bincount(even_clients(8, 3, seed=0)).tolist()
    [3, 3, 2]
    """
    _check(count, clients)
    found = np.empty(count, np.int64)
    found[np.random.default_rng((seed, count)).permutation(count)] = np.arange(count) % clients
    return found


def dirichlet_clients(labels: Sequence[Hashable], clients: int, *, alpha: float, seed: int) -> Int[np.ndarray, " rows"]:
    """The client of each row: the rows of each label are divided in shares drawn from Dirichlet(alpha).

    As in the experiments of Li et al., ICDE 2022 (arXiv 2102.02079, "distribution-based label imbalance"). The smaller
    alpha is, the fewer clients share a label; the larger, the more alike are the clients. Shares become whole numbers
    of rows such that a client's rows over all labels are its shares, up to about one row. Shares are drawn again until
    every client has a row.

    Args:
      labels: the label of each row: its class, or its answer. With a label of its own for each row, clients are alike.
      clients: number of clients.
      alpha: above 0; infinite: the same share of each label for every client.
      seed: another seed draws other shares.

    Raises:
      UserError: there are fewer rows than clients, or alpha is so small that some client always stays without a row.

    >>> dirichlet_clients(["a", "b", "a", "b"], 2, alpha=math.inf, seed=0).reshape(2, 2).sum(axis=0).tolist()
    [1, 1]
    """
    if not alpha > 0:
        raise UserError(f"alpha: {alpha} is not above 0", exit_code=2)
    _check(len(labels), clients)
    places: dict[Hashable, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    rng = np.random.default_rng((seed, len(labels)))
    for _ in range(_DRAWS):
        found = _drawn(list(places.values()), clients, alpha, rng)
        if len(np.unique(found)) == clients:
            return found
    raise UserError(
        f"alpha: with {alpha}, {len(places)} labels are not enough for {clients} clients with a row each; allowed: a "
        "larger alpha or fewer clients",
        exit_code=2,
    )


def _drawn(
    groups: Sequence[Sequence[int]], clients: int, alpha: float, rng: np.random.Generator
) -> Int[np.ndarray, " rows"]:
    found = np.empty(sum(map(len, groups)), np.int64)
    owed = np.zeros(clients)  # what rounding took from each client so far
    for group in groups:
        even = np.full(clients, 1 / clients)
        owed += len(group) * (even if math.isinf(alpha) else rng.dirichlet(np.full(clients, alpha)))
        counts = _whole(owed, len(group))
        owed -= counts
        found[rng.permutation(group)] = np.repeat(np.arange(clients), counts)
    return found


def _whole(wanted: Float[np.ndarray, " clients"], total: int) -> Int[np.ndarray, " clients"]:
    """Whole numbers close to those wanted, with a given sum."""
    counts = np.maximum(np.floor(wanted), 0).astype(np.int64)
    while rest := total - int(counts.sum()):
        left = wanted - counts
        if rest > 0:
            counts[np.argmax(left)] += 1
        else:
            counts[np.argmin(np.where(counts > 0, left, np.inf))] -= 1
    return counts


def _check(count: int, clients: int) -> None:
    if not 1 <= clients <= count:
        raise UserError(f"clients: {clients} is not within 1 to {count}, the number of rows", exit_code=2)


def task_of_client(
    task: TaskData,
    client: int,
    clients: int,
    *,
    alpha: float | None = None,
    seed: int,
    cache: Cache | None = None,
) -> TaskData:
    """A task with those of its training rows that a client has; development and test rows stay.

    Args:
      task: the task.
      client: number of the client, from 0.
      clients: number of clients; one has all rows.
      alpha: see `dirichlet_clients`, by class or answer; none: see `even_clients`.
      seed: seed of the choice.
      cache: keeps the fingerprint of chosen rows that are streamed.

    Raises:
      UserError: see `dirichlet_clients`; or alpha is given for a mixture, or for text, which has no answers.
    """
    if clients == 1:
        return task
    if task.mixed:
        raise UserError(
            f"task {task.name}: a mixture cannot be divided over clients; give each client a folder", exit_code=2
        )
    if alpha is None:
        found = even_clients(len(task.train), clients, seed=seed)
    else:
        found = dirichlet_clients(_labels(task), clients, alpha=alpha, seed=seed)
    mine = np.flatnonzero(found == client)
    rows: Rows
    if cache is None or not isinstance(task.train, StreamedRows):
        rows = ListRows(task.train.pick(mine.tolist()))
    else:
        rows = task.train.choose(mine, {"client": client, "clients": clients, "alpha": alpha, "seed": seed}, cache)
    return dataclasses.replace(task, train=rows)


def _labels(task: TaskData) -> list[str]:
    field = "label" if task.kind == "labelled" else "answer"
    if task.kind == "text":
        raise UserError(f"task {task.name}: alpha divides rows by their answers, and text has none", exit_code=2)
    return [row[field] for row in task.train]


def owner_folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name: one per client, with the client's own files. Hidden ones are left out.

    Raises:
      UserError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with a folder per client; there is no such folder", exit_code=2)
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder}: expected a folder per client, found none", exit_code=2)
    return found


__all__ = ["dirichlet_clients", "even_clients", "owner_folders", "task_of_client"]
