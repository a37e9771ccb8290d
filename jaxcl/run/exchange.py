"""What travels in a round of federated training: what a client makes of its params, and the server of what it gets.

Plainly, clients send params. With `federated.privacy` they send clipped updates, with `federated.secure` masked ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxcl.errors import UserError
from jaxcl.functional.federated import ClientMean, clip_update, noised_mean, why_refused
from jaxcl.functional.secure_sum import add_pair_masks, to_fixed_point, unmasked_sum
from jaxcl.models.trainable import Params
from jaxcl.training.federated import FederatedConfig

BITS = 22
"""Bits behind the point of what is masked: values are exact to 2^-23 and stay below 2^9 divided by the clients."""

_mean = jax.jit(lambda mean, tree, weight: mean.add(tree, weight))


class LeftOut(UserError):
    """A client has nothing to send in a round; says why."""


class Order(NamedTuple):
    """What the server says about a round, besides its params.

    Attributes:
      task: index of the task.
      round: the round in the task, from 0.
      number: the round in the run, from 0.
      members: numbers of the clients in the round.
      share: the client's share of the weights of all members.
    """

    task: int
    round: int
    number: int
    members: Sequence[int]
    share: float


class Trained(NamedTuple):
    """What a client has after a round.

    Attributes:
      params: the trained params, float32, on the host.
      weight: its number of examples of the task.
      change: by how much its control variate changed; `None` without control variates.
    """

    params: Params
    weight: float
    change: PyTree = None


def leaving(
    settings: FederatedConfig,
    before: Params,
    found: Trained,
    order: Order,
    *,
    client: int,
    secrets: Mapping[int, bytes],
) -> PyTree:
    """What a client sends after a round.

    Args:
      settings: the section `federated`.
      before: the params that the round began with.
      found: what the client has after it.
      order: what the server said about the round.
      client: the client's number.
      secrets: the secret of each pair that the client is part of, by the number of the other one.

    Raises:
      LeftOut: the update is not finite, or too large for a masked sum.
    """
    sent = {"params": found.params, **({} if found.change is None else {"variate": found.change})}
    if settings.privacy is None and not settings.secure:
        return sent
    sent["params"] = jax.tree.map(lambda after, before: np.asarray(after) - before, found.params, before)
    if settings.privacy is not None:
        clipped, _ = clip_update(sent["params"], settings.privacy.clip)
        sent["params"] = jax.tree.map(np.array, clipped)
    if not settings.secure:
        return sent
    share = order.share if settings.privacy is None else 1.0
    others = {other: secrets[other] for other in order.members if other != client}
    try:
        fixed = to_fixed_point(jax.tree.map(lambda leaf: share * leaf, sent), bits=BITS, clients=len(order.members))
        masked: PyTree = add_pair_masks(fixed, client, others, round_number=order.number)
    except ValueError as error:
        raise LeftOut(str(error)) from None
    return masked


class Gathering:
    """What the server has got in a round.

    Only one client's arrays are needed at a time, except for masked ones.
    """

    def __init__(self, settings: FederatedConfig, expected: PyTree, order: Order) -> None:
        """Begins a round.

        Args:
          settings: the section `federated`.
          expected: a tree like what clients send.
          order: what the server said about the round.
        """
        self._settings = settings
        self._expected = expected
        self._order = order
        self._mean = ClientMean.zero(expected)
        self._masked: dict[int, PyTree] = {}

    def add(self, client: int, sent: PyTree, weight: float) -> str | None:
        """Takes in what a client sent; returns why it cannot be used, `None` if it can.

        Args:
          client: its number.
          sent: what it sent.
          weight: its weight; with privacy, all have the same.
        """
        settings = self._settings
        if settings.secure:
            reason = _why_not_masked(sent, self._expected)
            if reason is None:
                self._masked[client] = sent
            return reason
        private = settings.privacy
        reason = why_refused(sent, self._expected)
        if reason is None and private is not None:
            reason = why_refused(sent["params"], self._expected["params"], private.clip)
        if reason is None:
            self._mean = _mean(self._mean, sent, 1.0 if private else weight)
        return reason

    def result(self, params: Params, key: Array) -> PyTree:
        """The mean of the params that clients ended with, and of the changes of their variates; `None`: there is none.

        Args:
          params: the params that the round began with.
          key: of the noise.

        Raises:
          ValueError: masks do not cancel; names the clients that dropped out.
        """
        settings, members = self._settings, self._order.members
        private = settings.privacy
        if settings.secure:
            if not self._masked:
                return None
            found = unmasked_sum(self._masked, members, bits=BITS)
        else:
            count = float(self._mean.weight)
            if count == 0 and private is None:
                return None
            # Noise also where nobody sent anything: that a client is missing must not show.
            found = self._mean.mean
            if private is not None:
                found = jax.tree.map(lambda leaf: leaf * count, found)
        if private is not None:
            limit, multiplier = private.clip, private.noise_multiplier
            mean = noised_mean(
                found["params"], key, limit=limit, noise_multiplier=multiplier, clients=float(settings.members)
            )
            return {"params": _moved(params, mean)}
        return {**found, "params": _moved(params, found["params"])} if settings.secure else found


def _moved(params: Params, update: Params) -> Params:
    moved: Params = jax.tree.map(lambda param, update: jnp.asarray(param) + update, params, update)
    return moved


def _why_not_masked(sent: PyTree, expected: PyTree) -> str | None:
    """Why masked numbers cannot be used. That they are of a usable update cannot be seen."""
    floats = jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), np.float32), sent)
    reason = why_refused(floats, expected)
    if reason is None and any(np.asarray(leaf).dtype != np.uint32 for leaf in jax.tree.leaves(sent)):
        return "expected masked numbers"
    return reason


def simulated_secrets(seed: int, client: int, clients: int) -> dict[int, bytes]:
    """Secrets of pairs for a run in one process, where nothing is hidden anyway.

    Args:
      seed: seed of the run.
      client: number of the client.
      clients: number of clients.

    >>> simulated_secrets(0, 1, 3)[2] == simulated_secrets(0, 2, 3)[1]
    True
    """

    def secret(other: int) -> bytes:
        pair: Any = (seed, *sorted((client, other)))
        return hashlib.sha256(repr(pair).encode()).digest()

    return {other: secret(other) for other in range(clients) if other != client}


__all__ = ["BITS", "Gathering", "LeftOut", "Order", "Trained", "leaving", "simulated_secrets"]
