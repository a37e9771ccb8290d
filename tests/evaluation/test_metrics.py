import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.errors import UserError
from jaxcl.evaluation.metrics import METRICS, check_answers, f1, find_metric, normalise
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
        ("exact_match", "Yes.", "yes", 100.0),
        ("exact_match", "yes", " Yes. ", 100.0),
        ("exact_match", "5", "-5", 0.0),
        ("exact_match", "C", "C++", 0.0),
        ("exact_match", "C#", "C++", 0.0),
        ("exact_match", "a<b", "a>b", 0.0),
        ("exact_match", "1/2", "1 2", 0.0),
        ("exact_match", "50%", "$50", 0.0),
        ("exact_match", "3.5", "35", 0.0),
        ("exact_match", "x²", "x2", 0.0),
        ("exact_match", "...", "..", 0.0),
        ("exact_match", ".", "", 0.0),
        ("exact_match", "yes!", "yes", 0.0),
        ("exact_match", "Cafe\u0301", "caf\u00e9", 100.0),
        ("lenient_match", "Paris, France!", "paris france", 100.0),
        ("lenient_match", "-5", "5", 100.0),
        ("lenient_match", "Paris, France", "Paris", 0.0),
        ("accuracy", "cafe\u0301", "caf\u00e9", 100.0),
        ("macro_f1", "5", "-5", 0.0),
        ("macro_f1", "Yes.", "yes", 100.0),
        # Longest common subsequence "the sat mat" of 3 words; precision 3/4, recall 3/5.
        ("rouge_l", "the sat the mat", "the cat sat on mat", 100 * 2 * 0.75 * 0.6 / 1.35),
        ("rouge_l", "running", "runs", 100.0),  # same stem
        ("rouge_l", "schöne Grüße", "schöne Tage", 50.0),
        ("rouge_l", "东京", "东京都", 100 * 2 * 1 * (2 / 3) / (5 / 3)),
        ("rouge_l", "", "word", 0.0),
        ("rouge_l", "का", "कि", 0.0),  # another vowel sign
        ("rouge_l", "हिन्दी है", "हिन्दी था", 50.0),
        ("rouge_l", "กา", "กี", 0.0),
        ("rouge_l", "กาดี", "กามี", 200 / 3),  # three characters, the last with its sign; no space between words
        ("rouge_l", "cafe\u0301", "caf\u00e9", 100.0),
        ("rouge_l", "cafe\u0301", "cafe", 0.0),
        ("rouge_l", "が", "か\u3099", 100.0),
        ("rouge_l", "snake_case", "snake case", 100.0),  # as by rouge-score
        ("fuzzy", "cafe\u0301", "caf\u00e9", 100.0),
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
        ("choice_accuracy", "(A)", "(A)", 100.0),
        ("choice_accuracy", "A", "(A)", 100.0),
        ("choice_accuracy", "**B**", "[B]", 100.0),
        ("choice_accuracy", "2", "2", 100.0),
        ("choice_accuracy", "2. Paris", "2) Rome", 100.0),
        ("choice_accuracy", "1", "12", 0.0),
        ("choice_accuracy", "2.5", "2", 0.0),
        ("choice_accuracy", "-2", "2", 0.0),
        ("choice_accuracy", "(B)", "(A)", 0.0),
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


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        ("choice_accuracy", "Paris"),
        ("choice_accuracy", "-2"),
        ("rouge_l", "!"),
        ("rouge_l", ""),
    ],
)
def test_a_right_answer_that_cannot_score_is_an_error(metric: str, answer: str) -> None:
    rows = [{"prompt": "q", "answer": "A"}, {"prompt": "q", "answer": answer}]
    check_answers(metric, rows[:1], "task x: test")
    with pytest.raises(
        UserError, match=f"task x: test row 2: by the metric {metric} the right answer .*scores 0"
    ) as caught:
        check_answers(metric, rows, "task x: test")
    assert caught.value.exit_code == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=3), st.text(max_size=12))
def test_right_answers_score_full_by_every_other_metric(answers: list[str], prompt: str) -> None:
    rows = [{"prompt": prompt, "answer": answer} for answer in answers]
    for name, metric in METRICS.items():
        if "pairs" in metric.kinds and name not in ("choice_accuracy", "rouge_l"):
            check_answers(name, rows, "task x: test")
            assert metric(answers, answers, [prompt] * len(answers)) == pytest.approx(100)


def test_sari_counts_letters_with_their_signs() -> None:
    assert sari_score("x", "का", ["का"]) == 100
    assert sari_score("x", "का", ["कि"]) < 100
    assert sari_score("x", "cafe\u0301", ["caf\u00e9"]) == 100


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
