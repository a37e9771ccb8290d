"""The configuration reference in Markdown, generated from the types."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jaxcl.methods.registry import METHODS, find_method

_BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def reference(config: type[BaseModel]) -> str:
    """All keys with type, default and description.

    Args:
      config: type of the whole configuration.

    Returns:
      A Markdown page with a table for the top level, one per section, and one per method.
    """
    parts = [
        "# Configuration\n",
        "Generated from the types by `make docs`. Keys are set in the YAML file or, dotted, on the command line: "
        "`jaxcl run CONFIG training.batch_size=8 tasks.*.train=500`. There a value of text is taken as it is, without "
        "quotes around it; any other is YAML, read by the rules of version 1.2 (`010` is ten, `1e-4` a number).\n",
        "## Top level\n",
        _table(config),
    ]
    # Architectures have sections in common.
    for title, section in dict.fromkeys(_sections(config, "")):
        parts += [f"## {title}\n", f"{_first_line(section)}\n", _table(section)]
    for name, method in ((name, find_method(name)) for name in METHODS):
        parts += [f"## method: {name}\n", f"{_first_line(method)}\n"]
        parts += [_table(method.Options)] if method.Options.model_fields else ["No options.\n"]
        for title, section in _sections(method.Options, "method."):
            parts += [f"## {title} ({name})\n", f"{_first_line(section)}\n", _table(section)]
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if name == "method":
            continue
        members = _models(field.annotation)
        for member in members:
            tag = member.model_fields.get("architecture")
            label = f"{prefix}{name}" + (f": {typing.get_args(tag.annotation)[0]}" if tag and len(members) > 1 else "")
            yield label, member
            yield from _sections(member, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        text = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field)} | {_default(field)} | {text} |")
    return "\n".join(rows) + "\n"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(item, attribute)}"
        for item in field.metadata
        for kind, attribute, sign in _BOUNDS
        if isinstance(item, kind)
    ]
    return _name(field.annotation) + (f" ({', '.join(bounds)})" if bounds else "")


def _name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin in (tuple, list):
        return f"list of {_name(arguments[0])}"
    if arguments:
        return " or ".join(dict.fromkeys(_name(argument) for argument in arguments))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "defaults below"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "defaults below"
    return "none" if field.default in (None, "", ()) else f"`{field.default}`"


def _first_line(owner: type) -> str:
    return (owner.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").strip()
