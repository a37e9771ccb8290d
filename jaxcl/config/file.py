"""Reads YAML with dotted overrides into a validated section; every error is one line."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from jaxcl.config.plain_yaml import UNREADABLE, compose_yaml, dump_yaml, load_yaml
from jaxcl.errors import UserError, nearest
from jaxcl.schema import leaves

Section = TypeVar("Section", bound=BaseModel)

__all__ = ["ConfigError", "apply_overrides", "dump_yaml", "read_yaml", "takes_text", "validate"]


class ConfigError(UserError):
    """A configuration that cannot be used; exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
      ConfigError: the file is missing, unreadable or not a mapping; for malformed YAML, with the line.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error) or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(content).__name__}")
    return content


def apply_overrides(
    content: dict[str, Any],
    overrides: Iterable[str],
    is_text: Callable[[Sequence[str], Mapping[str, Any]], bool] = lambda path, content: False,
) -> dict[str, Any]:
    """Sets dotted keys; list items are given by index, or all by `*`.

    >>> apply_overrides({"tasks": [{"train": 5}, {"train": 6}]}, ["tasks.*.train=2", "seed=1"])
    {'tasks': [{'train': 2}, {'train': 2}], 'seed': 1}

    Args:
      content: nested mappings and lists; changed in place.
      overrides: `KEY=VALUE`. A value of text is taken as it is, without quotes around it; any other is YAML.
      is_text: whether the value of a key, given by its parts, is text; called with `content` so far.

    Returns:
      `content`.

    Raises:
      ConfigError: no `=`, an invalid value, or a list index out of range.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected KEY=VALUE, such as training.batch_size=8")
        path = key.split(".")
        _assign(content, path, _value(text.strip(), is_text(path, content), override), override)
    return content


def _value(text: str, wants_text: bool, override: str) -> Any:
    """The value of an override; text is taken as it is, except for `null` and for quotes around all of it."""
    try:
        node = compose_yaml(text)
        value = load_yaml(text)
    except UNREADABLE:
        if wants_text:
            return text
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    whole = node is None or node.end_mark.index == len(text)
    if whole and (value is None or (isinstance(node, yaml.ScalarNode) and node.style is not None)):
        return value
    if wants_text or (isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None):
        return text
    if not whole:
        raise ConfigError(f"override {override!r}: what follows the value would be ignored, as a comment in YAML")
    return value


def takes_text(section: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the value of a key of `section`, given by its parts, is text, or text or none."""
    candidates: list[type[BaseModel]] = [section]
    found: list[Any] = []
    for step in path:
        if step == "*" or step.isdecimal():
            found = []
            continue
        found = [model.model_fields[step].annotation for model in candidates if step in model.model_fields]
        candidates = [model for annotation in found for model in _models_in(annotation)]
    return bool(found) and all({*leaves(annotation)} in ({str}, {str, types.NoneType}) for annotation in found)


def _assign(node: Any, path: Sequence[str], value: Any, override: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if head != "*" and not (head.isdecimal() and len(head) < 10 and int(head) < len(node)):
            raise ConfigError(
                f"override {override!r}: {head!r} is not an item of a list of {len(node)}; use an index from 0, or *"
            )
        items: Iterable[int] = range(len(node)) if head == "*" else [int(head)]
        for index in items:
            if rest:
                _assign(node[index], rest, value, override)
            else:
                node[index] = value
    elif isinstance(node, dict):
        if not rest:
            node[head] = value
        else:
            if not isinstance(node.get(head), dict | list):
                node[head] = {}
            _assign(node[head], rest, value, override)
    else:
        raise ConfigError(f"override {override!r}: {head!r} is a key below a plain value")


def validate(section: type[Section], content: Mapping[str, Any], origin: str) -> Section:
    """Validates `content`; a `ConfigError` is one line with the key, the value and what is allowed."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        _raise_first(error, section, origin)


def _raise_first(error: ValidationError, section: type[BaseModel], origin: str) -> NoReturn:
    # A missing key is often caused by an unknown one, which is reported first.
    errors = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    path, owner = _resolve(section, first["loc"])
    message, value = first["msg"], first.get("input")
    if first["type"] == "extra_forbidden":
        names = sorted(owner.model_fields) if owner else []
        message = f"unknown key{nearest(str(first['loc'][-1]), names)} allowed here: {', '.join(names)}"
    elif first["type"] == "truth_value":  # found by the section, not by the field
        path = f"{path}.{first['ctx']['key']}".lstrip(".")
    elif first["type"] == "missing":
        message = "missing; it has no default"
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = first["ctx"]["discriminator"].strip("'")
        given = value.get(tag) if isinstance(value, Mapping) else None
        allowed = first["ctx"].get("expected_tags", "")
        names = [name.strip(" '") for name in allowed.split(",")]
        path = f"{path}.{tag}" if path else tag
        message = f"got {given!r}{nearest(str(given), names)} allowed: {', '.join(names)}" if given else "missing"
    else:
        message = message.removeprefix("Value error, ")
        if not isinstance(value, Mapping | BaseModel):
            message += f", got {value!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise ConfigError(f"{origin}: {path + ': ' if path else ''}{message}{more}")


def _resolve(section: type[BaseModel], location: Sequence[int | str]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key at a pydantic location (which includes union members), and the section that owns it."""
    parts: list[str] = []
    owner: type[BaseModel] | None = section
    candidates: list[type[BaseModel]] = [section]
    for step in location:
        if isinstance(step, int):
            parts.append(str(step))
            continue
        tagged = [model for model in candidates if _tag(model) == step]
        field = next((model.model_fields[step] for model in candidates if step in model.model_fields), None)
        if len(candidates) > 1 and tagged:
            candidates = tagged
            owner = tagged[0]
        elif field is not None:
            owner = next(model for model in candidates if step in model.model_fields)
            parts.append(step)
            candidates = list(_models_in(field.annotation))
        else:
            owner = candidates[0] if candidates else owner
            parts.append(step)
    return ".".join(parts), owner


def _tag(model: type[BaseModel]) -> str | None:
    for name in ("architecture", "name"):
        field = model.model_fields.get(name)
        if field is not None and typing.get_origin(field.annotation) is typing.Literal:
            return str(typing.get_args(field.annotation)[0])
    return None


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
