"""A run folder in the terminal: where the run is, its scores, what it stores, where the time went. Needs no jax."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.config.plain_yaml import UNREADABLE, load_yaml
from jaxcl.data.formats.storage import is_url
from jaxcl.errors import UserError
from jaxcl.reporting.goodput import goodput
from jaxcl.reporting.run_data import ODD, directions, read_results, scores, watched

_TAIL_BYTES = 1 << 16
_WIDEST = 200  # characters of a cell of a table
_ODD_CHARACTERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a terminal would obey or refuse them
_MEASURES = {"op": "OP", "bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting"}


class Checkpoint(NamedTuple):
    """A checkpoint on disk.

    Attributes:
      number: its number.
      mark: why it is kept beside the latest ones, `None` for the others.
      task: index of the task it lies in or behind; -1 before the first.
      learned: whether the task was learned.
      size: its bytes.
    """

    number: int
    mark: str | None
    task: int
    learned: bool
    size: int


def show(folder: Path, url: str | None = None) -> str:
    """The summary of a run, finished or not.

    Args:
      folder: the run folder.
      url: where the run is, if the folder is a copy of what a URL holds.

    Returns:
      Lines for a terminal.

    Raises:
      UserError: it is not a run folder, or a file in it cannot be read.
    """
    config = _config(folder)
    results = read_results(folder) if (folder / "results.json").is_file() else None
    try:
        return _ODD_CHARACTERS.sub("\ufffd", _summary_of(folder, config, results, url))
    except ODD as error:
        raise UserError(f"{folder}: its files do not hold what a run writes: {type(error).__name__}: {error}") from None


def _summary_of(folder: Path, config: Mapping[str, Any], results: Mapping[str, Any] | None, url: str | None) -> str:
    kept = checkpoints(folder / "checkpoints")
    sections = [
        [*_head(url or folder, config, results), *_whereabouts(folder, config, results, kept, url)],
        [] if results is None else list(_scores(results)),
        [] if results is None else watched(results),
        list(_stored(folder, kept)),
        list(_seconds((results or {}).get("timing") or {})),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines with aligned columns: the first `left` to the left, the others to the right.

    >>> table([["a", "1"], ["bcd", "10"]])
    ['a     1', 'bcd  10']
    """
    rows = [[cell if len(cell) <= _WIDEST else f"{cell[: _WIDEST - 1]}…" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if index < left else ">" for index in range(len(widths))]
    cells = [zip(row, sides, widths, strict=True) for row in rows]
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in cells]


