r"""Sums over clients that hide what each of them sent: masks between pairs of clients that cancel in the sum.

Bonawitz et al., CCS 2017 (protocol of section 4.0.1, "masking with one-time pads"): every pair of clients shares a
secret that the server does not have. Of each pair one client adds the numbers that the secret gives and the other one
subtracts them. What the server gets of one client is uniform noise, and the sum of all is the sum of what they meant.

Numbers are in fixed point, modulo $2^{32}$, so that masks cancel exactly. The masks of a client that drops out do not
cancel: such a round is refused (the paper's secret sharing, which would recover it, is not here). A round has masks of
its own, since the difference of two updates under one mask would be open.

The server must not be able to act as a client, and clients have to know that a secret is that of another client: this
is up to what agrees on secrets.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

_SECRET_BYTES = 16  # 128 bits
_BLOCK = 2**24  # numbers that are made of a secret at a time


def to_fixed_point(tree: PyTree, *, bits: int, clients: int) -> PyTree:
    """Arrays as integers modulo 2^32, rounded to multiples of `2 ** -bits`.

    Args:
      tree: float arrays.
      bits: bits behind the point.
      clients: how many are added up: their sum must stay within `2 ** (31 - bits)`.

    Returns:
      A tree of uint32 arrays.

    Raises:
      ValueError: a value is not finite, or so large that the sum could overflow; names the array.

    Examples:
      >>> to_fixed_point(np.array([0.5, -0.25]), bits=2, clients=1).tolist()
      [2, 4294967295]
    """

    def fixed(path: tuple[object, ...], leaf: np.ndarray) -> np.ndarray:
        rounded = np.rint(np.asarray(leaf, np.float64) * 2.0**bits)
        largest = np.max(np.abs(rounded), initial=0)
        if not largest * clients < 2**31:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            most = 2.0 ** (31 - bits) / clients
            raise ValueError(
                f"{name}: {largest / 2.0**bits:g} is not below {most:g}, the most that {bits} bits behind the point "
                f"leave each of {clients} clients"
            )
        return rounded.astype(np.int64).astype(np.uint32)

    return jax.tree_util.tree_map_with_path(fixed, tree)


def from_fixed_point(tree: PyTree, *, bits: int) -> PyTree:
    """The numbers that integers modulo 2^32 represent; see `to_fixed_point`.

    Args:
      tree: uint32 arrays.
      bits: bits behind the point.

    Returns:
      A tree of float32 arrays.
    """
    return jax.tree.map(lambda leaf: (np.asarray(leaf).view(np.int32) * 2.0**-bits).astype(np.float32), tree)


def add_pair_masks(tree: PyTree, client: int, secrets: Mapping[int, bytes], *, round_number: int) -> PyTree:
    """What a client sends: its integers plus its masks.

    Args:
      tree: uint32 arrays, see `to_fixed_point`.
      client: its number.
      secrets: for each of the other clients, by number, the secret of the pair: at least 16 bytes that nobody else
        has.
      round_number: the round; masks differ from round to round.

    Raises:
      ValueError: a secret is too short, a client has one with itself, or there is no other client.
    """
    if not secrets:
        raise ValueError("secrets: there is no other client; the sum over one client hides nothing")
    if client in secrets:
        raise ValueError(f"secrets: client {client} has one with itself")
    short = sorted(other for other, secret in secrets.items() if len(secret) < _SECRET_BYTES)
    if short:
        raise ValueError(f"secrets: that with client {short[0]} has less than {_SECRET_BYTES} bytes")
    leaves, structure = jax.tree.flatten(tree)
    found = []
    for place, leaf in enumerate(leaves):
        total = np.array(leaf, np.uint32)
        for other, secret in secrets.items():
            mask = _pad(secret, round_number, place, total.shape)
            # Unsigned integers wrap around.
            (np.add if client < other else np.subtract)(total, mask, out=total)
        found.append(total)
    return jax.tree.unflatten(structure, found)


def unmasked_sum(sent: Mapping[int, PyTree], clients: Sequence[int], *, bits: int) -> PyTree:
    """The sum of what clients meant, from what they sent.

    Args:
      sent: what each client sent, by its number; see `add_pair_masks`.
      clients: the numbers of those whose masks are in what was sent.
      bits: bits behind the point.

    Returns:
      A tree of float32 arrays.

    Raises:
      ValueError: a client dropped out, so that masks do not cancel, or one is not of the round; names them.
    """
    missing, foreign = sorted(set(clients) - set(sent)), sorted(set(sent) - set(clients))
    if missing:
        named = ", ".join(map(str, missing))
        raise ValueError(
            f"clients {named} dropped out: their masks are in what the others sent and do not cancel; "
            "repeat the round without them, under a new number"
        )
    if foreign:
        raise ValueError(f"clients {', '.join(map(str, foreign))} are not of this round")

    total = functools.reduce(lambda one, other: jax.tree.map(_added, one, other), sent.values())
    return from_fixed_point(total, bits=bits)


def _added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    # Into an array: NumPy warns where single numbers wrap around.
    return np.add(one, other, out=np.empty(np.shape(one), np.uint32))


def _pad(secret: bytes, round_number: int, place: int, shape: tuple[int, ...]) -> np.ndarray:
    """Integers that cannot be told from uniform ones without the secret."""
    count = int(np.prod(shape, dtype=np.int64))
    found = np.empty(count, np.uint32)
    for block, start in enumerate(range(0, count, _BLOCK)):
        numbers = (number.to_bytes(8, "big") for number in (round_number, place, block))
        seed = b"".join([b"jaxcl secure sum", *numbers, secret])
        size = min(_BLOCK, count - start)
        found[start : start + size] = np.frombuffer(hashlib.shake_256(seed).digest(4 * size), "<u4")
    return found.reshape(shape)
