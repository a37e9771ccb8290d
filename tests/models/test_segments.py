"""A token sees its own document and nothing else, wherever in a batch the document stands."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny.batches import batch_of
from tests.tiny.networks import ARCHITECTURES, BUILDERS, VOCAB, llama, params_of, roberta

LENGTH = 12
ROWS = 3


@functools.cache
def forward(architecture: str, packed: bool) -> Any:
    """Logits of batches of one shape, so that a property compiles once."""
    network = BUILDERS[architecture]()
    params = params_of(network)

    def logits(tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> jax.Array:
        batch = batch_of(np.zeros((ROWS, LENGTH)), packed=packed)
        batch = type(batch)(**{**vars(batch), "tokens": tokens, "segments": segments, "positions": positions})
        return network.logits(params, network.hidden(params, batch).states)

    return jax.jit(logits)


def lay_out(documents: list[tuple[int, int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows filled with (row, start, tokens); segments are numbered in order within a row."""
    tokens, segments, positions = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(3))
    for row, start, document in documents:
        place = slice(start, start + len(document))
        tokens[row, place] = document
        segments[row, place] = segments[row].max() + 1
        positions[row, place] = np.arange(len(document))
    return tokens, segments, positions


documents = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LENGTH // 2).map(np.array)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=15, deadline=None)
@given(first=documents, second=documents, gap=st.integers(0, 3), junk=st.integers(0, VOCAB - 1))
def test_packed_documents_give_what_they_give_alone(
    architecture: str, first: np.ndarray, second: np.ndarray, gap: int, junk: int
) -> None:
    gap = min(gap, LENGTH - len(first) - len(second))
    start = len(first) + gap
    together = lay_out([(1, 0, first), (1, start, second)])
    together[0][together[1] == 0] = junk  # what stands at padding must not matter
    alone = lay_out([(0, 0, first), (2, 0, second)])
    got = forward(architecture, True)(*together)[1]
    for packed in (True, False):
        want = forward(architecture, packed)(*alone)
        np.testing.assert_allclose(got[: len(first)], want[0, : len(first)], atol=2e-5)
        np.testing.assert_allclose(got[start : start + len(second)], want[2, : len(second)], atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(
    document=st.lists(st.integers(0, VOCAB - 1), min_size=LENGTH, max_size=LENGTH).map(np.array), at=st.integers(1, 11)
)
def test_a_decoder_does_not_look_ahead_and_does_look_back(document: np.ndarray, at: int) -> None:
    changed = document.copy()
    changed[at] = (changed[at] + 1) % VOCAB
    got = forward("llama", True)(*lay_out([(0, 0, document), (1, 0, changed)]))
    np.testing.assert_allclose(got[0, :at], got[1, :at], atol=1e-6)
    assert np.all(np.max(np.abs(got[0, at:] - got[1, at:]), axis=-1) > 1e-4)


def test_an_encoder_sees_its_whole_document() -> None:
    document = np.arange(LENGTH) % VOCAB
    changed = document.copy()
    changed[-1] += 1
    got = forward("roberta", True)(*lay_out([(0, 0, document), (1, 0, changed)]))
    assert np.all(np.max(np.abs(got[0] - got[1]), axis=-1) > 1e-4)


def test_order_matters_within_a_document() -> None:
    document = np.arange(6)
    for architecture in BUILDERS:
        got = forward(architecture, True)(*lay_out([(0, 0, document), (1, 0, document[[1, 0, 2, 3, 4, 5]])]))
        assert np.max(np.abs(got[0, 5] - got[1, 5])) > 1e-3, architecture


def test_classification_reads_the_first_token_or_the_last_real_one() -> None:
    segments = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    for network, read in ((llama(), [2, 4, 0]), (roberta(), [0, 0, 0])):
        params = params_of(network)
        batch = batch_of(segments)
        states = network.hidden(params, batch).states
        scores = network.classify(params, states, batch)
        assert scores.shape == (3, 3)
        for row, position in enumerate(read):
            kept = states.at[row, :position].set(0).at[row, position + 1 :].set(0)
            np.testing.assert_array_equal(network.classify(params, kept, batch)[row], scores[row])
            lost = states.at[row, position].set(0)
            assert np.max(np.abs(network.classify(params, lost, batch)[row] - scores[row])) > 1e-3


def test_classification_needs_classes() -> None:
    network = llama(num_labels=0)
    params = network.init(jax.random.key(0))
    batch = batch_of([[1, 1]])
    with pytest.raises(ValueError, match="num_labels"):
        network.classify(params, network.hidden(params, batch).states, batch)
