"""Values of records as text, and labels as classes."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxcl.errors import UserError


def as_text(value: Any, field: str, place: object) -> str:
    """A field of a record as text.

    A whole number is written without decimal places, whether it was read as an integer or as a float: a column with
    a missing value often turns `1` into `1.0`. Bytes that are not UTF-8 become U+FFFD.

    >>> as_text(2.0, "answer", "rows.jsonl line 1"), as_text(2.5, "answer", "rows.jsonl line 2")
    ('2', '2.5')

    Args:
      value: the value.
      field: name of its field, for messages.
      place: file and line of the record, for messages; written as text.

    Raises:
      UserError: the value is null, NaN, infinite, a list or an object, or holds half of a surrogate pair.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str):
        if half := lone_surrogate(value):
            raise UserError(f"{place}: field {field!r} holds {half}; expected text")
        return value
    if isinstance(value, bool | int | np.bool_ | np.integer):
        return str(value)
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise UserError(f"{place}: field {field!r} is {json_kind(value)}; expected text or a number")
        return str(int(value)) if float(value).is_integer() and abs(float(value)) < 2**53 else str(value)
    raise UserError(f"{place}: field {field!r} is {json_kind(value)}; expected text")


def lone_surrogate(text: str) -> str | None:
    r"""What is wrong with a text that holds half of a surrogate pair, which UTF-8 cannot encode; none if nothing is.

    >>> lone_surrogate("cut \ud83d")
    'half of a surrogate pair (U+D83D) at character 5'
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start + 1}"
    return None


def json_kind(value: Any) -> str:
    """What a value is, in words of JSON."""
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def same_class(label: str) -> str:
    """What labels of one class have in common.

    Outer white space, the way in which a letter with an accent is composed, and the decimal places of a whole number
    make no difference.

    >>> same_class("pos ") == same_class("pos"), same_class("1.0") == same_class("1"), same_class("1.5")
    (True, True, '1.5')
    """
    bare = unicodedata.normalize("NFC", label.strip())
    whole = re.fullmatch(r"([+-]?[0-9]+)\.0+", bare)
    return whole[1] if whole else bare


def class_names(labels: Iterable[str], ordered: Sequence[str], where: str) -> dict[str, str]:
    """Names of classes by what their labels have in common, see `same_class`.

    Args:
      labels: all labels that occur.
      ordered: class names that the source states, in its order; empty if it states none.
      where: the source, for messages.

    Returns:
      The source's names, or the shortest form of each label that occurs, sorted.

    Raises:
      UserError: two of the source's names are one class.
    """
    names: dict[str, str] = {}
    if ordered:
        for label in ordered:
            if same_class(label) in names:
                raise UserError(f"{where}: the classes {names[same_class(label)]!r} and {label!r} are the same")
            names[same_class(label)] = label
        return names
    for label in sorted({label.strip() for label in labels}, key=lambda label: (len(label), label)):
        names.setdefault(same_class(label), label)
    return dict(sorted(names.items(), key=lambda item: item[1]))
