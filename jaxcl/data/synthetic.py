"""Which of the samples that a model wrote for a task replace its examples in the memory.

No real example may leak into the memory. What all prompts of a task share is its instruction; what a sample has in
between is compared with every real prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz import fuzz, process


class Frame(NamedTuple):
    """The beginning and end that all prompts of a task share."""

    prefix: str
    suffix: str


class Sample(NamedTuple):
    """A prompt and an answer written by a model.

    Attributes:
      body: the prompt between prefix and suffix; `None` if the model did not reach the suffix, or if prompt and answer
        are longer than all of the run's examples.
      answer: the answer.
      likelihood: mean log-probability of the answer's tokens, in nats.
      ended: whether the model ended the answer.
    """

    body: str | None
    answer: str
    likelihood: float
    ended: bool = True


class Chosen(NamedTuple):
    """Samples that replace a task's examples.

    Attributes:
      samples: the most likely ones, most likely first.
      dropped: number of samples dropped, by reason: `unfinished`, `copy` (of a real prompt), `repeated` (similar to
        another sample), `unlikely` (less likely than the `count` chosen ones).
    """

    samples: list[Sample]
    dropped: dict[str, int]


def shared_frame(prompts: Sequence[str]) -> Frame:
    r"""The longest beginning and end that all prompts share, without cutting words.

    Examples:
      >>> shared_frame(["Name it.\nInput: cat\nOutput: ", "Name it.\nInput: cow\nOutput: "])
      Frame(prefix='Name it.\nInput: ', suffix='\nOutput: ')

    Raises:
      ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    prefix = _shared(prompts)
    # A word that prompts share only in part belongs to the body.
    if any(len(prompt) > len(prefix) and not prompt[len(prefix)].isspace() for prompt in prompts):
        prefix = prefix.removesuffix(re.split(r"\s", prefix)[-1])
    rest = [prompt[len(prefix) :] for prompt in prompts]
    suffix = _shared([one[::-1] for one in rest])[::-1]
    if any(len(one) > len(suffix) and not one[-len(suffix) - 1].isspace() for one in rest):
        suffix = suffix.removeprefix(re.split(r"\s", suffix)[0])
    # A shared end of the last line ("... ." in all prompts) is a coincidence of the examples, not the task's frame.
    return Frame(prefix, suffix[max(0, suffix.find("\n")) :])


def read_body(text: str, suffix: str) -> str | None:
    r"""What a model wrote before the suffix, or, for an empty suffix, before the end of the line.

    Examples:
      >>> read_body("a dog\nOutput: animal", "\nOutput: "), read_body("a dog and", "\nOutput: ")
      ('a dog', None)
    """
    mark = suffix.rstrip() or "\n"
    body, found, _ = text.partition(mark)
    return body.strip() if found and body.strip() else None


def choose_samples(samples: Sequence[Sample], real: Sequence[str], count: int, similarity: float) -> Chosen:
    """The most likely samples that copy neither a real prompt nor each other; those whose answer ended come first.

    A text is a copy if its share of equal letters (`rapidfuzz.fuzz.ratio`, ignoring case and spaces) is at least
    `similarity`.

    Args:
      samples: what the model wrote.
      real: bodies of the task's real prompts.
      count: largest number of samples chosen.
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
    """The longest common prefix; that of the first and the last text in alphabetical order."""
    first, last = min(texts), max(texts)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:place]
    return first[: len(last)]


def _among(body: str, others: Sequence[str], similarity: float) -> bool:
    return process.extractOne(_plain(body), others, scorer=fuzz.ratio, score_cutoff=100 * similarity) is not None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
