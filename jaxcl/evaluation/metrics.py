"""Metrics by name. Those of predictions are computed here, in percent; those of text in `scoring`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcl.errors import UserError
from jaxcl.evaluation.sari import sari_score
from jaxcl.evaluation.words import words

Kind = Literal["pairs", "text", "labelled"]
ExampleScore = Callable[[str, str, str], float]
CorpusScore = Callable[[Sequence[str], Sequence[str]], float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
      name: name in the configuration.
      meaning: one line for the report.
      kinds: the kinds of task it can score.
      higher_is_better: whether a larger score is better.
      unit: `"%"`, or empty.
      example: score of one `(prediction, answer, source)` in percent, if the metric is a mean over examples.
      corpus: score of all predictions, if it is not.
      needs_source: whether it uses `source` (the text that the prediction rewrites).
      of_beginning: what the beginning of a right answer can score: `nothing`, `part`, or `all` if only the first token
        counts.
    """

    name: str
    meaning: str
    kinds: frozenset[Kind]
    higher_is_better: bool = True
    unit: str = "%"
    example: ExampleScore | None = None
    corpus: CorpusScore | None = None
    needs_source: bool = False
    of_beginning: Literal["nothing", "part", "all"] = "nothing"

    def __call__(
        self, predictions: Sequence[str], answers: Sequence[str], sources: Sequence[str] | None = None
    ) -> float:
        """Compares predictions with expected answers.

        Args:
          predictions: the model's answers.
          answers: the expected answers, in the same order.
          sources: the model's inputs; only metrics with `needs_source` use them.

        Returns:
          The score in percent, 0 to 100.

        Raises:
          ValueError: no examples, different lengths, missing sources, or a metric that does not score answers.
        """
        if self.example is None and self.corpus is None:
            raise ValueError(f"metric {self.name}: expected a metric of answers, got one of running text")
        if len(predictions) != len(answers) or not answers:
            raise ValueError(
                f"metric {self.name}: expected as many predictions as answers, at least one, "
                f"got {len(predictions)} and {len(answers)}"
            )
        if self.corpus is not None:
            return float(self.corpus(predictions, answers))
        return float(np.mean(self.each(predictions, answers, sources)))

    def each(
        self, predictions: Sequence[str], answers: Sequence[str], sources: Sequence[str] | None = None
    ) -> list[float]:
        """Score per example in percent; for a metric that is not a mean over examples, 100 if the texts are equal.

        Args:
          predictions: what the model answered.
          answers: what was expected.
          sources: the texts that were to be answered, for metrics that read them.
        """
        if self.needs_source and sources is None:
            raise ValueError(f"metric {self.name}: expected sources, got None")
        given = sources if sources is not None else [""] * len(answers)
        score = self.example or _exact_match
        return [float(score(*row)) for row in zip(predictions, answers, given, strict=True)]


def normalise(text: str) -> str:
    """Text without case, punctuation, compatibility characters (NFKC) and extra space, to compare short answers.

    An answer of punctuation only (`"-"`, `")"`) keeps it.

    >>> normalise("  The Answer:  42. ")
    'the answer 42'
    >>> normalise(" ! ")
    '!'
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    bare = "".join(" " if character in string.punctuation else character for character in folded)
    return " ".join(bare.split()) or folded


# A full stop at the end of a sentence, not the last of several dots.
_STOP = re.compile(r"(?<=[^.。\s])[.。]$")
# A single letter or a whole number at the start of an answer, not the start of a word or of a decimal number; brackets,
# quotes and marks of bold type before it do not count.
_CHOICE = re.compile(r"[\s(\[{<\uff08\u3010*_\"'`$\\]*(?:([^\W\d_])(?![A-Za-z])|([0-9]+)(?![0-9]|[.,/][0-9]))")
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def _composed(text: str) -> str:
    """Text without outer white space, its accented letters as single characters (NFC)."""
    return unicodedata.normalize("NFC", text.strip())


def _plain(text: str) -> str:
    """An answer as `exact_match` compares it: without outer white space, case and one final full stop.

    >>> _plain(" Yes. "), _plain("-5"), _plain("C#")
    ('yes', '-5', 'c#')
    """
    return _STOP.sub("", _composed(_composed(text).casefold())).rstrip()


def _accuracy(prediction: str, answer: str, source: str) -> float:
    return 100.0 * (_composed(prediction) == _composed(answer))


def choice(text: str) -> str | None:
    """The letter or number that opens an answer to a multiple-choice question; none if no such thing does.

    >>> choice("(B) because ..."), choice("**C**"), choice("2. Paris"), choice("Paris"), choice("2.5")
    ('B', 'C', '2', None, None)
    """
    found = _CHOICE.match(text)
    return (found[1] or found[2]) if found else None


def _choice_accuracy(prediction: str, answer: str, source: str) -> float:
    right = choice(answer)
    return 100.0 * (right is not None and choice(prediction) == right)


def _exact_match(prediction: str, answer: str, source: str) -> float:
    return 100.0 * (_plain(prediction) == _plain(answer))


def _lenient_match(prediction: str, answer: str, source: str) -> float:
    return 100.0 * (normalise(prediction) == normalise(answer))


def f1(average: Literal["macro", "micro"], predictions: Sequence[str | int], answers: Sequence[str | int]) -> float:
    """F1 in percent over the classes among answers and predictions; `micro` then equals the accuracy."""
    return _f1(average, predictions, answers, sorted({*answers, *predictions}, key=str))


def _f1(average: str, predictions: Sequence[str | int], answers: Sequence[str | int], classes: Sequence[Any]) -> float:
    from sklearn.metrics import f1_score

    return 100.0 * float(f1_score(answers, predictions, labels=classes, average=average, zero_division=0.0))


def _text_f1(average: Literal["macro", "micro"], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """F1 of generated answers, over the classes among the expected ones.

    A class that the model invents is a miss of the right class, not an additional class; with `micro` it lowers recall,
    not precision.
    """
    given, wanted = ([_plain(text) for text in texts] for texts in (predictions, answers))
    return _f1(average, given, wanted, sorted(set(wanted)))


class _Words:
    """Words of any script, for rouge-score, whose own tokenizer drops all characters but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _rouge_l(prediction: str, answer: str, source: str) -> float:
    if prediction == answer:  # the table of common subsequences takes long for long texts
        return 100.0 * bool(words(answer))
    return 100.0 * float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


