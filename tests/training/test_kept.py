"""Which checkpoints stay on disk."""

from __future__ import annotations

from types import SimpleNamespace

from jaxcl.training.kept import START_MARK, Kept, mark_after, mark_before_decay


def kept(policy: Kept, marks: list[str | None]) -> list[str | None]:
    """What is left of checkpoints that are saved one after another, as Orbax removes them."""
    left: list[int] = []
    for number, mark in enumerate(marks):
        if mark is not None:
            policy.marks[number] = mark
        left.append(number)
        answers = policy.should_preserve([SimpleNamespace(step=one) for one in left], context=None)
        left = [one for one, stays in zip(left, answers, strict=True) if stays]
    return [marks[number] for number in left]


def test_the_start_of_the_next_task_is_kept_and_that_of_the_one_that_is_learned() -> None:
    marks = [START_MARK, mark_before_decay(0), mark_after(0), None]
    assert kept(Kept(1, 1), marks) == [mark_before_decay(0), mark_after(0), None]
    # Until task 1 is learned, a run may have to begin it again.
    marks += [mark_before_decay(1)]
    assert kept(Kept(1, 1), marks) == [mark_before_decay(0), mark_after(0), mark_before_decay(1)]
    assert kept(Kept(1, 1), [*marks, None, mark_after(1)]) == [mark_before_decay(1), mark_after(1)]


def test_each_task_that_is_kept_has_its_start_of_the_next() -> None:
    marks = [mark for task in range(4) for mark in (None, mark_before_decay(task), None, mark_after(task))]
    expected = [mark for task in (2, 3) for mark in (mark_before_decay(task), mark_after(task))]
    assert kept(Kept(1, 2), marks) == expected
    assert len(kept(Kept(1, None), marks)) == 8


def test_of_a_task_that_was_decayed_twice_the_later_start_is_kept() -> None:
    policy = Kept(1, 1)
    assert kept(policy, [mark_before_decay(0), mark_before_decay(0), mark_after(0)]) == [
        mark_before_decay(0),
        mark_after(0),
    ]
    assert list(policy.marks) == [0, 1, 2]


def test_a_checkpoint_within_a_task_is_kept_with_that_from_before_it() -> None:
    """If the one after the task turns out to be damaged, the run goes on from there."""
    marks = [START_MARK, None, mark_after(0)]
    assert kept(Kept(2, 1), marks) == marks
    assert kept(Kept(2, 1), [*marks, None, None]) == [mark_after(0), None, None]
    assert kept(Kept(1, 1), marks) == [mark_after(0)]
