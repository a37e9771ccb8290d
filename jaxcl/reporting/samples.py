"""Samples of a model's answers next to the expected ones: the most informative examples."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.reporting.page import details, number, table, text
from jaxcl.reporting.run_data import RunData
from jaxcl.reporting.style import DASH

_SHOWN = {"forgotten": 4, "wrong": 2, "right": 3}
_CHARACTERS = 600
# How predictions name an image in a prompt.
_IMAGE = re.compile(r"\[image(?: [^\]]*)?\]")

Row = dict[str, Any]


class Sample(NamedTuple):
    """The rows of one example right after its task was learned (`None` if not available) and at the end."""

    learned: Row | None
    end: Row

    @property
    def forgotten(self) -> bool:
        """Whether it was right after learning and is wrong at the end."""
        return self.learned is not None and bool(self.learned.get("correct")) and not self.end.get("correct")


def samples_of(run: RunData, index: int) -> list[Sample]:
    """All examples of a task in its latest evaluation, each with its earlier row if there is one."""
    task = run.tasks[index]
    moments = sorted(after for after, name in run.predictions if name == task)
    if not moments:
        return []
    end = run.predictions[moments[-1], task]
    learned_at = index if index in moments and index < moments[-1] else None
    if learned_at is None:
        return [Sample(None, row) for row in end]
    # Test sets may repeat a prompt: its n-th example is the n-th in both evaluations.
    earlier: dict[tuple[str, ...], list[Row]] = {}
    for row in run.predictions[learned_at, task]:
        earlier.setdefault(_key(row), []).append(row)
    return [Sample(rows.pop(0) if (rows := earlier.get(_key(row), [])) else None, row) for row in end]


def chosen(samples: Sequence[Sample]) -> list[Sample]:
    """The samples to show: some forgotten, some wrong, some right, each kind spread over the whole set."""
    kinds: dict[str, list[Sample]] = {"forgotten": [], "wrong": [], "right": []}
    for sample in samples:
        kinds["forgotten" if sample.forgotten else "right" if sample.end.get("correct") else "wrong"].append(sample)
    room = sum(_SHOWN.values())
    shown = {kind: _spread(rows, _SHOWN[kind]) for kind, rows in kinds.items()}
    # If there are few of one kind, more of the others are shown.
    for kind, rows in kinds.items():
        left = room - sum(map(len, shown.values()))
        shown[kind] = _spread(rows, len(shown[kind]) + left)
    return [sample for rows in shown.values() for sample in rows]


def task_samples(run: RunData, index: int, *, opened: bool) -> str:
    """A foldable table of a task's samples; empty if there are no predictions."""
    samples = samples_of(run, index)
    if not samples:
        return ""
    both = any(sample.learned is not None for sample in samples)
    heads = ["Prompt", "Expected", *(["Right after learning", "At the end"] if both else ["Answer"])]
    rows = []
    for sample in chosen(samples):
        cells = [_prompt(sample.end, run.thumbnails), _said(sample.end.get("answer"))]
        if both:
            cells.append(_answer(sample.learned) if sample.learned else DASH)
        rows.append([*cells, _answer(sample.end)])
    listing = table(heads, rows).replace("<table>", '<table class="samples">', 1)
    counts = _counts(samples, both)
    return details(f'{index + 1} {text(run.tasks[index])} <span class="muted">{counts}</span>', listing, opened=opened)


def _counts(samples: Sequence[Sample], both: bool) -> str:
    right = sum(bool(sample.end.get("correct")) for sample in samples)
    if not both:
        return f"{right} of {len(samples)} fully right"
    before = sum(bool(sample.learned and sample.learned.get("correct")) for sample in samples)
    lost = sum(sample.forgotten for sample in samples)
    return f"of {len(samples)} examples {before} fully right after learning, {right} at the end; {lost} forgotten"


def _spread(rows: Sequence[Sample], count: int) -> list[Sample]:
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _key(row: Row) -> tuple[str, ...]:
    return str(row.get("prompt")), str(row.get("answer")), str(row.get("images"))


def _prompt(row: Row, thumbnails: Mapping[str, bytes]) -> str:
    """What was asked, with thumbnails in place of the names of images, or before it if not all names are left."""
    words = _shortened(row.get("prompt"))
    keys = row.get("images")
    images = [_image(thumbnails.get(str(key))) for key in keys] if isinstance(keys, list) else []
    names = _IMAGE.findall(words)
    if not all(images) or not images:
        return _said(words, "prompt")
    if len(names) != len(images):
        return "".join(images) + _said(words, "prompt")
    parts = _IMAGE.split(words)
    shown = text(parts[0])
    for image, name, part in zip(images, names, parts[1:], strict=True):
        shown += image.replace("<img", f'<img alt="{text(name)}" title="{text(name)}"') + text(part)
    return f'<bdi class="said prompt">{shown}</bdi>'


def _image(content: bytes | None) -> str:
    if content is None:
        return ""
    return f'<img class="thumbnail" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _answer(row: Row) -> str:
    score = row.get("score")
    if row.get("correct"):
        verdict = '<span class="verdict right">✓ right</span>'
    elif isinstance(score, int | float) and score > 0:
        verdict = f'<span class="verdict part">score {number(score, 0)}</span>'
    else:
        verdict = '<span class="verdict wrong">✗ wrong</span>'
    return verdict + _said(row.get("prediction"))


def _said(value: object, kind: str = "") -> str:
    words = _shortened(value)
    shown = text(words) if words.strip() else '<span class="muted">(nothing)</span>'
    return f'<bdi class="said {kind}">{shown}</bdi>'


def _shortened(value: object) -> str:
    words = "" if value is None else str(value)
    if len(words) <= _CHARACTERS:
        return words
    # The model answers the end of a prompt, so more of the end is kept.
    return f"{words[: _CHARACTERS // 3]} … {words[-2 * _CHARACTERS // 3 :]}"
