"""Base class of every configuration section."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Schema(BaseModel):
    """A frozen, typed configuration section that refuses unknown keys.

    Every field carries a `Field(description=...)`: the configuration reference in `docs/` is generated from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, content: Any) -> Any:
        """Refuses true and false where a number is needed, which pydantic would take for 1 and 0."""
        if isinstance(content, Mapping):
            for name, field in cls.model_fields.items():
                value = content.get(name)
                given = value if isinstance(value, list | tuple) else [value]
                if any(isinstance(one, bool) for one in given) and _is_number(field.annotation):
                    context = {"key": name, "given": repr(value)}
                    raise PydanticCustomError("truth_value", "must be a number, got {given}", context)
        return content


def _is_number(annotation: Any) -> bool:
    allowed = set(leaves(annotation))
    return bool(allowed & {int, float}) and bool not in allowed


def leaves(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, and the values of its `Literal`s.

    >>> list(leaves(tuple[int, ...] | None))
    [<class 'int'>, Ellipsis, <class 'NoneType'>]
    """
    arguments = typing.get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from leaves(argument)
