"""Questions about pictures that are drawn on the spot: scenes of simple forms, scikit-learn's digits, glyphs of a font.

What a question is about is its last word: small models learn from scratch to look for what they have just read.
Every row follows from its number alone, and a hash of what it shows and asks decides its split, so both are the same on
every machine.
"""

from __future__ import annotations

import difflib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, UInt8

from jaxcl.data.embedded import Embedded, Row, split_rows
from jaxcl.errors import UserError

_Item = TypeVar("_Item")
_Image = UInt8[np.ndarray, "height width 3"]

# Rows of a source of scenes, and of glyphs.
_ROWS = 4000
# Scenes are grids of places, as many along each side, and of cells of pixels.
_SIDE, _CELL = 3, 8
# Pixels along each side of the picture of a letter.
_CANVAS = 12
# Greys of grounds are below this, far from all colours.
_DARK = 64

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "pink": (240, 90, 220),
    "white": (250, 250, 250),
}
SHAPES = ("square", "disc", "cross", "triangle", "frame")
PLACES = tuple(
    f"{row} {column}".replace("middle middle", "middle")
    for row in ("top", "middle", "bottom")
    for column in ("left", "middle", "right")
)
COUNTS = ("one", "two", "three", "four", "five", "six")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Form(NamedTuple):
    """A form of a scene: one of `SHAPES`, one of `COLOURS`, and the number of its place, row by row."""

    shape: str
    colour: str
    place: int


def read_drawn(name: str) -> Embedded:
    """Draws a source.

    Args:
      name: one of `names()`.

    Returns:
      Rows of `prompt`, `answer` and `image`, an array `[height, width, 3]` of uint8.

    Raises:
      UserError: there is no such source.

    >>> row = read_drawn("shape").splits["train"][0]
    >>> row["prompt"], row["answer"], row["image"].shape
    ('Name the form in white', 'cross', (24, 24, 3))
    """
    if name not in _SOURCES:
        near = difflib.get_close_matches(name, _SOURCES, n=1, cutoff=0.0)[0]
        raise UserError(f"source drawn:{name} is not known; nearest is {near}; allowed: {', '.join(_SOURCES)}")
    return Embedded(split_rows(_SOURCES[name](), lambda row: f"{row['prompt']} {row['image'].tobytes().hex()}"))


def names() -> list[str]:
    """Names of all sources."""
    return list(_SOURCES)


class _Draws:
    """Random numbers that follow from a text, the same in every version of Python."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        return int(self._random() * limit)

    def some(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """Some of the items, none twice, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


# ---------------------------------------------------------------- scenes


def draw(forms: Iterable[Form], ground: int) -> _Image:
    """The picture of a scene.

    Args:
      forms: the forms, each in a place of its own.
      ground: what is behind them: a grey, 0 to 255.
    """
    image = np.full((_SIDE * _CELL, _SIDE * _CELL, 3), ground, np.uint8)
    for form in forms:
        row, column = (_CELL * index for index in divmod(form.place, _SIDE))
        image[row : row + _CELL, column : column + _CELL][_outline(form.shape)] = COLOURS[form.colour]
    return image


def _outline(shape: str) -> Bool[np.ndarray, "cell cell"]:
    """Which pixels of a cell a form covers; a line of pixels around it is free."""
    y, x = np.mgrid[:_CELL, :_CELL] - (_CELL - 1) / 2
    reach = _CELL / 2 - 1
    whole = (abs(x) < reach) & (abs(y) < reach)
    covered: dict[str, Bool[np.ndarray, "cell cell"]] = {
        "square": whole,
        "disc": x**2 + y**2 < reach**2,
        "cross": whole & ((abs(x) < 1) | (abs(y) < 1)),
        "triangle": whole & (2 * abs(x) <= y + reach + 0.5),
        "frame": whole & ((abs(x) > reach - 1) | (abs(y) > reach - 1)),
    }
    return covered[shape]


