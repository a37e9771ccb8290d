"""Batches from what Hugging Face's tokenizers and collators give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.methods.passes.losses import language_model_loss
from jaxcl.models.batch import Batch
from tests.tiny.networks import ARCHITECTURES, BUILDERS, llama, log_softmax, params_of, roberta

IDS = np.array([[5, 6, 7, 8, 9], [2, 3, 4, 0, 0], [0, 0, 2, 3, 4], [6, 0, 7, 8, 0], [0, 0, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])


def loss(network: Any, batch: Batch) -> tuple[float, float]:
    params = params_of(network)
    term = jax.jit(lambda: language_model_loss(network, params, network.hidden(params, batch).states, batch, 0))()
    return float(term.sum), float(term.count)


def test_padding_moves_to_the_right_and_is_never_scored() -> None:
    batch = jax.jit(lambda *arrays: Batch.from_labels(*arrays, causal=True))(IDS, MASK, IDS)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [2, 3, 4, 0, 0], [2, 3, 4, 0, 0], [6, 7, 8, 0, 0], [0] * 5]
    assert batch.segments.tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0] * 5]
    # A hole keeps its place among the positions; nothing is predicted from it, or in it.
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 2, 0, 0], [0, 2, 3, 0, 0], [0] * 5]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 0], [3, 4, 0, 0, 0], [3, 4, 0, 0, 0], [0, 8, 0, 0, 0], [0] * 5]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0] * 5]
    assert (batch.predict, batch.types, batch.packed) == (None, None, False)
    assert batch.task.tolist() == [0] * 5
    assert batch.example.tolist() == [0, 1, 2, 3, -1]
    kinds = {leaf.dtype.name for leaf in (batch.tokens, batch.segments, batch.positions, batch.targets, batch.example)}
    assert (kinds, batch.weights.dtype.name) == ({"int32"}, "float32")


def test_labels_lie_where_their_tokens_are() -> None:
    labels = np.where(MASK, IDS, 3)  # padding has a label, too
    labels[0, :2] = -100
    batch = Batch.from_labels(IDS, MASK, labels, causal=True)
    assert batch.weights[0].tolist() == [0, 1, 1, 1, 0]
    assert batch.targets[0].tolist() == [0, 7, 8, 9, 0]
    assert batch.weights[1:].tolist() == Batch.from_labels(IDS, MASK, causal=True).weights[1:].tolist()
    masked = Batch.from_labels(IDS, MASK, labels, causal=False, token_type_ids=1 - MASK)
    assert masked.weights[0].tolist() == [0, 0, 1, 1, 1]
    assert masked.targets.tolist() == [[0, 0, 7, 8, 9], [2, 3, 4, 0, 0], [2, 3, 4, 0, 0], [6, 7, 8, 0, 0], [0] * 5]
    assert masked.weights[1:].tolist() == masked.segments[1:].tolist()
    assert masked.types is not None
    assert masked.types[2].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_side_of_the_padding_changes_no_loss(architecture: str) -> None:
    network = BUILDERS[architecture]()
    left, right = (Batch.from_labels(*(a[[row]] for a in (IDS, MASK, IDS)), causal=network.causal) for row in (2, 1))
    assert loss(network, left) == pytest.approx(loss(network, right))
    alone = Batch.from_labels(IDS[1:2, :3], labels=IDS[1:2, :3], causal=network.causal)
    assert loss(network, alone) == pytest.approx(loss(network, right), rel=1e-5)


@pytest.mark.parametrize("network", [llama(), roberta()], ids=lambda network: network.config.architecture)
def test_the_loss_is_that_of_the_definition(network: Any) -> None:
    labels = np.where(np.arange(5) == 1, -100, IDS[:1])
    batch = Batch.from_labels(IDS[:1], labels=labels, causal=network.causal)
    params = params_of(network)
    logs = log_softmax(np.asarray(network.logits(params, network.hidden(params, batch).states)))[0]
    if network.causal:
        expected = -(logs[1, 7] + logs[2, 8] + logs[3, 9]), 3
    else:
        expected = -(logs[0, 5] + logs[2, 7] + logs[3, 8] + logs[4, 9]), 4
    assert loss(network, batch) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids: expected shape \[batch, length\], got \[5\]"),
        ({"input_ids": IDS * 1.0}, "input_ids: expected integers, got float32"),
        ({"attention_mask": MASK[:, :4]}, r"attention_mask: expected the shape of input_ids, \[5, 5\], got \[5, 4\]"),
        ({"labels": IDS[:, 1:]}, r"labels: expected the shape of input_ids, \[5, 5\], got \[5, 4\]"),
        ({"labels": IDS * 1.0}, "labels: expected integers, got float32"),
        ({"causal": False}, "labels: a masked model needs them"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.from_labels(**{"input_ids": IDS, "causal": True, **arguments})


def test_it_takes_jax_and_numpy_arrays_of_any_width() -> None:
    want = Batch.from_labels(jnp.asarray(IDS), jnp.asarray(MASK, bool), causal=True)
    found = Batch.from_labels(IDS.astype(np.uint8), MASK.astype(np.float32), causal=True)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), want, found)))
