"""`jaxcl data`: encodes the rows of a configuration ahead of a run, and shows what the model will see."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxcl.commands.show import table
from jaxcl.config import load_config
from jaxcl.data.mixture import MixedRows
from jaxcl.data.pairs import PairRows
from jaxcl.data.repeats import Hashes, Overlap, overlaps, row_hashes
from jaxcl.data.rows import EncodedRows
from jaxcl.data.sources import SPLITS, TaskData
from jaxcl.data.split import Rows
from jaxcl.data.text import TextRows
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.run.components import Components, build
from jaxcl.run.folder import RunFolder
from jaxcl.sharding.processes import initialize

_COLOUR, _PLAIN = ("\x1b[32m", "\x1b[0m"), ("⟦", "⟧")
_HEAD = ("task", "split", "rows", "examples", "tokens", "learned", "cut", "fill", "MB", "seconds")


def describe_data(source: str, overrides: Sequence[str], *, samples: int, colour: bool) -> str:
    """Encodes the training rows of all tasks, and the rows of text that are scored, and describes them.

    Args:
      source: a YAML file, or the name of a configuration that comes with jaxcl.
      overrides: `KEY=VALUE` for the configuration.
      samples: number of examples per task that are shown.
      colour: whether learned tokens are green; else they are in brackets.

    Returns:
      A table with a row per task and split, a table of rows that occur twice, and the samples.

    Raises:
      UserError: the configuration or the data cannot be used.
    """
    initialize()
    config = load_config(source, overrides)
    config = config.model_copy(update={"mesh": type(config.mesh)()})  # whatever devices the run is meant for
    with tempfile.TemporaryDirectory() as scratch:
        parts = build(config, RunFolder(Path(scratch)))
        rows: list[tuple[str, ...]] = [_HEAD]
        shown: list[str] = []
        for index, task in enumerate(parts.tasks):
            if parts.config.tasks[index].data_gone:
                continue
            scored = parts.config.evaluation.split
            for split in ("train", scored) if task.kind == "text" else ("train",):
                started = time.monotonic()
                encoded = parts.encode(index, split)
                seconds = time.monotonic() - started
                rows.append(_row(task.name, split, getattr(task, split), encoded, seconds))
                if isinstance(encoded, MixedRows):
                    rows += _sources(task, split, encoded)
                if split == "train" and samples:
                    shown += [f"\n{task.name}", *_samples(encoded, parts, samples, _COLOUR if colour else _PLAIN)]
        if parts.general is not None:
            started = time.monotonic()
            encoded = parts.general_rows(0)
            rows.append(_row("data.general", "train", parts.general.train, encoded, time.monotonic() - started))
        lines = [*table(rows, left=2), "", *_repeats(parts)]
        if shown:
            what = "green" if colour else "in ⟦brackets⟧"
            lines += ["", f"What the model sees; learned tokens are {what}:", *shown]
        lines += ["", f"cache: {parts.cache.folder}"]
    return "\n".join(lines) if jax.process_index() == 0 else ""


def use_colour() -> bool:
    """Whether this process prints to a terminal with colours."""
    return os.isatty(1) and not os.environ.get("NO_COLOR")


def _row(name: str, split: str, rows: Rows, encoded: EncodedRows, seconds: float) -> tuple[str, ...]:
    found = encoded.describe()
    cut = sum(found.get(key, 0) for key in ("cut_passages", "cut_prompts", "cut_answers"))
    sizes = [leaf.table.bytes for leaf in encoded.leaves() if isinstance(leaf, PairRows | TextRows)]
    return (
        name,
        split,
        f"{len(rows):,}",
        f"{len(encoded):,}",
        f"{found['tokens']:,}",
        f"{found['scored_tokens']:,}" if "scored_tokens" in found else "all",
        f"{cut:,}",
        f"{found['fill']:.1%}" if "fill" in found else "",
        f"{sum(sizes) / 1e6:.1f}" if sizes else "",
        f"{seconds:.1f}",
    )


def _sources(task: TaskData, split: str, encoded: MixedRows) -> Iterator[tuple[str, ...]]:
    """A row per source of a mixture, whose seconds are those of the task."""
    there = [one for one in task.mixed if getattr(one, split)]
    for one, rows, share in zip(there, encoded.sources, encoded.shares, strict=True):
        name = f"- {float(share):.1%} of rows: {one.name.removeprefix(f'{task.name}: ')}"
        yield (*_row(name, split, getattr(one, split), rows, 0.0)[:-1], "")


def _repeats(parts: Components) -> Iterator[str]:
    """Rows that repeat others, within training, in training and what is scored, and between tasks."""
    hashes: dict[str, Hashes] = {}
    for index, task in enumerate(parts.tasks):
        if not parts.config.tasks[index].data_gone:
            for split in SPLITS:
                rows: Rows = getattr(task, split)
                hashes[f"{task.name} {split}"] = row_hashes(rows, parts.cache)
    trained = [name for name in hashes if name.endswith(" train")]
    pairs = [(name, name) for name in trained]
    pairs += [(name, other) for name in trained for other in hashes if not other.endswith(" train")]
    pairs += [(name, other) for number, name in enumerate(trained) for other in trained[number + 1 :]]
    found = overlaps(hashes, pairs)
    if not found:
        yield "No row occurs twice: not in a training split, not in what is scored, not in two tasks."
        return
    yield "Rows that occur twice; case and white space make no difference:"
    yield from table(
        [
            ("rows of", "also in", "number", "share"),
            *(_counted(one, len(hashes[one.of])) for one in found),
        ],
        left=2,
    )
    if any(one.of == one.other for one in found):
        yield "data.deduplicate: true leaves training rows out that repeat one of their source."


def _counted(one: Overlap, total: int) -> tuple[str, ...]:
    other = "itself" if one.of == one.other else one.other
    return one.of, other, f"{one.rows:,}", f"{one.rows / total:.1%}"


def _samples(encoded: EncodedRows, parts: Components, count: int, marks: tuple[str, str]) -> Iterator[str]:
    shape = encoded.shapes([])[-1]
    for index in np.linspace(0, len(encoded) - 1, min(count, len(encoded))).astype(int).tolist():
        row = encoded.row(index, shape, (parts.config.seed, 0, encoded.task, index))
        used = row["segments"] > 0
        learned = np.zeros(len(used), bool)
        if "predict" not in row:
            learned[1:] = row["weights"][:-1] > 0
        else:
            causal = parts.network.causal
            learned[row["predict"][row["weights"] > 0] + causal] = True
        yield f"- {_marked(row['tokens'][used], learned[used], parts.tokenizer, marks)}"


def _marked(tokens: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
    bounds = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    found = []
    for start, stop in itertools.pairwise(bounds):
        text = tokenizer.decode(tokens[start:stop].tolist(), skip_special=False)
        found.append(f"{marks[0]}{text}{marks[1]}" if start < stop and learned[start] else text)
    return "".join(found).replace("\n", "⏎")
