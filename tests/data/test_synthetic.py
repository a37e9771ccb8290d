"""What is taken of samples that a model wrote, on cases made by hand."""

from __future__ import annotations

import pytest

from jaxcl.data.synthetic import Frame, Sample, choose_samples, read_body, shared_frame


@pytest.mark.parametrize(
    ("prompts", "frame"),
    [
        (["Do it.\nInput: red\nOutput: ", "Do it.\nInput: rose\nOutput: "], Frame("Do it.\nInput: ", "\nOutput: ")),
        (["Input: a day .\nOutput: ", "Input: one night .\nOutput: "], Frame("Input: ", "\nOutput: ")),
        (["Say: good dog. Go", "Say: bad frog. Go"], Frame("Say: ", " Go")),
        (["one two", "three four"], Frame("", "")),
        (["the same", "the same"], Frame("the same", "")),
        (["alone"], Frame("alone", "")),
    ],
)
def test_a_frame_is_what_all_prompts_share_and_takes_no_word_apart(prompts: list[str], frame: Frame) -> None:
    assert shared_frame(prompts) == frame


def test_a_body_ends_at_the_suffix() -> None:
    assert read_body("blue\nOutput: x\nOutput: y", "\nOutput: ") == "blue"
    assert read_body("blue sky", "\nOutput: ") is None
    assert read_body("\nOutput:", "\nOutput: ") is None
    assert read_body("first line\nsecond", "") == "first line"


REAL = ["the quick brown fox jumps over the lazy dog", "an apple a day"]


def test_samples_are_taken_by_likelihood_and_never_twice_or_from_the_data() -> None:
    samples = [
        Sample("The quick brown fox jumped over the lazy  DOG", "copy", -0.01),
        Sample("a walk along the river", "fine", -0.5),
        Sample("a walk along the rivers", "again", -0.6),
        Sample(None, "", -9.0),
        Sample("snow in the mountains", " ", -0.1),
        Sample("bread from the oven", "best", -0.2),
        Sample("letters from abroad", "third", -0.9),
        Sample("music at night", "last", -1.9),
    ]
    chosen = choose_samples(samples, REAL, 3, 0.8)
    assert [one.answer for one in chosen.samples] == ["best", "fine", "third"]
    assert chosen.dropped == {"unfinished": 2, "copy": 1, "repeated": 1, "unlikely": 1}


def test_answers_that_ended_come_first() -> None:
    samples = [
        Sample("snow", "endless", -0.1, ended=False),
        Sample("rain", "short", -2.0),
        Sample("hail", "brief", -1.0),
    ]
    assert [one.answer for one in choose_samples(samples, [], 3, 0.8).samples] == ["brief", "short", "endless"]


def test_similarity_is_where_a_copy_begins() -> None:
    """Of 4 + 4 letters the two texts share 2 + 2: half."""
    sample = [Sample("abxy", "answer", 0.0)]
    assert not choose_samples(sample, ["abcd"], 1, 0.49).samples
    assert choose_samples(sample, ["abcd"], 1, 0.51).samples
