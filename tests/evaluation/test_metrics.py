import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.errors import UserError
from jaxcl.evaluation.metrics import METRICS, f1, find_metric, normalise
from jaxcl.evaluation.sari import sari_score


def brute_f1(predictions: list[str], answers: list[str]) -> tuple[float, float]:
    """Macro and micro F1 over the answers' classes, from counts."""
    each, hits, given_total, wanted_total = [], 0, 0, 0
    for name in sorted(set(answers)):
        right = sum(p == a == name for p, a in zip(predictions, answers, strict=True))
        given, wanted = predictions.count(name), answers.count(name)
        each.append(2 * right / (given + wanted))
        hits, given_total, wanted_total = hits + right, given_total + given, wanted_total + wanted
    return 100 * sum(each) / len(each), 100 * 2 * hits / (given_total + wanted_total)


@settings(deadline=None)  # the first call imports scikit-learn or rouge-score
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=12))
def test_f1_equals_counting(rows: list[tuple[str, str]]) -> None:
    predictions, answers = [row[0] for row in rows], [row[1] for row in rows]
    macro, micro = brute_f1(predictions, answers)
    assert METRICS["macro_f1"](predictions, answers) == pytest.approx(macro)
    assert METRICS["micro_f1"](predictions, answers) == pytest.approx(micro)


def test_f1_counts_an_invented_class_as_a_miss_only() -> None:
    # Class a: precision 1, recall 1/2, F1 2/3; class b: 1. A third class "x" of F1 0 would give 5/9.
    given, wanted = ["a", "x", "b"], ["a", "a", "b"]
    assert METRICS["macro_f1"](given, wanted) == pytest.approx(100 * (2 / 3 + 1) / 2)
    # A classifier's classes are given; one it predicts wrongly counts like any other.
    assert f1("macro", given, wanted) == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)
    assert f1("micro", given, wanted) == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "expected"),
    [
        ("accuracy", " Paris\n", "Paris", 100.0),
        ("accuracy", "paris", "Paris", 0.0),
        ("exact_match", "  paris. ", "Paris", 100.0),
        ("exact_match", "Paris, France", "Paris", 0.0),
        ("exact_match", "(", ")", 0.0),
        ("exact_match", "ﬁne", "fine", 100.0),
        ("exact_match", "", "", 100.0),
        # Longest common subsequence "the sat mat" of 3 words; precision 3/4, recall 3/5.
        ("rouge_l", "the sat the mat", "the cat sat on mat", 100 * 2 * 0.75 * 0.6 / 1.35),
        ("rouge_l", "running", "runs", 100.0),  # same stem
        ("rouge_l", "schöne Grüße", "schöne Tage", 50.0),
        ("rouge_l", "东京", "东京都", 100 * 2 * 1 * (2 / 3) / (5 / 3)),
        ("rouge_l", "", "word", 0.0),
        # Indel: 2 of 3 letters common on each side: 2*2/6.
        ("fuzzy", "abc", "abd", 100 * 4 / 6),
        # Both become "x = 2"; then "f ( 0 )" against "f ( 1 )": 6 of 7 characters common on each side.
        ("edit_similarity", "x = <NUM_LIT:2>\n", "x = 2", 100.0),
        ("edit_similarity", "f ( <NUM_LIT> )", "f ( <NUM_LIT:1> )", 100 * 12 / 14),
        ("edit_similarity", "print '<STR_LIT:a\nb>'", "print 'a\nb<STR_LIT>'", 100.0),
        ("edit_similarity", "", "x", 0.0),
        ("choice_accuracy", "B", "B", 100.0),
        ("choice_accuracy", " B. Because of the wax", "B\nBecause snow", 100.0),
        ("choice_accuracy", "C支持", "C", 100.0),
        ("choice_accuracy", "A", "B", 0.0),
        ("choice_accuracy", "Answer: B", "A", 0.0),
        ("choice_accuracy", "b", "B", 0.0),
        ("choice_accuracy", "", "B", 0.0),
    ],
)
def test_score_of_one_example(metric: str, prediction: str, answer: str, expected: float) -> None:
    assert METRICS[metric]([prediction], [answer]) == pytest.approx(expected)


