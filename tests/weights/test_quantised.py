"""Checkpoints as quantised weights beside adapters, and what is written of them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxcl.errors import UserError
from jaxcl.models.network import Network, Params
from jaxcl.models.quantised import cast, dequantised, quantise
from jaxcl.models.trainable import overlay, trained
from jaxcl.weights import load_params, load_weights, named, save_hf, save_orbax, save_peft
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.networks import CONFIGS, assert_equal_bits, random_params

KINDS = ("int8", "nf4")
LORA = {"rank": 3, "alpha": 5.0, "targets": ("query", "down")}


def adapted(name: str, how: str, dtype: str = "float32") -> Network:
    config = CONFIGS[name]
    compute = config.compute.model_copy(update={"param_dtype": dtype})
    return Network.create(type(config)(**{**config.model_dump(), "lora": LORA, "quantise": how, "compute": compute}))


def expected_of(network: Network, base: Params) -> Params:
    """The base's kernels quantised one by one, whole; the adapters are random."""
    found, shapes = {}, flatten(network.shapes())
    flat = flatten(overlay(random_params(network.unquantised), base))
    for path, leaf in flat.items():
        if f"{path}_scale" in shapes:
            scale = shapes[f"{path}_scale"].shape
            found[path], found[f"{path}_scale"] = jax.jit(
                lambda kernel, scale=scale: quantise(kernel, scale, network.config.quantise)
            )(leaf)
        else:
            found[path] = leaf.astype(shapes[path].dtype)
    return unflatten({path: found[path] for path in shapes})


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize(("name", "how"), [("llama", "int8"), ("llama", "nf4"), ("roberta", "int8")])
def test_kernels_are_quantised_while_loading(name: str, how: str, form: str, tmp_path: Path) -> None:
    plain = Network.create(CONFIGS[name])
    base = random_params(plain)
    {"hf": save_hf, "orbax": save_orbax}[form](tmp_path / "model", plain, base)
    network = adapted(name, how, "bfloat16")  # quantised from the file's float32, though
    found = load_params(tmp_path / "model", network, key=jax.random.key(0))
    expected = overlay(expected_of(network, base), trained(found))
    assert_equal_bits(found, expected)


@pytest.mark.parametrize("how", KINDS)
def test_an_orbax_folder_holds_them_as_they_are(how: str, tmp_path: Path) -> None:
    network = adapted("llama", how)
    params = expected_of(network, random_params(Network.create(CONFIGS["llama"])))
    save_orbax(tmp_path / "model", network, params)
    read, found = load_weights(tmp_path / "model")
    assert read.config == network.config
    assert_equal_bits(found, params)
    low = cast(params, "bfloat16")
    save_orbax(tmp_path / "low", network, low)
    read, found = load_weights(tmp_path / "low")
    assert read.config.compute.param_dtype == "bfloat16"
    for path, leaf in flatten(params).items():
        if "kernel" in path and path.startswith("blocks/"):
            np.testing.assert_array_equal(flatten(found)[path], leaf, err_msg=path)
    with pytest.raises(UserError, match=r"no parameter for the tensor blocks/attention/key/kernel_scale"):
        load_params(tmp_path / "model", network.unquantised)


@pytest.mark.parametrize("how", KINDS)
def test_exports_are_those_of_the_dequantised_weights(how: str, tmp_path: Path) -> None:
    network = adapted("llama", how)
    params = expected_of(network, random_params(Network.create(CONFIGS["llama"])))
    plain = dequantised(params)
    save_hf(tmp_path / "quantised", network, params)
    save_hf(tmp_path / "plain", network.unquantised, plain)
    assert _tensors(tmp_path / "quantised/model.safetensors", tmp_path / "plain/model.safetensors")
    assert (tmp_path / "quantised/config.json").read_text() == (tmp_path / "plain/config.json").read_text()
    save_peft(tmp_path / "adapter", network, params)
    save_peft(tmp_path / "same", network.unquantised, plain)
    names = "adapter_model.safetensors"
    assert _tensors(tmp_path / "adapter" / names, tmp_path / "same" / names)
    found, expected = (
        jax.jit(lambda p, one=one: named(one, p))(p) for one, p in ((network, params), (network.unquantised, plain))
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, err_msg=name)


def _tensors(one: Path, other: Path) -> int:
    """How many tensors two files have, which are the same."""
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, err_msg=name)
    return len(found)


def test_casting_leaves_codes_and_scales_alone() -> None:
    params = expected_of(adapted("llama", "nf4"), random_params(Network.create(CONFIGS["llama"])))
    dtypes: dict[str, Any] = {path: leaf.dtype for path, leaf in flatten(cast(params, "bfloat16")).items()}
    for path, dtype in dtypes.items():
        if path.startswith("blocks/") and "kernel" in path:
            assert dtype == (jnp.float32 if path.endswith("_scale") else jnp.uint8), path
        else:
            assert dtype == jnp.bfloat16, path
