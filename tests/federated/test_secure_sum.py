"""Sums that hide what each client sent."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.functional import add_pair_masks, from_fixed_point, to_fixed_point, unmasked_sum
from jaxcl.functional import secure_sum as module

BITS = 20
CLIENTS = (2, 3, 7)
SECRETS = {pair: bytes([*pair]) * 16 for pair in itertools.combinations(CLIENTS, 2)}


def secrets_of(client: int) -> dict[int, bytes]:
    return {
        other: SECRETS[min(client, other), max(client, other)] for other in CLIENTS if other != client
    }  # both sides of a pair have the same


def update(client: int) -> dict[str, Any]:
    rng = np.random.default_rng(client)
    return {"a": rng.normal(size=(5, 4)).astype(np.float32), "b": np.float32(rng.normal())}


def sent(client: int, round_number: int = 0) -> Any:
    fixed = to_fixed_point(update(client), bits=BITS, clients=len(CLIENTS))
    return add_pair_masks(fixed, client, secrets_of(client), round_number=round_number)


def test_the_sum_is_that_without_masks_to_the_precision_of_the_fixed_point() -> None:
    found = unmasked_sum({client: sent(client) for client in CLIENTS}, CLIENTS, bits=BITS)
    plain = jax.tree.map(lambda *leaves: np.sum(np.stack(leaves).astype(np.float64), axis=0), *map(update, CLIENTS))
    for name in ("a", "b"):
        assert found[name].dtype == np.float32
        # Half a unit of the fixed point per client, and the rounding of the result to float32.
        assert np.abs(found[name] - plain[name]).max() <= len(CLIENTS) * 2.0 ** -(BITS + 1) + 1e-6
    fixed = [to_fixed_point(update(client), bits=BITS, clients=3) for client in CLIENTS]
    for name in ("a", "b"):
        units = sum(np.asarray(one[name]).view(np.int32).astype(np.int64) for one in fixed)
        np.testing.assert_array_equal(found[name], (units / 2**BITS).astype(np.float32))


def test_what_one_client_sends_looks_like_chance() -> None:
    """It has nothing to do with what the client meant: its bits are even, and other secrets give others."""
    quiet = {"a": np.zeros(20_000, np.uint32)}
    one = add_pair_masks(quiet, 2, {3: b"x" * 16}, round_number=0)["a"]
    set_bits = np.unpackbits(one.view(np.uint8)).mean()
    assert abs(set_bits - 0.5) < 4 * 0.5 / np.sqrt(32 * 20_000)  # four deviations
    assert len(np.unique(one)) > 19_990
    other = add_pair_masks(quiet, 2, {3: b"y" * 16}, round_number=0)["a"]
    assert (one == other).mean() < 0.001


def test_no_mask_is_used_twice() -> None:
    """The difference of two updates under one mask would be open: rounds, arrays and blocks have their own."""
    quiet = {"a": np.zeros(100, np.uint32), "b": np.zeros(100, np.uint32)}
    first, second = (add_pair_masks(quiet, 2, {3: b"x" * 16}, round_number=number) for number in (0, 1))
    masks = [first["a"], first["b"], second["a"], second["b"]]
    assert all((one != other).any() for one, other in itertools.combinations(masks, 2))


def test_masks_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 8)
    test_the_sum_is_that_without_masks_to_the_precision_of_the_fixed_point()
    numbers = add_pair_masks(np.zeros(24, np.uint32), 2, {3: b"x" * 16}, round_number=0)
    assert len(np.unique(numbers)) == 24


def test_drop_outs_are_refused_by_name() -> None:
    there = {client: sent(client) for client in CLIENTS if client != 3}
    with pytest.raises(ValueError, match=r"clients 3 dropped out: .* do not cancel; repeat the round without them"):
        unmasked_sum(there, CLIENTS, bits=BITS)
    with pytest.raises(ValueError, match="clients 7 are not of this round"):
        unmasked_sum({client: sent(client) for client in CLIENTS}, (2, 3), bits=BITS)


def test_a_sum_that_could_overflow_is_refused_by_name() -> None:
    most = 2.0 ** (31 - BITS) / 3
    assert to_fixed_point({"a": np.float32(0.99 * most)}, bits=BITS, clients=3)
    for value in (1.01 * most, -1.01 * most, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"a: .* is not below 682\.667"):
            to_fixed_point({"a": np.float64(value)}, bits=BITS, clients=3)


def test_fixed_point_rounds_to_the_nearest_of_either_sign() -> None:
    values = np.array([0.0, 0.3, -0.3, 1.0, -1.0, -0.5])
    found = from_fixed_point(to_fixed_point(values, bits=1, clients=1), bits=1)
    assert found.tolist() == [0.0, 0.5, -0.5, 1.0, -1.0, -0.5]


def test_secrets_are_checked() -> None:
    quiet = np.zeros(2, np.uint32)
    with pytest.raises(ValueError, match="that with client 3 has less than 16 bytes"):
        add_pair_masks(quiet, 2, {3: b"short"}, round_number=0)
    with pytest.raises(ValueError, match="client 2 has one with itself"):
        add_pair_masks(quiet, 2, {2: b"x" * 16}, round_number=0)
    with pytest.raises(ValueError, match="the sum over one client hides nothing"):
        add_pair_masks(quiet, 2, {}, round_number=0)
