"""Quantised kernels against NumPy, and networks that hold them against networks that hold what they stand for."""

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.generation import Generator
from jaxcl.models.network import Network
from jaxcl.models.quantised import NF4, dequantise, dequantised, quantise, quantised_shapes
from jaxcl.models.trainable import overlay, trained
from jaxcl.weights.tree import flatten
from tests.tiny.batches import batch_of
from tests.tiny.networks import BUILDERS, params_of, row_losses

SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
TARGETS = {
    "llama": ("query", "key", "value", "out", "gate", "up", "down"),
    "roberta": ("query", "key", "value", "out", "up", "down"),
}


def held(architecture: str, how: str, **changes: Any) -> Network:
    lora = {"rank": 3, "targets": TARGETS[architecture]}
    return BUILDERS[architecture](lora=lora, quantise=how, intermediate_size=20, **changes)


def quantised_params(network: Network) -> Any:
    """Params whose adapters are not zero."""
    fresh = jax.jit(network.init)(jax.random.key(1))
    return overlay(fresh, trained(params_of(network.unquantised)))


def numpy_nf4(kernel: np.ndarray, axis: int, block: int) -> np.ndarray:
    """The nearest level of every number, block by block, by trying all."""
    rows = np.moveaxis(kernel, axis, -1).reshape(-1, block).astype(np.float64)
    absmax = np.abs(rows).max(-1, keepdims=True)
    levels = np.array(NF4)
    nearest = levels[np.argmin(np.abs((rows / absmax)[..., None] - levels), axis=-1)] * absmax
    shape = np.moveaxis(kernel, axis, -1).shape
    return np.moveaxis(nearest.reshape(shape), -1, axis)


def test_levels_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """As the authors' code makes them: seven of the lower half, zero, eight of the upper half; the largest is 1."""
    upper, lower = (
        np.array([NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count, endpoint=False)])
        for count in (8, 7)
    )
    expected = sorted([*-lower, 0.0, *upper])
    np.testing.assert_allclose(NF4, np.array(expected) / max(upper), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "inputs", "block"),
    [((128, 3, 8), 1, 64), ((3, 64, 5), 2, 64), ((96, 5), 1, 32), ((2, 12, 7), 2, 4)],
)
def test_nf4_is_the_nearest_level_of_blocks_along_the_last_input_axis(
    shape: tuple[int, ...], inputs: int, block: int
) -> None:
    kernel = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    sizes = quantised_shapes(shape, inputs, "nf4")
    found = quantise(jnp.asarray(kernel), (2, *sizes.scale), "nf4")
    assert found.codes.dtype == jnp.uint8
    assert found.codes.shape == (2, *sizes.codes)
    assert 2 * found.codes.size == kernel.size
    assert found.scale.size * block == kernel.size
    np.testing.assert_allclose(dequantise(*found), numpy_nf4(kernel, inputs, block), rtol=1e-6)


def test_two_numbers_share_a_byte_the_first_in_its_upper_half() -> None:
    kernel = jnp.array([[-1.0], [1.0], [0.0], [NF4[3]]])
    assert quantise(kernel, (1, 1), "nf4").codes.tolist() == [[0x0F], [0x73]]


def test_int8_errs_by_half_a_step_of_its_output_channel() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 16, 2, 5)).astype(np.float32)
    kernel[:, :, 1, 2] *= 1000
    sizes = quantised_shapes(kernel.shape[1:], 1, "int8")
    codes, scale = quantise(jnp.asarray(kernel), (3, *sizes.scale), "int8")
    steps = np.abs(kernel).max(1, keepdims=True) / 127
    np.testing.assert_allclose(scale, steps, rtol=1e-6)
    assert codes.dtype == jnp.int8
    error = np.abs(dequantise(codes, scale) - kernel) / steps
    assert 0.49 < error.max() <= 0.5001


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_kernel_of_zeros_stays_so(how: Any) -> None:
    sizes = quantised_shapes((8, 3), 1, how)
    assert not np.any(dequantise(*quantise(jnp.zeros((8, 3)), sizes.scale, how)))


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def test_only_kernels_of_layers_are_quantised(architecture: str, how: str) -> None:
    network = held(architecture, how)
    plain, shapes = flatten(network.unquantised.shapes()), flatten(network.shapes())
    kernels = {path for path in plain if path.startswith("blocks/") and path.endswith("/kernel")}
    assert len(kernels) == len(TARGETS[architecture])
    assert shapes.keys() - plain.keys() == {f"{path}_scale" for path in kernels}
    assert {path for path in plain if plain[path] != shapes[path]} == kernels
    assert network.num_params == network.unquantised.num_params
    # The numbers are those that would be drawn without.
    draws, found = (flatten(jax.jit(one.init)(jax.random.key(3))) for one in (network.unquantised, network))
    for path in kernels:
        expected = quantise(draws[path], shapes[f"{path}_scale"].shape, how)  # type: ignore[arg-type]
        np.testing.assert_allclose(dequantise(found[path], found[f"{path}_scale"]), dequantise(*expected), rtol=1e-6)


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_beside_the_dequantised_weights(architecture: str, how: str, remat: str) -> None:
    network = held(architecture, how, compute={"remat": remat})
    params, batch = quantised_params(network), batch_of(SEGMENTS)

    def graded(network: Network, params: Any) -> Any:
        def loss(part: Any) -> Any:
            return jnp.sum(row_losses(network, overlay(params, part), batch))

        return jax.jit(jax.value_and_grad(loss))(trained(params))

    found, expected = graded(network, params), graded(network.unquantised, dequantised(params))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for path, leaf in flatten(found[1]).items():
        assert np.abs(leaf).max() > 0, path
        wanted = flatten(expected[1])[path]
        # A small entry is a difference of terms as large as the largest ones.
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max(), err_msg=path)