def _fuzzy(prediction: str, answer: str, source: str) -> float:
    from rapidfuzz import fuzz

    return float(fuzz.ratio(_composed(prediction), _composed(answer)))


def _edit_similarity(prediction: str, answer: str, source: str) -> float:
    return _fuzzy(with_literals(prediction), with_literals(answer), source)


def with_literals(code: str) -> str:
    """Code of the Py150 corpus with its placeholders replaced by their literals.

    A number without a value becomes 0, a string without a value is empty.

    >>> with_literals("f ( <NUM_LIT:2> , <NUM_LIT> , '<STR_LIT:a b>' , '<STR_LIT>' )")
    "f ( 2 , 0 , 'a b' , '' )"
    """
    return _LITERAL.sub(lambda found: found[2] or ("0" if found[1] == "NUM" and found[2] is None else ""), code)


_PAIRS: frozenset[Kind] = frozenset({"pairs"})
_BOTH: frozenset[Kind] = frozenset({"pairs", "labelled"})
_TEXT: frozenset[Kind] = frozenset({"text"})

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "share of equal answers, ignoring outer space", _BOTH, example=_accuracy),
        Metric(
            "choice_accuracy",
            "share of equal first letters or numbers, ignoring brackets, bold type and the reasons that follow",
            _PAIRS,
            example=_choice_accuracy,
            of_beginning="all",
        ),
        Metric(
            "exact_match",
            "share of equal answers, ignoring outer space, case and a final full stop",
            _PAIRS,
            example=_exact_match,
        ),
        Metric(
            "lenient_match",
            "share of equal answers, ignoring case, space and all punctuation",
            _PAIRS,
            example=_lenient_match,
        ),
        Metric("macro_f1", "F1 averaged over classes", _BOTH, corpus=functools.partial(_text_f1, "macro")),
        Metric("micro_f1", "F1 over all decisions together", _BOTH, corpus=functools.partial(_text_f1, "micro")),
        Metric(
            "rouge_l",
            "longest common subsequence of words (ROUGE-L, F-measure)",
            _PAIRS,
            example=_rouge_l,
            of_beginning="part",
        ),
        Metric(
            "fuzzy",
            "similarity of characters (normalised indel similarity)",
            _PAIRS,
            example=_fuzzy,
            of_beginning="part",
        ),
        Metric(
            "edit_similarity",
            "similarity of characters of code, with placeholders replaced by literals",
            _PAIRS,
            example=_edit_similarity,
            of_beginning="part",
        ),
        Metric(
            "sari",
            "words correctly added, kept and deleted in a simplification (SARI)",
            _PAIRS,
            example=lambda prediction, answer, source: sari_score(source, prediction, [answer]),
            needs_source=True,
            of_beginning="part",
        ),
        Metric("perplexity", "exp of the mean loss per token; 1 is perfect", _TEXT, higher_is_better=False, unit=""),
        Metric("token_accuracy", "share of correctly predicted tokens", _TEXT),
        Metric("end_task", "score of the domain's end task, by the end task's metric", _TEXT),
    )
}


def find_metric(name: str, kind: Kind | None = None) -> Metric:
    """A metric by name.

    >>> find_metric("rouge_l").higher_is_better
    True

    Args:
      name: name in the configuration.
      kind: if given, the metric must be able to score this kind of task.

    Raises:
      UserError: no such metric, or it cannot score tasks of that kind; exit code 2.
    """
    valid = [metric.name for metric in METRICS.values() if kind is None or kind in metric.kinds]
    if name in valid:
        return METRICS[name]
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]}?" if close else ""
    problem = f"does not score {kind} tasks" if name in METRICS else "is not a metric"
    raise UserError(f"metric {name!r} {problem}{guess} allowed: {', '.join(valid)}", exit_code=2)


def check_answers(
    name: str, rows: Sequence[Mapping[str, str]], where: str, numbers: Sequence[int] | None = None
) -> None:
    """Checks that a model which gives every expected answer would score 100.

    Args:
      name: name of a metric of answers.
      rows: the rows to be scored, with `prompt` and `answer`.
      where: task and split, for the message.
      numbers: number of each row in its split, from 0; none: in order.

    Raises:
      UserError: the metric does not recognise an answer as right; exit code 2.
    """
    metric = find_metric(name, "pairs")
    answers = [row["answer"] for row in rows]
    values = metric.each(answers, answers, [row.get("source", row["prompt"]) for row in rows])
    for number, answer, value in zip(numbers or range(len(rows)), answers, values, strict=True):
        if value < 100 - 1e-6:
            shown = answer if len(answer) <= 60 else f"{answer[:60]}..."
            raise UserError(
                f"{where} row {number + 1}: by the metric {name} the right answer {shown!r} itself scores {value:.0f}, "
                "not 100; choose another metric",
                exit_code=2,
            )
