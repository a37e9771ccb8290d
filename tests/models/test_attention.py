import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import attention as module
from jaxcl.models import blocked_attention as blocked_module
from jaxcl.models.attention import attention, choose_kernel, explicit_attention
from jaxcl.models.axes import constraints
from jaxcl.models.blocked_attention import blocked_attention
from jaxcl.models.mask import visible
from jaxcl.models.splash import splash_attention


def inputs(length: int, heads: int, kv_heads: int, head_dim: int = 4, batch: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(length)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def document_rows(length: int, packed: bool) -> np.ndarray:
    """Two rows: three documents and padding (or one and padding), and a full row."""
    first = np.zeros(length, np.int32)
    if packed:
        first[: length // 3] = 1
        first[length // 3 : length // 2] = 2
        first[length // 2 : length - 2] = 3
    else:
        first[: length - 2] = 1
    return np.stack([first, np.ones(length, np.int32)])


def brute_force(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    segments: np.ndarray,
    causal: bool,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> np.ndarray:
    """One head at a time, in float64; zero at padding."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        scores = query[b, :, h].astype(float) @ key[b, :, h // group].T.astype(float) * scale
        weights = np.exp(scores if cap is None else cap * np.tanh(scores / cap))
        weights *= (segments[b, :, None] == segments[b]) & (segments[b] != 0)
        if window is not None:
            place = np.arange(query.shape[1])
            weights *= abs(place[:, None] - place) < window
        if causal:
            weights = np.tril(weights)
        out[b, :, h] = weights @ value[b, :, h // group] / np.maximum(weights.sum(1, keepdims=True), 1e-30)
    return out


CASES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("causal", "packed"), CASES)
@pytest.mark.parametrize("function", [blocked_attention, explicit_attention])
def test_equals_brute_force(function: Any, causal: bool, packed: bool) -> None:
    length = 150  # three blocks, the last one smaller
    segments = document_rows(length, packed)
    query, key, value = inputs(length, 4, 2)
    got = function(query, key, value, segments=segments, causal=causal, scale=0.7, packed=packed)
    want = brute_force(query, key, value, segments, causal, 0.7)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(np.where(segments[..., None, None] != 0, got, 0), want, atol=2e-6)


@pytest.mark.parametrize(("causal", "packed"), CASES)
@pytest.mark.parametrize("kernel", ["xla", "explicit"])
@pytest.mark.parametrize("windowed", [None, True, False])
def test_windows_and_caps_equal_brute_force(causal: bool, packed: bool, kernel: str, windowed: bool | None) -> None:
    """The window is shorter than a block of the kernel, and longer than what is left of the last one."""
    length, window = 150, 30
    segments = document_rows(length, packed)
    query, key, value = inputs(length, 4, 2)
    more: dict[str, Any] = {"segments": segments, "causal": causal, "scale": 0.7, "packed": packed, "cap": 1.5}
    if kernel == "explicit":
        reach = window if windowed is None else jnp.where(windowed, window, length)
        got = explicit_attention(query, key, value, window=reach, **more)
    else:
        flag = None if windowed is None else jnp.asarray(windowed)
        got = attention(query, key, value, kernel="xla", window=window, windowed=flag, **more)
    want = brute_force(query, key, value, segments, causal, 0.7, None if windowed is False else window, 1.5)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(np.where(segments[..., None, None] != 0, got, 0), want, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_with_a_window_reads_no_key_that_none_of_its_queries_sees(causal: bool) -> None:
    for rows, keys in blocked_module._blocks(500, causal, 40):
        seen = [key for key in range(500) for q in (rows.start, rows.stop - 1) if abs(q - key) < 40]
        seen = [key for key in seen if not causal or key < rows.stop]
        assert (keys.start, keys.stop) == (min(seen), max(seen) + 1)


def test_a_window_as_long_as_the_row_is_none() -> None:
    def text(**more: Any) -> str:
        def run(*arrays: jax.Array) -> jax.Array:
            segments = jnp.ones((2, 8), jnp.int32)
            return attention(*arrays, segments=segments, causal=True, scale=1.0, kernel="xla", **more)

        return jax.jit(run).lower(*inputs(8, 4, 2)).as_text()

    assert text(window=8, windowed=jnp.asarray(True)) == text() != text(window=7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (30, 1.5)])
def test_gradients_of_blocks_equal_those_of_the_explicit_path(
    causal: bool, window: int | None, cap: float | None
) -> None:
    length = 150
    segments = document_rows(length, True)
    weights = np.random.default_rng(1).normal(size=(2, length, 4, 4)) * (segments != 0)[..., None, None]

    def gradients(function: Any) -> Any:
        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            out = function(query, key, value, segments=segments, causal=causal, scale=0.7, window=window, cap=cap)
            return jnp.sum(weights * out)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs(length, 4, 2))

    for got, want in zip(gradients(blocked_attention), gradients(explicit_attention), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_visible_is_the_definition() -> None:
    segments = np.array([[1, 1, 2, 0]])
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(visible(segments, causal=True)[0, 0], np.array(want, bool))
    want = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(visible(segments, causal=False)[0, 0], np.array(want, bool))
    want = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    np.testing.assert_array_equal(visible(np.ones((1, 3), int), causal=True, window=2)[0, 0], np.array(want, bool))


@pytest.mark.parametrize(
    ("causal", "packed", "window", "cap"),
    [
        (True, True, None, None),
        (True, False, None, None),
        (False, False, None, None),
        (True, True, 30, 1.5),
        (False, False, 30, None),
    ],
)
def test_splash_in_the_interpreter_equals_the_explicit_path(
    causal: bool, packed: bool, window: int | None, cap: float | None
) -> None:
    length = 140  # padded to two blocks
    segments = document_rows(length, packed)
    real = (segments != 0)[..., None, None]
    weights = np.random.default_rng(1).normal(size=(2, length, 4, 8)) * real

    def both(function: Any, **more: Any) -> Any:
        more |= {"window": window, "cap": cap}

        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            out = function(query, key, value, segments=segments, causal=causal, scale=0.7, packed=packed, **more)
            return jnp.sum(weights * out), jnp.where(real, out, 0)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs(length, 4, 2, 8))

    got, want = both(splash_attention, interpret=True), both(explicit_attention)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class TwoDevicesForHeads:
    """Runs a kernel on each half of the heads in turn, as two devices would."""

    def constrain(self, x: jax.Array, names: Any) -> jax.Array:
        return x

    def shards(self, name: str) -> int:
        return 2 if name in ("heads", "kv_heads") else 1

    def per_shard(self, function: Any, inputs: Any, output: Any) -> Any:
        def part(x: jax.Array, names: Any, half: int) -> jax.Array:
            for name in ("heads", "kv_heads"):
                if name in names and x.shape[names.index(name)] % 2 == 0:
                    return jnp.split(x, 2, names.index(name))[half]
            return x

        def run(*arrays: jax.Array) -> jax.Array:
            halves = [function(*(part(x, n, i) for x, n in zip(arrays, inputs, strict=True))) for i in range(2)]
            return jnp.concatenate(halves, output.index("heads"))

        return run


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_splash_pairs_heads_rightly_when_they_are_split_over_devices(kv_heads: int) -> None:
    length = 128
    segments = np.ones((1, length), np.int32)
    arrays = inputs(length, 4, kv_heads, 8, batch=1)
    with constraints(TwoDevicesForHeads()):
        got = splash_attention(*arrays, segments=segments, causal=True, scale=0.7, packed=True, interpret=True)
    want = explicit_attention(*arrays, segments=segments, causal=True, scale=0.7)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_splash_can_be_lowered_for_a_tpu_on_this_host() -> None:
    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        segments = jnp.ones(query.shape[:2], jnp.int32)
        return attention(query, key, value, segments=segments, causal=True, scale=0.1, kernel="splash").sum()

    shapes = [jax.ShapeDtypeStruct((2, 512, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    # All three gradients are asked for: from jax 0.12 on, a kernel whose outputs nobody reads is left out.
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    # The kernels forward, for the gradient of queries, and for the gradients of keys and values.
    assert sorted(re.findall(r'kernel_name = "splash_mha_([a-z]+)_', text)) == ["dkv", "dq", "fwd"]


def test_cudnn_leaves_soft_caps_to_others() -> None:
    module.warn_once.cache_clear()
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(8, 4, 2, 8)]
    segments = document_rows(8, True)
    with pytest.warns(UserWarning, match="it has no soft cap"):
        attention(*arrays, segments=segments, causal=True, scale=0.7, kernel="cudnn", cap=2.0)


def test_auto_follows_the_platform_and_a_named_kernel_stays() -> None:
    assert [choose_kernel("auto", p) for p in ("tpu", "gpu", "cuda", "cpu")] == ["splash", "cudnn", "cudnn", "xla"]
    assert choose_kernel("xla", "tpu") == "xla"


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "reason"),
    [(8, 8, jnp.float32, "float32"), (8, 12, jnp.bfloat16, "head_dim"), (7, 8, jnp.bfloat16, "length")],
)
def test_what_cudnn_cannot_do_falls_back_with_one_warning(length: int, head_dim: int, dtype: Any, reason: str) -> None:
    module.warn_once.cache_clear()
    arrays = [jnp.asarray(x, dtype) for x in inputs(length, 4, 2, head_dim)]
    segments = document_rows(length, True)
    arguments: dict[str, Any] = {"segments": segments, "causal": True, "scale": 0.7}
    with pytest.warns(UserWarning, match=reason):
        got = attention(*arrays, kernel="cudnn", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*arrays, kernel="cudnn", **arguments)
    np.testing.assert_array_equal(got, attention(*arrays, kernel="xla", **arguments))


@pytest.mark.parametrize(("causal", "packed"), CASES)
@pytest.mark.parametrize("window", [None, 5])
def test_cudnn_is_asked_for_the_same_thing(
    monkeypatch: pytest.MonkeyPatch, causal: bool, packed: bool, window: int | None
) -> None:
    """The library's own XLA implementation stands in for its cuDNN one: same arguments, same meaning."""
    library = jax.nn.dot_product_attention
    asked: list[str] = []

    def stand_in(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        asked.append(implementation)
        return library(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    segments = document_rows(16, packed)
    segments = np.concatenate([segments, np.zeros((1, 16), np.int32)])  # and a filler row
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(16, 4, 2, 8, batch=3)]
    got = attention(*arrays, segments=segments, causal=causal, scale=0.7, kernel="cudnn", packed=packed, window=window)
    assert asked == ["cudnn"]
    got = np.asarray(got, np.float32)
    assert np.all(np.isfinite(got))
    want = brute_force(*(np.asarray(x, np.float32) for x in arrays), segments, causal, 0.7, window)
    np.testing.assert_allclose(np.where(segments[..., None, None] != 0, got, 0), want, atol=0.02)
