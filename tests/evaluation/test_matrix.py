import math

import numpy as np
import pytest

from jaxcl.functional.matrix import ContinualMatrix

UP = [True, True, True]

# Task 0 falls from 80 by way of 85 to 60, task 1 from 70 to 75, task 2 ends at 90.
ROWS = [[80.0, 20.0, 5.0], [85.0, 70.0, 30.0], [60.0, 75.0, 90.0]]
INITIAL = [10.0, 12.0, 14.0]


def matrix(rows: list[list[float]] = ROWS, initial: list[float] | None = INITIAL) -> ContinualMatrix:
    return ContinualMatrix.from_lists(rows, initial, UP)


def test_derived_numbers_of_a_case_computed_by_hand() -> None:
    m = matrix()
    assert m.overall_performance() == pytest.approx((60 + 75 + 90) / 3)
    assert m.backward_transfer() == pytest.approx(((60 - 80) + (75 - 70)) / 2)
    assert m.forgetting_rate() == pytest.approx(((80 - 60) + (70 - 75)) / 2)
    assert m.forgetting() == pytest.approx(((85 - 60) + (70 - 75)) / 2)
    assert m.forward_transfer() == pytest.approx(((20 - 12) + (30 - 14)) / 2)
    assert m.intransigence([90.0, 80.0, 95.0]) == pytest.approx((10 + 10 + 5) / 3)


def test_lower_is_better_turns_transfer_but_not_the_mean() -> None:
    falling = ContinualMatrix.from_lists([[10.0, 50.0], [14.0, 8.0]], [60.0, 55.0], [False, False])
    assert falling.overall_performance() == pytest.approx(11)
    assert falling.backward_transfer() == pytest.approx(-4)  # perplexity rose: forgotten
    assert falling.forgetting() == pytest.approx(4)
    assert falling.forward_transfer() == pytest.approx(5)  # 55 to 50: better
    assert falling.intransigence([9.0, 8.0]) == pytest.approx(0.5)  # (10 - 9 + 8 - 8) / 2


def test_mixed_directions_have_transfer_but_no_mean() -> None:
    mixed = ContinualMatrix.from_lists([[80.0, None], [70.0, 8.0]], None, [True, False])
    assert math.isnan(mixed.overall_performance())
    assert mixed.backward_transfer() == pytest.approx(-10)


def test_future_scores_change_only_forward_transfer() -> None:
    lower = ContinualMatrix.from_lists([row[: index + 1] for index, row in enumerate(ROWS)], None, UP)
    full = matrix()
    for name in ("overall_performance", "backward_transfer", "forgetting", "forgetting_rate"):
        assert getattr(lower, name)() == getattr(full, name)()
    assert math.isnan(lower.forward_transfer())


def test_unfinished_run_is_judged_by_its_last_row() -> None:
    m = matrix(ROWS[:2])
    assert m.overall_performance() == pytest.approx((85 + 70) / 2)
    assert m.backward_transfer() == pytest.approx(5)
    assert m.forward_transfer() == pytest.approx(8)
    first = matrix(ROWS[:1])
    assert first.overall_performance() == 80
    assert all(math.isnan(value) for value in (first.backward_transfer(), first.forgetting(), first.forward_transfer()))


def test_joint_training_has_one_row_of_learned_tasks() -> None:
    m = ContinualMatrix.empty(3, UP, joint=True)
    for task, score in enumerate((50.0, 60.0, 70.0)):
        m = m.record(0, task, score)
    assert m.learned == 3
    assert m.overall_performance() == pytest.approx(60)
    assert math.isnan(m.backward_transfer())
    assert math.isnan(m.intransigence([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="row"):
        m.record(1, 0, 1.0)


def test_recording_gives_the_same_matrix_as_lists_and_leaves_the_old_one() -> None:
    m = ContinualMatrix.empty(3, UP)
    for task, score in enumerate(INITIAL):
        m = m.record(-1, task, score)
    before = m
    for row, scores in enumerate(ROWS):
        for task, score in enumerate(scores):
            m = m.record(row, task, score)
    np.testing.assert_array_equal(m.scores, matrix().scores)
    assert m.rows() == ROWS
    assert m.initial_row() == INITIAL
    assert before.rows() == []
    assert matrix([[1.0]], None).rows() == [[1.0, None, None]]
    assert matrix([[1.0]], None).initial_row() is None


def test_a_missing_score_spoils_only_what_needs_it() -> None:
    m = ContinualMatrix.from_lists([[80.0], [None, 70.0], [60.0, 75.0, 90.0]], None, UP)
    assert math.isnan(m.forgetting())
    assert m.backward_transfer() == pytest.approx(-7.5)


@pytest.mark.parametrize(("row", "task"), [(-2, 0), (1, 0), (0, 3), (0, -1)])
def test_places_outside_the_matrix_are_refused(row: int, task: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        ContinualMatrix.empty(3, UP).record(row, task, 1.0)


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        ContinualMatrix.from_lists([[1.0, 2.0]], None, [True])
    with pytest.raises(ValueError, match="higher_is_better"):
        ContinualMatrix.empty(2, [True])
    with pytest.raises(ValueError, match="reference"):
        matrix().intransigence([1.0])


def test_carried_scores_are_those_of_the_row_before() -> None:
    matrix = ContinualMatrix.empty(3, [True] * 3).record(-1, 0, 5.0).record(0, 0, 80.0).record(0, 1, 20.0)
    matrix = matrix.carry().record(1, 1, 70.0).carry().record(2, 2, 60.0)
    assert matrix.rows() == [[80.0, 20.0, None], [80.0, 70.0, None], [80.0, 70.0, 60.0]]
    assert matrix.initial_row() == [5.0, None, None]
    assert matrix.backward_transfer() == 0.0
    assert matrix.overall_performance() == 70.0


def test_gain_compares_the_end_with_the_model_before_training() -> None:
    rows = [[60.0, None], [50.0, 80.0]]
    assert ContinualMatrix.from_lists(rows, [20.0, 30.0], [True, True]).gain() == 40.0  # (30 + 50) / 2
    assert ContinualMatrix.from_lists(rows, [20.0, 30.0], [False, False]).gain() == -40.0
    assert ContinualMatrix.from_lists(rows[:1], [20.0, 30.0], [True, True]).gain() == 40.0  # the task learned alone
    assert ContinualMatrix.from_lists([[60.0, 80.0]], [20.0, 30.0], [True, True], joint=True).gain() == 45.0
    assert np.isnan(ContinualMatrix.from_lists(rows, None, [True, True]).gain())


def test_rows_that_were_not_measured_are_empty() -> None:
    matrix = ContinualMatrix.empty(2, [True, True]).up_to(1).record(1, 1, 80.0)
    assert matrix.rows() == [[None, None], [None, 80.0]]
    assert matrix.up_to(1).rows() == matrix.rows()
