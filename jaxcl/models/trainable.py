"""Which part of a network's params is trained: all of them, or adapters and soft tokens where it has any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Params = dict[str, Any]
"""The params of a network: nested dicts with arrays, or whatever is kept for each of them, as leaves."""

ADAPTER_NAMES = ("lora_a", "lora_b")
"""Names of the two params of an adapter."""

SOFT_TOKENS = "soft_tokens"
"""Name of the subtree of soft tokens; see `jaxcl.models.soft_tokens`."""


def trained(tree: Params) -> Params:
    """The part of a params tree that training changes: adapters and soft tokens where there are any, else all of it.

    Serves params and whatever has their tree: shapes, shardings, masks.

    >>> trained({"embed": 0, "query": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "norm": {"scale": 4}})
    {'query': {'lora_a': 2, 'lora_b': 3}}
    >>> trained({"embed": 0, "query": {"kernel": 1}})
    {'embed': 0, 'query': {'kernel': 1}}
    """
    return _trainable(tree) or tree


def without_a(tree: Params) -> Params:
    """`trained(tree)` without the first factor of each adapter, for training that changes only the second.

    >>> without_a({"query": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "out": {"kernel": 4}})
    {'query': {'lora_b': 3}}
    """
    return _without_a(trained(tree))


def overlay(tree: Params, part: Params) -> Params:
    """`tree` with the leaves of `part` in place of its own: the inverse of `trained`.

    >>> overlay({"query": {"kernel": 1, "lora_a": 2}}, {"query": {"lora_a": 5}})
    {'query': {'kernel': 1, 'lora_a': 5}}
    """
    if not isinstance(part, Mapping):
        return part
    return {name: overlay(leaf, part[name]) if name in part else leaf for name, leaf in tree.items()}


def _trainable(tree: Mapping[str, Any]) -> Params:
    found: Params = {}
    for name, node in tree.items():
        if name in ADAPTER_NAMES or name == SOFT_TOKENS:
            found[name] = node
        elif isinstance(node, Mapping) and (below := _trainable(node)):
            found[name] = below
    return found


def _without_a(tree: Mapping[str, Any]) -> Params:
    kept = ((name, node) for name, node in tree.items() if name != ADAPTER_NAMES[0])
    return {name: _without_a(node) if isinstance(node, Mapping) else node for name, node in kept}