def _scenes(name: str, ask: Callable[[_Draws], tuple[list[Form], str, str]]) -> list[Row]:
    """Rows about scenes.

    Args:
      name: what the random numbers follow from.
      ask: a scene's forms, a question about them and its answer.
    """
    rows = []
    for number in range(_ROWS):
        draws = _Draws(f"{name} {number}")
        forms, prompt, answer = ask(draws)
        rows.append({"prompt": prompt, "answer": answer, "image": draw(forms, draws.below(_DARK))})
    return rows


def _two(draws: _Draws) -> list[Form]:
    """Two forms that share nothing."""
    parts = (draws.some(kinds, 2) for kinds in (SHAPES, tuple(COLOURS), range(len(PLACES))))
    return [*itertools.starmap(Form, zip(*parts, strict=True))]


def _colour(draws: _Draws) -> tuple[list[Form], str, str]:
    forms = _two(draws)[:1]
    return forms, "Name the colour", forms[0].colour


def _shape(draws: _Draws) -> tuple[list[Form], str, str]:
    forms = _two(draws)
    return forms, f"Name the form in {forms[0].colour}", forms[0].shape


def _position(draws: _Draws) -> tuple[list[Form], str, str]:
    forms = _two(draws)
    return forms, f"Find the form in {forms[0].colour}", PLACES[forms[0].place]


def _count(draws: _Draws) -> tuple[list[Form], str, str]:
    count = 1 + draws.below(len(COUNTS))
    places = draws.some(range(len(PLACES)), count)
    forms = [Form(draws.some(SHAPES, 1)[0], draws.some(tuple(COLOURS), 1)[0], place) for place in places]
    return forms, "Count the forms", COUNTS[count - 1]


# ---------------------------------------------------------------- characters


def _digits() -> list[Row]:
    """The handwritten digits that come with scikit-learn, 8 by 8 pixels, dark on white."""
    from sklearn.datasets import load_digits

    found = load_digits()
    greys = (255 - np.rint(found.images * (255 / 16))).astype(np.uint8)
    return [
        {"prompt": "Read the digit", "answer": str(digit), "image": np.repeat(grey[..., None], 3, axis=-1)}
        for grey, digit in zip(greys, found.target, strict=True)
    ]


def _glyphs() -> list[Row]:
    """Letters of the font that comes with Pillow, in one of `COLOURS`, about the middle of 12 by 12 pixels."""
    shapes = {letter: _glyph(letter) for letter in LETTERS}
    rows = []
    for number in range(_ROWS):
        draws = _Draws(f"glyphs {number}")
        letter, colour = draws.some(LETTERS, 1)[0], draws.some(tuple(COLOURS.values()), 1)[0]
        image = np.full((_CANVAS, _CANVAS, 3), draws.below(_DARK), np.uint8)
        height, width = shapes[letter].shape
        top, left = ((_CANVAS - side) // 2 + draws.below(3) - 1 for side in (height, width))
        image[top : top + height, left : left + width][shapes[letter]] = colour
        rows.append({"prompt": "Read the letter", "answer": letter, "image": image})
    return rows


def _glyph(letter: str) -> Bool[np.ndarray, "height width"]:
    """The pixels that a letter covers, without what is empty around it."""
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise UserError("source drawn:glyphs needs the package pillow: pip install 'jaxcl[vision]'") from error
    mask = ImageFont.load_default_imagefont().getmask(letter)
    covered = np.array(mask, np.uint8).reshape(mask.size[::-1]) > 0
    rows, columns = (np.flatnonzero(np.any(covered, axis=axis)) for axis in (1, 0))
    return covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


_SOURCES: dict[str, Callable[[], list[Row]]] = {
    "count": lambda: _scenes("count", _count),
    "colour": lambda: _scenes("colour", _colour),
    "position": lambda: _scenes("position", _position),
    "shape": lambda: _scenes("shape", _shape),
    "digits": _digits,
    "glyphs": _glyphs,
}