def test_no_pass_keeps_a_dequantised_kernel() -> None:
    """What the layers hand to the backward pass are results of the scan over them."""
    network = held("llama", "nf4", hidden_size=24)
    kernels = {
        leaf.shape
        for path, leaf in flatten(network.unquantised.shapes()).items()
        if path.startswith("blocks/") and path.endswith("/kernel")
    }

    def kept(network: Network) -> set[tuple[int, ...]]:
        params, batch = quantised_params(network), batch_of(SEGMENTS)

        def loss(part: Any) -> Any:
            return jnp.sum(row_losses(network, overlay(params, part), batch))

        program = jax.make_jaxpr(jax.grad(loss))(trained(params))
        scans = [one for one in program.eqns if one.primitive.name == "scan"]
        assert len(scans) == 2
        codes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.uint8}
        results = {out.aval.shape for one in scans for out in one.outvars}  # type: ignore[union-attr]
        assert not results & codes  # no copies of these, either
        return results

    assert not kept(network) & kernels


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_step_needs_no_more_than_the_kernels_of_one_layer(how: str, optimised: None) -> None:
    """In float32, even if products are bfloat16: so the compiler for CPUs has it."""
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "num_layers": 4}
    network = held("llama", how, **sizes, compute={"remat": "full", "dtype": "bfloat16", "param_dtype": "bfloat16"})
    batch = batch_of(SEGMENTS)

    def loss(part: Any, params: Any) -> Any:
        return jnp.sum(row_losses(network, overlay(params, part), batch))

    shapes = network.shapes()
    compiled = jax.jit(jax.grad(loss)).lower(trained(shapes), shapes).compile()
    plain = flatten(network.unquantised.shapes())
    layer = sum(
        4 * leaf.size // leaf.shape[0]
        for path, leaf in plain.items()
        if path.startswith("blocks/") and "kernel" in path
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * layer  # and activations


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_generation_is_that_of_the_dequantised_weights(how: str) -> None:
    network = held("llama", how)
    params = quantised_params(network)
    options: dict[str, Any] = {"batch_size": 2, "prompt_length": 4, "max_new_tokens": 6, "eos_id": None, "pad_id": 0}
    prompts = [[3, 1, 4, 1], [7, 2]]
    answers = [Generator(network, **options)(params, prompts)]
    answers.append(Generator(network.unquantised, **options)(dequantised(params), prompts))
    assert answers[0] == answers[1]


def test_axes_of_scales_are_those_of_what_shares_them() -> None:
    axes = {how: flatten(held("llama", how).axes()) for how in ("int8", "nf4")}
    assert axes["int8"]["blocks/attention/key/kernel_scale"] == ("layers", None, "kv_heads", "head_dim")
    assert axes["int8"]["blocks/attention/out/kernel_scale"] == ("layers", None, None, "embed")
    assert axes["nf4"]["blocks/attention/key/kernel_scale"] == ("layers", "embed_blocks", "kv_heads", "head_dim")
    assert axes["nf4"]["blocks/mlp/down/kernel_scale"] == ("layers", "mlp_blocks", "embed")
    assert axes["nf4"]["blocks/mlp/down/kernel"] == ("layers", "mlp", "embed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantise": "int8"}, "quantise: int8 holds weights that are not trained; set model.lora"),
        ({"quantise": "nf4", "lora": {}, "intermediate_size": 18}, "nf4 needs intermediate_size to be a multiple of 4"),
        ({"quantise": "nf4", "lora": {}, "head_dim": 6}, "nf4 needs head_dim to be a multiple of 4, got 6"),
        ({"quantise": "int4", "lora": {}}, "'none', 'int8' or 'nf4'"),
    ],
)
def test_what_cannot_be_quantised_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILDERS["llama"](**changes)
