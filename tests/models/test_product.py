"""The matrix product's own backward pass against automatic differentiation of the plain product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import layers
from jaxcl.models.batch import Batch
from jaxcl.models.product import product
from tests.tiny.networks import tiny_llama

pytestmark = pytest.mark.optimised  # compiled programs are read

SHAPES = [  # rows, inputs, outputs: kernels with one or two axes on a side, narrower at the input or the output
    ((5,), (3,), (7,)),
    ((2, 5), (7,), (3,)),
    ((2, 5), (6,), (2, 4)),
    ((2, 5), (2, 4), (6,)),
    ((2, 5), (2, 4), (9,)),
    ((), (4,), (3,)),
]


def plain(x: jax.Array, kernel: jax.Array, contracted: int, dtype: type | None = None) -> jax.Array:
    return jnp.tensordot(x, kernel, axes=contracted, preferred_element_type=dtype)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_values_and_gradients_are_those_of_tensordot(
    rows: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (rows + inputs, inputs + outputs, rows + outputs)
    )

    def results(function: object) -> object:
        def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.sum(weights * jnp.sin(function(x, kernel, len(inputs))))  # type: ignore[operator]

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), results(product), results(plain))


def test_wide_sums_give_gradients_in_the_dtype_of_the_factors() -> None:
    rng = np.random.default_rng(1)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((6, 8), (8, 4)))
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, 1, jnp.float32), x, kernel)
    dx, dkernel = pull(jnp.ones_like(y))
    assert y.dtype == jnp.float32
    assert dx.dtype == dkernel.dtype == jnp.bfloat16
    # One rounding to 8 bits of a sum of exact products.
    np.testing.assert_allclose(dx.astype(float), np.tile(kernel.astype(float).sum(1), (6, 1)), rtol=2**-8)
    np.testing.assert_allclose(dkernel.astype(float), np.tile(x.astype(float).sum(0)[:, None], (1, 4)), rtol=2**-8)


def test_no_wide_activation_is_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the kernels' gradients, the program reads the 24 wide states across their rows, not the 88 wide ones."""
    network = tiny_llama(hidden_size=24, intermediate_size=88)
    tokens, row = jax.ShapeDtypeStruct((4, 64), "int32"), jax.ShapeDtypeStruct((4,), "int32")
    weights = jax.ShapeDtypeStruct((4, 64), "float32")
    batch = Batch(tokens, tokens, tokens, None, tokens, weights, row, row, packed=False)

    def transposed() -> int:
        def loss(params: Any, batch: Batch) -> jax.Array:
            return jnp.sum(network.hidden(params, batch).states)

        return jax.jit(jax.grad(loss)).lower(network.shapes(), batch).compile().as_text().count("f32[88,256]{1,0}")

    assert transposed() == 0
    monkeypatch.setattr(layers, "product", plain)
    assert transposed() > 0
