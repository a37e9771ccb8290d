"""DeBERTa's own: scores by relative distance, against a loop over queries and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional import attention_maps
from jaxcl.models.deberta import bucket, places
from jaxcl.models.probe import Probe
from jaxcl.weights.tree import flatten
from tests.tiny.batches import batch_of
from tests.tiny.networks import deberta, params_of

SEGMENTS = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 0]]


def test_distances_share_buckets_the_more_the_longer_they_are() -> None:
    distance = np.arange(600)
    found = bucket(distance, 256, 512)
    np.testing.assert_array_equal(found[:129], distance[:129])
    np.testing.assert_array_equal(bucket(-distance, 256, 512), -found)
    far = distance[129:]
    want = np.ceil(np.log(far / 128) / np.log(511 / 128) * 127) + 128
    np.testing.assert_array_equal(found[129:], want)
    assert (found[511], found[512]) == (255, 256)


def test_places_are_cut_off_at_the_ends_of_the_table() -> None:
    config = deberta(position_buckets=0, max_distance=3).config
    assert places(6, config)[0].tolist() == [3, 2, 1, 0, 0, 0]
    assert places(6, config)[:, 0].tolist() == [3, 4, 5, 5, 5, 5]
    # One distance each up to 2, then a bucket up to 8, with which the table ends.
    assert places(12, deberta().config)[11].tolist() == [7] * 9 + [6, 5, 4]


def test_scores_are_those_of_the_paper() -> None:
    network = deberta()
    params, batch = params_of(network), batch_of(SEGMENTS)
    probe = Probe(lambda view, _: attention_maps(view))
    probed = jax.jit(lambda: network.hidden(params, batch, probe=probe).probed)()
    x = np.asarray(network.embed(params, batch), float)
    part = {name: np.asarray(leaf[0], float) for name, leaf in flatten(params["blocks"]["attention"]).items()}
    embed = params["embed"]
    table = np.asarray(embed["distance"]["embedding"], float)
    table = (table - table.mean(1, keepdims=True)) / np.sqrt(table.var(1, keepdims=True) + 1e-7)
    table = table * np.asarray(embed["distance_norm"]["scale"]) + np.asarray(embed["distance_norm"]["bias"])

    def project(rows: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("...e,ehd->...hd", rows, part[f"{name}/kernel"]) + part[f"{name}/bias"]

    query, key, own_query, own_key = (
        project(rows, name) for rows, name in ((x, "query"), (x, "key"), (table, "query"), (table, "key"))
    )
    for row, head, i in np.ndindex(2, 3, 7):
        seen = [j for j in range(7) if SEGMENTS[row][i] == SEGMENTS[row][j] != 0]
        scores = []
        for j in seen:
            place = int(np.clip(bucket(np.array(i - j), 4, 9) + 4, 0, 7))
            one, other = query[row, i, head], key[row, j, head]
            scores.append((one @ other + one @ own_key[place, head] + other @ own_query[place, head]) / np.sqrt(12))
        weights = np.exp(scores) / np.sum(np.exp(scores))
        want = np.zeros(7)
        want[seen] = weights
        np.testing.assert_allclose(probed[0, row, head, i], want, atol=1e-5)


def test_every_layer_reads_the_vectors_of_distances() -> None:
    network = deberta(num_layers=3)
    params, batch = params_of(network), batch_of(SEGMENTS)
    tables = network.blocks(params).kind.distances
    assert tables.shape == (3, 8, 12)
    np.testing.assert_array_equal(tables[0], tables[2])

    @jax.jit
    def loss(table: jax.Array) -> jax.Array:
        embed = {**params["embed"], "distance": {"embedding": table}}
        return jnp.sum(jnp.square(network.hidden({**params, "embed": embed}, batch).states[..., :3]))

    slope = jax.grad(loss)(params["embed"]["distance"]["embedding"])
    step = 1e-2 * jax.random.normal(jax.random.key(0), slope.shape)
    table = params["embed"]["distance"]["embedding"]
    change = (loss(table + step) - loss(table - step)) / 2
    np.testing.assert_allclose(jnp.sum(slope * step), change, rtol=0.02)


def test_the_class_is_read_behind_a_dense_layer() -> None:
    network = deberta(pooler_activation="relu")
    params, batch = params_of(network), batch_of(SEGMENTS)
    states = network.hidden(params, batch).states
    dense, out = params["classifier"]["dense"], params["classifier"]["out"]
    inner = np.maximum(states[:, 0] @ dense["kernel"] + dense["bias"], 0)
    np.testing.assert_allclose(network.classify(params, states, batch), inner @ out["kernel"] + out["bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10}, r"hidden_size \(10\) must be a multiple of num_heads \(3\)"),
        ({"position_buckets": 5}, "position_buckets must be 0 or an even number from 4 on, got 5"),
        ({"position_buckets": 2}, "position_buckets must be 0 or an even number from 4 on, got 2"),
        ({"lora": {"targets": ("gate",)}}, "an encoder has no gate"),
    ],
)
def test_fields_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deberta(**changes)
