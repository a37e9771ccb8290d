"""Conversion between nested dicts of params and flat ones with paths such as `blocks/mlp/up/kernel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves by path.

    >>> flatten({"embed": {"embedding": 1}, "bias": 2})
    {'embed/embedding': 1, 'bias': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, path + "/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of these leaves.

    >>> unflatten({"embed/embedding": 1, "bias": 2})
    {'embed': {'embedding': 1}, 'bias': 2}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
