"""Which samples that a model wrote for a task are good enough to stand for its examples.

Nothing of a task's own examples may come through: what the prompts of a task share is its instruction; what a sample
has between is held against every real prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz import fuzz, process


class Frame(NamedTuple):
    """What all prompts of a task have in common: how they begin and how they end."""

    prefix: str
    suffix: str


class Sample(NamedTuple):
    """A prompt and an answer that a model wrote.

    Attributes:
      body: the prompt between prefix and suffix; `None` if the model never came to the suffix, or if the whole is
        longer than any of the run's examples.
      answer: the answer.
      likelihood: mean log-probability of the answer's tokens, in nats.
      ended: the answer came to an end by itself.
    """

    body: str | None
    answer: str
    likelihood: float
    ended: bool = True


class Chosen(NamedTuple):
    """Samples that stand for a task's examples.

    Attributes:
      samples: the most likely ones, the likeliest first.
      dropped: how many were left out, by reason: `unfinished`, `copy` (of a real prompt), `repeated` (of another
        sample), `unlikely` (more than were asked for).
    """

    samples: list[Sample]
    dropped: dict[str, int]


def shared_frame(prompts: Sequence[str]) -> Frame:
    r"""The longest beginning and end that all prompts share, cut where words end.

    Examples:
      >>> shared_frame(["Name it.\nInput: cat\nOutput: ", "Name it.\nInput: cow\nOutput: "])
      Frame(prefix='Name it.\nInput: ', suffix='\nOutput: ')

    Raises:
      ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    prefix = _shared(prompts)
    # A word is not taken apart: where prompts go on in its middle, it belongs to the body.
    if any(len(prompt) > len(prefix) and not prompt[len(prefix)].isspace() for prompt in prompts):
        prefix = prefix.removesuffix(re.split(r"\s", prefix)[-1])
    rest = [prompt[len(prefix) :] for prompt in prompts]
    suffix = _shared([one[::-1] for one in rest])[::-1]
    if any(len(one) > len(suffix) and not one[-len(suffix) - 1].isspace() for one in rest):
        suffix = suffix.removeprefix(re.split(r"\s", suffix)[0])
    # What few prompts end their last line with by chance ("... ." in all of them) is their own, not the task's.
    return Frame(prefix, suffix[max(0, suffix.find("\n")) :])


def read_body(text: str, suffix: str) -> str | None:
    r"""What a model wrote up to the suffix, or up to the end of the line where there is none.

    Examples:
      >>> read_body("a dog\nOutput: animal", "\nOutput: "), read_body("a dog and", "\nOutput: ")
      ('a dog', None)
    """
    mark = suffix.rstrip() or "\n"
    body, found, _ = text.partition(mark)
    return body.strip() if found and body.strip() else None


def choose_samples(samples: Sequence[Sample], real: Sequence[str], count: int, similarity: float) -> Chosen:
    """The likeliest samples that copy neither a real prompt nor each other; those whose answer ended come first.

    Two texts are the same if the share of equal letters (`rapidfuzz.fuzz.ratio`; case and spaces aside) is more than
    `similarity`.

    Args:
      samples: what the model wrote.
      real: bodies of the task's real prompts.
      count: most samples chosen.
      similarity: from 0 to 1.
    """
    dropped = Counter({"unfinished": 0, "copy": 0, "repeated": 0, "unlikely": 0})
    known = [_plain(body) for body in real]
    chosen: list[Sample] = []
    taken: list[str] = []
    for sample in sorted(samples, key=lambda one: (not one.ended, -one.likelihood)):
        if sample.body is None or not sample.answer.strip():
            dropped["unfinished"] += 1
        elif _among(sample.body, known, similarity):
            dropped["copy"] += 1
        elif _among(sample.body, taken, similarity):
            dropped["repeated"] += 1
        elif len(chosen) == count:
            dropped["unlikely"] += 1
        else:
            chosen.append(sample)
            taken.append(_plain(sample.body))
    return Chosen(chosen, dict(dropped))


def _shared(texts: Sequence[str]) -> str:
    """The longest beginning of all texts: that of the first and the last in alphabetical order."""
    first, last = min(texts), max(texts)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:place]
    return first[: len(last)]


def _among(body: str, others: Sequence[str], similarity: float) -> bool:
    return process.extractOne(_plain(body), others, scorer=fuzz.ratio, score_cutoff=100 * similarity) is not None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
