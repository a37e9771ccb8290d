"""Mutations of bytes that follow from a seed alone."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

# Values that readers take for others, or that are too large, too deep or of another type.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "a", "\x00", "é" * 9, "\ud800", "~", "../x", "1", "{prompt}{}", [], [[]], [1, 2], ["a"], {}, {"a": 1}, [None],
    {"": {}}, [[[[]]]], "a" * 3000,
)  # fmt: skip
_TEXTS = (
    b"null", b"1e999", b"-1", b"[" * 3000, b"{" * 50, b"9" * 5000, b'"\\ud800"', b"\xff\xfe", b"\x00", b"\r\n", b",",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"!!int x", b"&a [*a]", b"{{ 1/0 }}", b"}", b"\xed\xa0\x80", b"NaN",
    b'"', b"2024-99-99",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 127, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
#: Bytes of an input: no seed has more.
MOST = 2**18


def mutants(seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Endless inputs: first the seeds themselves, then changes of them."""
    yield from seeds
    chance = random.Random(seed)
    trees = [tree for tree in map(_tree, seeds) if tree is not None]
    while True:
        if trees and chance.random() < 0.5:
            yield json.dumps(_other_value(chance.choice(trees), chance)).encode()
            continue
        content = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
            _change(content, seeds, chance)
        yield bytes(content[:MOST])


def _tree(content: bytes) -> Any:
    """A seed that is one JSON value, so that it can be changed by its values as well."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def _other_value(tree: Any, chance: random.Random) -> Any:
    """A copy in which one value is replaced, or one key or item removed or added."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree))
    if not places:
        return chance.choice(_VALUES)
    node, key = chance.choice(places)
    kind = chance.random()
    if kind < 0.15:
        del node[key]
    elif kind < 0.2 and isinstance(node, list):
        node.insert(key, chance.choice(_VALUES))
    elif kind < 0.25 and isinstance(node, dict):
        node[chance.choice(("a", "", "é", key + "_"))] = node.pop(key)
    elif kind < 0.35:
        other, name = chance.choice(places)
        node[key] = json.loads(json.dumps(other[name]))
    else:
        node[key] = chance.choice(_VALUES)
    return tree


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def _change(content: bytearray, seeds: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(content) + 1)
    # Headers come first, and are where sizes are.
    at = at if chance.random() < 0.6 else min(at, chance.randrange(64))
    length = chance.choice((1, 1, 2, 4, 8, 32, 200))
    match chance.randrange(8):
        case 0 if content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        case 1:
            content[at : at + 1] = bytes([chance.randrange(256)])
        case 2:
            del content[at : at + length]
        case 3:
            content[at:at] = content[at : at + length] * chance.choice((1, 2, 9))
        case 4:
            content[at:at] = chance.choice(_TEXTS)
        case 5:
            form = chance.choice(("<I", "<Q", ">I", "<H"))
            size = struct.calcsize(form)
            number = chance.choice(_NUMBERS) & (2 ** (8 * size) - 1)
            content[at : at + size] = struct.pack(form, number)
        case 6:
            del content[at:]
        case _:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            content[at:] = other[start:]
