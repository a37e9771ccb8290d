"""Pictures that are drawn on the spot: what they show is what their answers say."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from jaxcl.data import drawn
from jaxcl.data.drawn import COLOURS, COUNTS, LETTERS, PLACES, SHAPES, Form, draw, names, read_drawn
from jaxcl.data.images.decode import decode
from jaxcl.data.images.reference import take_out
from jaxcl.data.sources import load_source, source_kind
from jaxcl.data.spec import SourceSpec
from jaxcl.errors import UserError

SCENES = ["count", "colour", "position", "shape"]
CLASSES = {"count": 6, "colour": 6, "position": 9, "shape": 5, "digits": 10, "glyphs": 26}


def everything(name: str) -> list[dict[str, Any]]:
    return [row for rows in read_drawn(name).splits.values() for row in rows]


def test_all_sources_are_covered() -> None:
    assert set(names()) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_sources_are_balanced_and_their_splits_share_no_picture(name: str) -> None:
    splits = read_drawn(name).splits
    assert len(splits["train"]) >= 1400
    assert min(len(splits["dev"]), len(splits["test"])) >= 150
    shown = {
        split: {(row["prompt"], row["image"].tobytes()) for row in splits[split]} for split in ("train", "dev", "test")
    }
    assert not shown["train"] & shown["test"] | shown["train"] & shown["dev"] | shown["dev"] & shown["test"]
    rows = everything(name)
    assert all(row["image"].dtype == np.uint8 and row["image"].shape[2] == 3 for row in rows)
    answers = Counter(row["answer"] for row in rows)
    assert len(answers) == CLASSES[name]
    assert max(answers.values()) < 2 * min(answers.values())
    for one, other in zip(rows, everything(name), strict=True):  # drawn again
        assert one["image"].tobytes() == other["image"].tobytes()
        assert (one["prompt"], one["answer"]) == (other["prompt"], other["answer"])


def found(image: np.ndarray) -> list[Form]:
    """The forms of a picture, from its pixels alone."""
    outlines = {draw([Form(shape, "white", 0)], 0)[:8, :8, 0].tobytes(): shape for shape in SHAPES}
    colours = {value: name for name, value in COLOURS.items()}
    forms = []
    for place in range(9):
        row, column = 8 * (place // 3), 8 * (place % 3)
        cell = image[row : row + 8, column : column + 8]
        covered = (cell != cell[0, 0]).any(axis=-1)
        if covered.any():
            (colour,) = {tuple(map(int, pixel)) for pixel in cell[covered]}
            forms.append(Form(outlines[(covered * np.uint8(250)).tobytes()], colours[colour], place))
    return forms


@pytest.mark.parametrize("name", SCENES)
def test_answers_about_scenes_are_true(name: str) -> None:
    for row in everything(name)[:600]:
        forms = found(row["image"])
        words = row["prompt"].split()
        if name == "count":
            answers = [COUNTS[len(forms) - 1]]
        elif name == "colour":
            answers = [form.colour for form in forms]
        elif name == "shape":
            answers = [form.shape for form in forms if form.colour == words[-1]]
        else:
            answers = [PLACES[form.place] for form in forms if form.colour == words[-1]]
        assert answers == [row["answer"]], row["prompt"]
    counts = Counter(len(found(row["image"])) for row in everything(name)[:600])
    assert set(counts) == {"count": {1, 2, 3, 4, 5, 6}, "colour": {1}}.get(name, {2})


def test_places_are_called_as_they_are_seen() -> None:
    assert [PLACES[place] for place in (0, 2, 4, 6, 8)] == [
        "top left", "top right", "middle", "bottom left", "bottom right",
    ]  # fmt: skip
    image = draw([Form("square", "red", PLACES.index("bottom left"))], 0)
    assert image[16:, :8].any()
    assert not image[:16].any()
    assert not image[:, 8:].any()


def test_forms_differ_and_are_whole() -> None:
    pictures = [draw([Form(shape, "white", 4)], 0) for shape in SHAPES]
    assert len({one.tobytes() for one in pictures}) == len(SHAPES)
    assert all(10 <= one.any(axis=-1).sum() <= 36 for one in pictures)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    wanted = load_digits()
    own = {(row["image"][..., 0].tobytes(), row["answer"]) for row in everything("digits")}
    for image, digit in zip(wanted.images[:200], wanted.target[:200], strict=True):
        grey = np.array([[round(255 - 255 * value / 16) for value in line] for line in image])
        near = [one for one, answer in own if answer == str(digit)]
        assert any(abs(np.frombuffer(one, np.uint8).reshape(8, 8).astype(int) - grey).max() <= 1 for one in near)


def test_letters_are_those_of_the_font_wherever_they_are() -> None:
    outlines: dict[str, set[bytes]] = {}
    for row in everything("glyphs"):
        ground = row["image"][0, 0] if (row["image"] == row["image"][0, 0]).all(axis=-1).mean() > 0.5 else None
        ground = row["image"][-1, -1] if ground is None else ground
        covered = (row["image"] != ground).any(axis=-1)
        rows, columns = covered.any(axis=1).nonzero()[0], covered.any(axis=0).nonzero()[0]
        cut = covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        outlines.setdefault(row["answer"], set()).add(bytes(cut.shape) + cut.tobytes())
    assert set(outlines) == set(LETTERS)
    assert all(len(one) == 1 for one in outlines.values())
    assert len(set.union(*outlines.values())) == len(LETTERS)


def test_rows_hold_their_images_under_any_names_of_fields() -> None:
    task = load_source("drawn:colour", train=20, test=5)
    assert task.kind == source_kind(SourceSpec(source="drawn:colour")) == "pairs"
    (_, (image,)) = take_out(task.train[0]["prompt"], "a row")
    pictures = {row["image"].tobytes() for row in read_drawn("colour").splits["train"]}
    assert decode(image.content, "a row").tobytes() in pictures
    renamed = load_source("drawn:colour", train=20, test=5, image_field="x", prompt_field="y", answer_field="z")
    assert list(renamed.train) == list(task.train)
    asked = load_source("drawn:colour", train=20, test=5, prompt_template="<image> {prompt} Answer:")
    assert take_out(asked.train[0]["prompt"], "a row")[0].endswith(" Answer:")


def test_an_unknown_source_is_an_error() -> None:
    with pytest.raises(UserError, match="drawn:color is not known; nearest is colour; allowed: count, colour"):
        load_source("drawn:color")


def test_without_pillow_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"drawn:glyphs needs the package pillow: pip install 'jaxcl\[vision\]'"):
        drawn.read_drawn("glyphs")
    with pytest.raises(UserError, match=r"images need the package pillow: pip install 'jaxcl\[vision\]'"):
        load_source("drawn:colour")
