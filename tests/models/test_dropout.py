import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import layer
from jaxcl.models.layers import dropout, place_hash
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.batches import batch_of
from tests.tiny.networks import ARCHITECTURES, BUILDERS, params_of

SHAPE = (32, 4, 24, 16)


def words_of(seed: int) -> jax.Array:
    return jax.random.bits(jax.random.key(seed), (2,), jnp.uint32)


@pytest.fixture(scope="module")
def centred() -> np.ndarray:
    """Words of one key as numbers in [-1/2, 1/2)."""
    return np.asarray(jax.jit(lambda words: place_hash(words, SHAPE))(words_of(0))) / 2.0**32 - 0.5


def deviations(products: np.ndarray) -> float:
    """How many standard errors the mean lies from 0, for products of two independent uniform numbers."""
    return abs(float(products.mean())) * 12 * np.sqrt(products.size)


def test_words_equal_plain_integers() -> None:
    def mixed(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    def keyed(place: int, first: int, second: int) -> int:
        return mixed((mixed(place ^ first) + second) % 2**32)

    first, second = 3_000_000_019, 4_100_000_001
    found = np.asarray(place_hash(jnp.array([first, second], jnp.uint32), (3, 2, 5)))
    for row, one, other in itertools.product(range(3), range(2), range(5)):
        of_row = [keyed(2 * row + place, first, second) for place in (0, 1)]
        assert found[row, one, other] == keyed(5 * one + other, *of_row)


def test_words_are_uniform(centred: np.ndarray) -> None:
    assert abs(centred.mean()) * np.sqrt(12 * centred.size) < 5
    counts = np.histogram(centred, bins=64)[0]
    expected = centred.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)
    # Rows hold as many small words as chance gives them: binomial, so that their variance is known as well.
    small = (centred < -0.4).reshape(32 * 4, -1).sum(axis=1)
    assert 0.5 < small.var() / (0.1 * 0.9 * 24 * 16) < 1.6


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_places_are_independent(centred: np.ndarray, axis: int, lag: int) -> None:
    size = SHAPE[axis]
    near, far = (np.take(centred, range(start, size - lag + start), axis) for start in (0, lag))
    assert deviations(near * far) < 5


def test_keys_are_independent(centred: np.ndarray) -> None:
    other = np.asarray(place_hash(words_of(1), SHAPE)) / 2.0**32 - 0.5
    assert deviations(centred * other) < 5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    out = np.asarray(dropout(jnp.ones(SHAPE), rate, jax.random.key(2)))
    dropped = (out == 0).mean()
    assert abs(dropped - rate) <= 5 * np.sqrt(rate * (1 - rate) / out.size)
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-6)


