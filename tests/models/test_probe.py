"""What probes and taps see and do, against softmax maps computed here in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.attention_rows import AttentionView, attention_maps, selected_rows
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from jaxcl.models.probe import Probe, Tap
from tests.tiny.batches import batch_of
from tests.tiny.networks import ARCHITECTURES, BUILDERS, llama, params_of, row_losses

SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
HEADS = np.array([[[2, 0], [1, -1]], [[0, 1], [2, 2]]])  # [layers, batch, selected]
QUERIES = np.array([[[4, 1, 5], [5, 0, -1]], [[0, 2, 3], [3, -1, 4]]])  # [layers, batch, queries]


def full_maps(view: AttentionView) -> np.ndarray:
    """Probabilities [batch, heads, length, length], zero at padding; one row at a time, in float64."""
    query, key, segments = np.asarray(view.query, float), np.asarray(view.key, float), np.asarray(view.segments)
    batch, length, heads, _ = query.shape
    maps = np.zeros((batch, heads, length, length))
    for b, h, q in np.ndindex(batch, heads, length):
        seen = (segments[b] == segments[b, q]) & (segments[b, q] != 0)
        if view.causal:
            seen &= np.arange(length) <= q
        if view.window is not None:
            seen &= np.abs(np.arange(length) - q) < int(view.window)
        if seen.any():
            scores = key[b, seen, h // (heads // key.shape[2])] @ query[b, q, h] * view.scale
            maps[b, h, q, seen] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return maps


def view_of(network: Network, layer: int, query: Any, key: Any, batch: Batch) -> AttentionView:
    window = network.config.window if network.config.windowed[layer] else None
    return AttentionView(query, key, batch.segments, network.causal, network.context(batch).scale, window)


def expected_rows(maps: np.ndarray, heads: np.ndarray, queries: np.ndarray) -> np.ndarray:
    rows = np.zeros((*heads.shape, queries.shape[1], maps.shape[-1]))
    for b, s, q in np.ndindex(*rows.shape[:3]):
        if heads[b, s] >= 0 and queries[b, q] >= 0:
            rows[b, s, q] = maps[b, heads[b, s], queries[b, q]]
    return rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_selected_rows_are_rows_of_the_whole_maps(architecture: str, remat: str) -> None:
    network = BUILDERS[architecture](compute={"remat": remat})
    params, batch = params_of(network), batch_of(SEGMENTS)

    def look(view: AttentionView, inputs: Any) -> Any:
        return {"rows": selected_rows(view, *inputs), "query": view.query, "key": view.key}

    probe = Probe(look, (jnp.asarray(HEADS), jnp.asarray(QUERIES)))
    states, probed, _ = jax.jit(lambda params: network.hidden(params, batch, probe=probe))(params)
    np.testing.assert_allclose(states, network.hidden(params, batch).states, atol=1e-6)
    assert probed["rows"].dtype == jnp.float32
    for layer in range(2):
        query, key = probed["query"][layer], probed["key"][layer]
        maps = full_maps(view_of(network, layer, query, key, batch))
        want = expected_rows(maps, HEADS[layer], QUERIES[layer])
        np.testing.assert_allclose(probed["rows"][layer], want, atol=1e-6)
        assert want.max() < 1.1
        assert want.sum() > 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_probe_gives_all_maps_inside_jit_and_they_are_those_a_tap_sees(architecture: str, remat: str) -> None:
    network = BUILDERS[architecture](compute={"remat": remat})
    params, batch = params_of(network), batch_of(SEGMENTS)
    probe = Probe(lambda view, _: {"maps": attention_maps(view), "query": view.query, "key": view.key})
    probed = jax.jit(lambda params: network.hidden(params, batch, probe=probe).probed)(params)
    seen: list[np.ndarray] = []

    def look(probs: jax.Array, visible: jax.Array, _: Any) -> jax.Array:
        jax.debug.callback(
            lambda probs, visible: seen.append(np.where(visible, probs, 0)), probs, visible, ordered=True
        )
        return probs

    jax.block_until_ready(network.hidden(params, batch, tap=Tap(look)).states)
    jax.effects_barrier()
    for layer in range(2):
        view = view_of(network, layer, probed["query"][layer], probed["key"][layer], batch)
        np.testing.assert_allclose(probed["maps"][layer], full_maps(view), atol=1e-6)
        np.testing.assert_allclose(probed["maps"][layer], seen[layer], atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tap_receives_the_maps_that_attention_uses(architecture: str) -> None:
    """The tapped maps are read off the output: with the identity as values, attention gives its maps."""
    network = BUILDERS[architecture]()
    params, batch = params_of(network), batch_of(SEGMENTS)

    def look(view: AttentionView, inputs: Any) -> Any:
        return view.query, view.key

    def replace(probs: jax.Array, visible: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.where(visible, inputs, 0)

    _, (queries, keys), _ = network.hidden(params, batch, probe=Probe(look))
    maps = []
    x = network.embed(params, batch)
    for layer in range(2):
        view = view_of(network, layer, queries[layer], keys[layer], batch)
        maps.append(full_maps(view))
        x, _ = network.block(jax.tree.map(lambda leaf, layer=layer: leaf[layer], network.blocks(params)), x, batch)
    tap = Tap(replace, jnp.asarray(np.stack(maps), jnp.float32))
    real = np.asarray(batch.segments) != 0
    got = network.hidden(params, batch, tap=tap).states
    np.testing.assert_allclose(got[real], network.hidden(params, batch).states[real], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_identity_as_tap_changes_nothing(architecture: str) -> None:
    network = BUILDERS[architecture]()
    params, batch = params_of(network), batch_of(SEGMENTS)
    tap = Tap(lambda probs, visible, inputs: probs)
    got = network.hidden(params, batch, tap=tap).states
    np.testing.assert_allclose(got, network.hidden(params, batch).states, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_pass_through_a_tap_with_and_without_rematerialisation(architecture: str) -> None:
    params = params_of(BUILDERS[architecture]())
    batch = batch_of(SEGMENTS)
    gradients = []
    for remat in ("none", "full"):
        network = BUILDERS[architecture](compute={"remat": remat})

        def loss(added: jax.Array, network: Network = network) -> jax.Array:
            tap = Tap(lambda probs, visible, added: probs + added, added)
            return jnp.sum(row_losses(network, params, batch, tap=tap))

        gradients.append(jax.jit(jax.grad(loss))(jnp.zeros((2, 2, network.num_heads, 6, 6))))
    plain, again = gradients
    assert np.all(np.abs(plain).max(axis=(1, 3, 4)) > 1e-3)
    np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-6)


def test_the_probe_carries_gradients() -> None:
    """The slope of a probed loss along a random direction of the params is the finite difference."""
    network = llama()
    params, batch = params_of(network), batch_of(SEGMENTS)
    probe = Probe(lambda view, inputs: selected_rows(view, *inputs), (jnp.asarray(HEADS), jnp.asarray(QUERIES)))
    weights = jax.random.normal(jax.random.key(5), (2, 2, 2, 3, 6))
    loss = jax.jit(lambda params: jnp.sum(weights * network.hidden(params, batch, probe=probe).probed))
    direction = params_of(network, seed=9)
    gradient = jax.grad(loss)(params)
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    step = 1e-3
    up, down = (loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (step, -step))
    assert abs(slope) > 0.1
    np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=2e-2)