def size(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(512), size(2_500_000), size(3.2e9)
    ('512 B', '2.5 MB', '3.2 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `checkpoints/` of a run folder, oldest first."""
    found = []
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    for number in numbers:
        place = folder / str(number)
        try:
            note = json.loads((place / "progress" / "metadata").read_text(encoding="utf-8"))
            progress = note["progress"]
            learned, mark = progress["phase"] == "learned", note["mark"]
            mark = mark if mark is None else str(mark)[:_WIDEST]
            found.append(Checkpoint(number, mark, int(progress["task"]), learned, _bytes(place)))
        except (OSError, *ODD):  # being removed, or of another version
            continue
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml)")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
        names, method = [str(task["name"]) for task in content["tasks"]], str(content["method"]["name"])
        seed, output = int(content["seed"]), str(content["output"])
        return {"seed": seed, "output": output, "names": names, "method": method}
    except (OSError, *UNREADABLE, *ODD):
        raise UserError(f"{path}: cannot be read as the configuration of a run") from None


def _head(folder: Path | str, config: Mapping[str, Any], results: Mapping[str, Any] | None) -> Iterator[str]:
    count = len(config["names"])
    yield f"{folder}: {config['method']}, seed {config['seed']}, {count} task{'s' if count > 1 else ''}"
    if results is not None and results.get("parameters"):
        device = f" on {results['device']}" if results.get("device") else ""
        yield f"{results['parameters']:,} params{device}"


def _whereabouts(
    folder: Path,
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    kept: Sequence[Checkpoint],
    url: str | None,
) -> Iterator[str]:
    if results is not None and results.get("finished") and results["tasks"] == config["names"]:
        steps = sum((results.get("steps") or {}).values())
        yield f"finished {_time(folder / 'results.json')} after {steps} steps"
        return
    row = _last_row(folder / "metrics.jsonl")
    newest = kept[-1] if kept else None
    where = "no step logged yet"
    if row is not None:
        learned = newest is not None and newest.learned and newest.task >= row["task"]
        step = "learned" if learned else f"step {row['task_step']} of the task, {row['step']} of the run"
        where = f"task {row['task'] + 1} of {len(config['names'])} ({_name(config, row['task'])}), {step}"
    written = (folder / name for name in ("config.yaml", "metrics.jsonl", "results.json", "checkpoints"))
    latest = max((path for path in written if path.exists()), key=lambda path: path.stat().st_mtime)
    if url is not None:  # who is working is not known here
        yield f"not finished: {where}; last written {_time(latest)}"
        return
    running = _in_use(folder)
    yield f"{'running' if running else 'interrupted'}: {where}; last written {_time(latest)}"
    if not running:
        begin = "the beginning" if newest is None else f"checkpoint {newest.number}"
        here = is_url(config["output"]) or Path(config["output"]).resolve() == folder.resolve()
        moved = "" if here else f" output={folder}"
        yield f"`jaxcl run {folder / 'config.yaml'}{moved}` goes on from {begin}"


def _name(config: Mapping[str, Any], task: int) -> str:
    return "all tasks" if config["method"] == "joint" else str(config["names"][task])


def _in_use(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        lock = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # it may be a pipe
        with open(lock, "rb"):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without
        return False
    return False


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of `metrics.jsonl`."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # being written, or cut by the seek
            continue
        if isinstance(row, dict) and all(type(row.get(name)) is int for name in ("task", "task_step", "step")):
            return row
    return None


def _scores(results: Mapping[str, Any]) -> Iterator[str]:
    """The matrix of the run's own measure, and what it and the further measures amount to."""
    tasks = [str(task) for task in results["tasks"]]
    metrics = [str(metric) for metric in results["metric"]]
    one = len(set(metrics)) == 1
    rows = [[metrics[0] if one else "score", *tasks]]
    if not one:
        rows.append(["metric", *metrics])
    if results.get("initial") is not None:
        rows.append(["before training", *map(_number, results["initial"])])
    matrix = scores(dict(results))
    for index, scored in enumerate(matrix):
        label = "after all tasks" if results.get("joint") else f"after {index + 1} {tasks[index]}"
        rows.append([label, *map(_number, scored.tolist())])
    if len(matrix) > 1:
        changes = [_change(matrix[-1, task] - matrix[task, task]) for task in range(len(matrix) - 1)]
        rows.append(["since learned", *changes, *[""] * (len(tasks) - len(changes))])
    yield from table(rows)
    if not all(directions(dict(results))):
        yield "lower is better" if not any(directions(dict(results))) else "lower is better for perplexity"
    yield _summary("", results)
    for name, part in (results.get("further") or {}).items():
        yield _summary(f"{name}: ", part)


def _summary(name: str, part: Mapping[str, Any]) -> str:
    known = {title: part[field] for field, title in _MEASURES.items() if part.get(field) is not None}
    texts = [f"{title} {_number(value) if title == 'OP' else _change(value)}" for title, value in known.items()]
    return name + ("  ".join(texts) or "no score yet")


def _number(value: float | None) -> str:
    return "·" if value is None or value != value else f"{value:.1f}"


def _change(value: float) -> str:
    return "·" if value != value else f"{round(value, 1) + 0.0:+.1f}"  # not -0.0


def _stored(folder: Path, kept: Sequence[Checkpoint]) -> Iterator[str]:
    rows = [[f"checkpoint {one.number}", size(one.size), one.mark or "latest"] for one in kept]
    stores = sorted((folder / "teacher").glob("*.array_record"))
    if stores:
        rows.append(["teacher store", size(sum(path.stat().st_size for path in stores)), f"{len(stores)} files"])
    rows += [["memory", *one] for one in _memory(folder / "memory.json")]
    rows.append(["run folder", size(_bytes(folder)), ""])
    yield "stored"
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, amount, words in rows:
        yield f"  {name:<{widths[0]}}  {amount:>{widths[1]}}  {words}".rstrip()


def _memory(path: Path) -> Iterator[tuple[str, str]]:
    """Number of remembered rows of each task, and what they are; then what all take in files."""
    if not path.is_file():
        return
    try:
        files = set()
        for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]:
            latest = task["versions"][-1]
            kind = "samples that the model wrote" if task["synthetic"] else f"of {task['count']} examples"
            yield str(latest["size"]), f"{kind}, {task['name']}"
            files |= latest["files"].keys()
    except (OSError, *ODD):
        raise UserError(f"{path}: cannot be read as the memory of a run") from None
    places = [path.with_suffix("") / name for name in files]
    if places := [place for place in places if place.is_file()]:
        yield size(sum(place.stat().st_size for place in places)), f"{len(places)} files"


def _seconds(timing: Mapping[str, float]) -> Iterator[str]:
    if not timing:
        return
    whole = sum(timing.values())
    yield f"time {whole:,.1f} s, goodput {goodput(timing) or 0.0:.0%}"
    parts = sorted(timing.items(), key=lambda part: -part[1])
    rows = [[f"  {name}", f"{seconds:,.1f} s", f"{seconds / whole:.0%}" if whole else ""] for name, seconds in parts]
    yield from table(rows)


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a run in progress removes files
            continue
    return total


def _time(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