def test_low_precision_scales_in_float32() -> None:
    out = dropout(jnp.full((4, 64), 3.0, jnp.bfloat16), 0.1, jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    kept = np.asarray(out.astype(jnp.float32))
    np.testing.assert_array_equal(kept[kept != 0], np.float32(jnp.bfloat16(3.0 / 0.9)))


def test_a_row_draws_the_same_in_any_batch() -> None:
    x = jax.random.normal(jax.random.key(0), SHAPE)
    whole = dropout(x, 0.3, jax.random.key(1))
    np.testing.assert_array_equal(dropout(x[:3], 0.3, jax.random.key(1)), whole[:3])
    assert not np.array_equal(whole[0] == 0, whole[1] == 0)


def test_rows_with_keys_draw_by_them_alone() -> None:
    x = jax.random.normal(jax.random.key(0), SHAPE)
    keys = jax.random.split(jax.random.key(1), SHAPE[0])
    whole = np.asarray(dropout(x, 0.3, keys))
    order = np.arange(SHAPE[0])[::-1]
    np.testing.assert_array_equal(dropout(x[order], 0.3, keys[order]), whole[order])
    kept = (whole != 0).reshape(SHAPE[0], -1) - 0.7
    assert np.abs(kept.mean(axis=1)).max() < 5 * np.sqrt(0.3 * 0.7 / kept.shape[1])
    # Rows differ by chance alone: the product of two rows' deviations has mean 0.
    for lag in (1, 2, 7):
        products = kept[lag:] * kept[:-lag]
        assert abs(products.mean()) < 5 * 0.3 * 0.7 / np.sqrt(products.size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_with_a_key_has_the_same_states_in_any_batch(architecture: str) -> None:
    own = {"dropout": 0.2} if architecture == "llama" else {"hidden_dropout": 0.2}
    network, key = BUILDERS[architecture](**own), jax.random.key(0)
    params = jax.jit(network.init)(jax.random.key(1))
    batch = batch_of([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    keys = jax.random.split(key, 3)

    def states(*chosen: int) -> np.ndarray:
        part = jax.tree.map(lambda leaf: leaf[np.array(chosen)], batch)
        return np.asarray(jax.jit(network.hidden)(params, part, dropout_key=keys[np.array(chosen)]).states)

    whole = states(0, 1, 2)
    np.testing.assert_allclose(states(2, 0, 1), whole[[2, 0, 1]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(states(1), whole[[1]], rtol=1e-5, atol=1e-5)
    assert not np.allclose(jax.jit(network.hidden)(params, batch).states, whole)


def test_backward_pass_draws_what_the_forward_pass_drew() -> None:
    x = jax.random.normal(jax.random.key(0), SHAPE)
    out, pull = jax.vjp(lambda x: dropout(x, 0.3, jax.random.key(1)), x)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0], np.where(np.asarray(out) == 0, 0, 1 / 0.7), rtol=1e-6)
    kept = jax.tree.leaves(pull)
    assert sum(leaf.size for leaf in kept) < 10, "the backward pass keeps a mask"


@pytest.mark.parametrize("silent", [True, False])
def test_dropout_of_attention_alone_drops_nothing_else(silent: bool) -> None:
    """Where attention adds nothing to the residual stream, two passes are the same."""
    network = BUILDERS["llama"](dropout=0.0, attention_dropout=0.5)
    params, batch = network.init(jax.random.key(1)), batch_of([[1, 1, 1, 1]])
    if silent:
        out = params["blocks"]["attention"]["out"]
        out["kernel"] = jnp.zeros_like(out["kernel"])
    one, two = (network.hidden(params, batch, dropout_key=jax.random.key(k)).states for k in (0, 1))
    assert bool(jnp.array_equal(one, two)) == silent


@pytest.mark.parametrize("architecture", ["llama", "roberta", "modernbert"])
def test_a_given_rate_leaves_attention_on_its_kernel(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("explicit attention")

    monkeypatch.setattr(layer, "explicit_attention", refused)
    own = {"dropout": 0.2} if architecture == "llama" else {"attention_dropout": 0.2}
    network, batch, key = BUILDERS[architecture](**own), batch_of([[1, 1, 1, 0]]), jax.random.key(0)

    def trace(**arguments: Any) -> Any:
        return jax.eval_shape(lambda params: network.hidden(params, batch, **arguments), network.shapes())

    trace(dropout_key=key, dropout_rate=0.3)
    with pytest.raises(AssertionError, match="explicit"):
        trace(dropout_key=key)


@pytest.mark.parametrize("architecture", [pytest.param("modernbert", marks=pytest.mark.slow), "deberta"])
def test_hidden_states_of_an_encoder_are_dropped_in_four_places(architecture: str) -> None:
    """Embeddings, what attention and the feed-forward part add, and the classifier's input."""
    network = BUILDERS[architecture](hidden_dropout=0.5, attention_dropout=0.0)
    params, batch, key = params_of(network), batch_of([[1, 1, 1, 1], [1, 1, 1, 0]]), jax.random.key(0)

    def differs(run: Any) -> bool:
        return bool(np.any(np.asarray(run(None) != run(key))))

    assert differs(lambda key: network.embed(params, batch, dropout_key=key))
    x = network.embed(params, batch)
    assert differs(lambda key: network.classify(params, x, batch, dropout_key=key))
    for silent in ("attention/out", "mlp/down"), ("attention/out",), ("mlp/down",):
        flat = flatten(params)
        muted = {f"blocks/{name}/{part}" for name in silent for part in ("kernel", "bias")}
        still = unflatten({path: leaf * (path not in muted) for path, leaf in flat.items()})
        layer = jax.tree.map(lambda leaf: leaf[0], network.blocks(still))
        found = differs(lambda key, layer=layer: network.block(layer, x, batch, dropout_key=key)[0])
        assert found == (len(silent) == 1), silent
