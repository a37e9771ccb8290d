"""Rearranged axes: whole, in parts, and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.weights.axes import Layout, whole
from jaxcl.weights.tables import BERT, GGUF_TABLES, ROBERTA, decoder_table

LLAMA, LLAMA_GGUF = decoder_table(), GGUF_TABLES["llama"]

LAYOUTS = sorted({row.text for table in (LLAMA, ROBERTA, BERT, *GGUF_TABLES.values()) for row in table.rows})


def target_shape(layout: Layout) -> tuple[int, ...]:
    """Different sizes on all dimensions, those that hold a pair even."""
    return tuple((3, 5, 7)[i] * (2 if len(group) > 1 else 1) for i, group in enumerate(layout.target))


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """From HF's order of a head's rows (first half, second half) to interleaved ones, written out row by row."""
    out = np.empty_like(weight)
    width = weight.shape[0] // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = weight[head * width + i]
            out[head * width + 2 * i + 1] = weight[head * width + width // 2 + i]
    return out


def test_split_heads_and_transpose_as_written_out_by_hand() -> None:
    file = np.arange(6 * 4).reshape(6, 4)  # 2 heads of 3, 4 inputs
    layout = Layout.parse("(heads head_dim) embed -> embed heads head_dim")
    parameter = layout.read(lambda index: file[index], (4, 2, 3), whole((4, 2, 3)))
    for head in range(2):
        for depth in range(3):
            for embed in range(4):
                assert parameter[embed, head, depth] == file[head * 3 + depth, embed]


def test_gguf_layout_undoes_llama_cpp_permutation() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(16, 5)), rng.normal(size=16)
    plain, pairs = (table.row("blocks/attention/query/kernel").layout for table in (LLAMA, LLAMA_GGUF))
    permuted = llama_cpp_permute(weight, heads=2)
    everything = whole((5, 2, 8))
    expected = plain.read(lambda index: weight[index], (5, 2, 8), everything)
    np.testing.assert_array_equal(pairs.read(lambda index: permuted[index], (5, 2, 8), everything), expected)
    np.testing.assert_array_equal(pairs.write(expected), permuted)
    layout = LLAMA_GGUF.row("blocks/attention/key/bias").layout
    permuted = llama_cpp_permute(bias, heads=2)
    read = layout.read(lambda index: permuted[index], (2, 8), whole((2, 8)))
    np.testing.assert_array_equal(read, bias.reshape(2, 8))


@pytest.mark.parametrize("text", LAYOUTS)
def test_write_undoes_read(text: str) -> None:
    layout = Layout.parse(text)
    shape = target_shape(layout)
    file = np.arange(np.prod(shape)).reshape(layout.source_shape(shape))
    parameter = layout.read(lambda index: file[index], shape, whole(shape))
    assert parameter.shape == shape
    np.testing.assert_array_equal(layout.write(parameter), file)


@given(st.sampled_from(LAYOUTS), st.data())
@settings(max_examples=150, deadline=None)
def test_a_part_is_the_part_of_the_whole(text: str, data: st.DataObject) -> None:
    layout = Layout.parse(text)
    shape = target_shape(layout)
    file = np.arange(np.prod(shape)).reshape(layout.source_shape(shape))
    cuts = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        cuts.append(slice(start, data.draw(st.integers(start + 1, size))))
    everything = layout.read(lambda index: file[index], shape, whole(shape))
    np.testing.assert_array_equal(layout.read(lambda index: file[index], shape, tuple(cuts)), everything[tuple(cuts)])


def test_only_the_rows_of_the_wanted_heads_are_fetched() -> None:
    layout = Layout.parse("(heads head_dim) embed -> embed heads head_dim")
    fetched = []

    def fetch(index: tuple[slice, ...]) -> np.ndarray:
        fetched.append(index)
        return np.zeros((32, 4))[index]

    layout.read(fetch, (4, 4, 8), (slice(1, 3), slice(2, 3), slice(0, 8)))
    assert fetched == [(slice(16, 24), slice(1, 3))]


def test_sides_with_different_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not name the same axes"):
        Layout.parse("a b -> a c")
