"""SARI of a rewritten text (Xu et al., 2016, Optimizing Statistical Machine Translation for Text Simplification)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from jaxcl.evaluation.words import tokens

_LONGEST = 4  # n-grams of 1 to 4 words, as in the paper

Counts = Mapping[tuple[str, ...], Fraction]


def sari_score(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one text: how well it adds, keeps and deletes n-grams of the source, compared with references.

    With counts of n-grams in the input `I`, the output `O` and, averaged over references, `R`:

        add:    O minus I, compared with R minus I;   keep: min(I, O), compared with min(I, R);
        delete: I minus O, compared with I minus R
        P = sum of min(done, wanted) / sum of done,  R = the same / sum of wanted
        SARI = (F1 of add + F1 of keep + P of delete) / 3, averaged over n = 1..4

    For additions, an n-gram that is in any reference has its largest count. Two things follow the published
    implementations, so that scores can be compared with published ones: F1 is computed per n and then averaged (the
    paper averages P and R first), and a ratio whose denominator is 0 is 1, so that a prediction equal to the reference
    scores 100. An `n` longer than all texts is left out (in those implementations it counts as 1, which gives three
    wrong words up to 75 percent).

    >>> sari_score("about 95 species", "about 95 species", ["about 95 species"])
    100.0

    Args:
      source: the text to rewrite.
      prediction: the model's text.
      references: one or more rewritings.

    Returns:
      Percent, 0 to 100.

    Raises:
      ValueError: there are no references.
    """
    if not references:
        raise ValueError("references: expected at least one, got none")
    texts = [tokens(text) for text in (source, prediction, *references)]
    longest = max(1, min(_LONGEST, max(map(len, texts))))
    total = Fraction(0)
    for n in range(1, longest + 1):
        given, written, *wanted = (_count(words, n) for words in texts)
        grams = {gram for count in wanted for gram in count}
        any_wanted: Counts = {gram: Fraction(max(count[gram] for count in wanted)) for gram in grams}
        mean_wanted: Counts = {gram: Fraction(sum(count[gram] for count in wanted), len(wanted)) for gram in grams}
        total += _harmonic(*_precision_recall(_minus(written, given), _minus(any_wanted, given)))
        total += _harmonic(*_precision_recall(_common(given, written), _common(given, mean_wanted)))
        total += _precision_recall(_minus(given, written), _minus(given, mean_wanted))[0]
    return float(100 * total / (3 * longest))


def _count(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _minus(left: Mapping[tuple[str, ...], Fraction | int], right: Mapping[tuple[str, ...], Fraction | int]) -> Counts:
    return {gram: max(Fraction(count) - right.get(gram, 0), Fraction(0)) for gram, count in left.items()}


def _common(left: Mapping[tuple[str, ...], Fraction | int], right: Mapping[tuple[str, ...], Fraction | int]) -> Counts:
    return {gram: min(Fraction(count), Fraction(right.get(gram, 0))) for gram, count in left.items()}


def _precision_recall(done: Counts, wanted: Counts) -> tuple[Fraction, Fraction]:
    right = sum(_common(done, wanted).values(), Fraction(0))
    total_done, total_wanted = sum(done.values(), Fraction(0)), sum(wanted.values(), Fraction(0))
    return (right / total_done if total_done else Fraction(1), right / total_wanted if total_wanted else Fraction(1))


def _harmonic(precision: Fraction, recall: Fraction) -> Fraction:
    return 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)