@settings(deadline=None)  # the first call imports scikit-learn or rouge-score
@given(st.lists(st.text("ab cd.", max_size=20), min_size=1, max_size=4))
def test_rouge_on_latin_text_is_that_of_rouge_score(texts: list[str]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    reference = RougeScorer(["rougeL"], use_stemmer=True)
    for left, right in itertools.product(texts, repeat=2):
        expected = 100 * reference.score(right, left)["rougeL"].fmeasure
        assert METRICS["rouge_l"]([left], [right]) == pytest.approx(expected)


def test_scores_are_means_over_examples() -> None:
    for name in ("accuracy", "choice_accuracy", "exact_match", "rouge_l", "fuzzy", "edit_similarity", "sari"):
        metric = METRICS[name]
        predictions, answers, sources = ["a b", "c", "d e f"], ["a b", "x", "d f"], ["a a b", "c x", "d e f"]
        each = metric.each(predictions, answers, sources)
        assert len(set(each)) > 1
        assert metric(predictions, answers, sources) == pytest.approx(np.mean(each))
    assert METRICS["macro_f1"].each(["a", "b"], ["A.", "c"]) == [100.0, 0.0]


def test_perplexity_is_the_one_where_lower_is_better() -> None:
    assert [name for name, metric in METRICS.items() if not metric.higher_is_better] == ["perplexity"]


@pytest.mark.parametrize("normal", ["the answer 42", "!", "", "naïve"])
def test_normalise_is_idempotent(normal: str) -> None:
    assert normalise(normal) == normal


def test_sari_of_a_case_computed_by_hand() -> None:
    # source "a b c", prediction "a c d", reference "a d"; longest text 3 words, so n = 1, 2, 3.
    # add:    n=1 {d} for {d}: 1; n=2 {ac, cd} for {ad}: 0; n=3 {acd} for {}: precision 0, so 0.
    # keep:   n=1 {a, c} for {a}: P 1/2, R 1, F 2/3; n=2, 3 nothing kept, nothing to keep: 1.
    # delete: n=1 {b} for {b, c}: 1; n=2, 3 everything, rightly: 1.
    expected = 100 * ((1 + 0 + 0) + (2 / 3 + 1 + 1) + (1 + 1 + 1)) / 9
    assert sari_score("a b c", "a c d", ["a d"]) == pytest.approx(expected)


def test_sari_of_the_published_examples() -> None:
    # The values that the metric's public implementations state for these sentences.
    source = "About 95 species are currently accepted."
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    assert sari_score(source, "About 95 you now get in.", references) == pytest.approx(26.953601953601954)
    assert sari_score(source, "About 95 you now get in.", references[:1]) == pytest.approx(21.805555555555557)


def test_sari_rewards_the_reference_and_not_the_source() -> None:
    source, reference = "the feline was seated upon the mat", "the cat sat on the mat"
    assert METRICS["sari"]([reference], [reference], [source]) == 100
    assert METRICS["sari"]([source], [reference], [source]) < 45
    assert sari_score("one two three", "x y z", ["one two"]) < 35  # wrong in every way


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], []), "as many predictions as answers"),
        (([], []), "at least one"),
    ],
)
def test_wrong_lengths_are_refused(arguments: tuple[list[str], list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS["accuracy"](*arguments)


def test_missing_sources_and_token_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="expected sources"):
        METRICS["sari"](["a"], ["a"])
    with pytest.raises(ValueError, match="running text"):
        METRICS["perplexity"](["a"], ["a"])


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'rougel' is not a metric; did you mean rouge_l\? allowed: accu") as caught:
        find_metric("rougel")
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"'perplexity' does not score pairs tasks"):
        find_metric("perplexity", "pairs")
    assert find_metric("macro_f1", "labelled").unit == "%"
