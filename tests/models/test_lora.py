"""Adapters against kernels that hold their product; what is trained and what is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.generation import Generator
from jaxcl.models.lora import LoraConfig, adapted, fold
from jaxcl.models.network import Network
from jaxcl.models.trainable import overlay, trained
from tests.tiny.batches import batch_of
from tests.tiny.networks import ARCHITECTURES, BUILDERS, params_of, row_losses

SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
TARGETS = {
    "llama": ("query", "key", "value", "out", "gate", "up", "down"),
    "roberta": ("query", "key", "value", "out", "up", "down"),
    "modernbert": ("query", "key", "value", "out", "gate", "up", "down"),
    "deberta": ("query", "key", "value", "out", "up", "down"),
}
SCALE = 5 / 3


def adapted_network(architecture: str, **changes: Any) -> Network:
    lora = {"rank": 3, "alpha": 5.0, "targets": TARGETS[architecture]}
    return BUILDERS[architecture](lora={**lora, **changes})


def merged(params: Any) -> Any:
    """Plain params that hold every adapter's product, in NumPy, layer by layer."""
    if not isinstance(params, dict):
        return params
    if "lora_a" not in params:
        return {name: merged(node) for name, node in params.items()}
    kernel, a, b = (np.asarray(params[name], np.float64) for name in ("kernel", "lora_a", "lora_b"))
    products = []
    for one, other in zip(a, b, strict=True):
        flat = one.reshape(-1, one.shape[-1]) @ other.reshape(other.shape[0], -1)
        products.append(flat.reshape(kernel.shape[1:]))
    rest = {name: leaf for name, leaf in params.items() if name not in ("kernel", "lora_a", "lora_b")}
    return {**rest, "kernel": jnp.asarray(kernel + SCALE * np.stack(products), jnp.float32)}


def paths(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_computes_what_its_product_in_the_kernel_would(architecture: str) -> None:
    network, plain = adapted_network(architecture), BUILDERS[architecture]()
    params, batch = params_of(network), batch_of(SEGMENTS)
    found = jax.jit(lambda params: row_losses(network, params, batch))(params)
    expected = jax.jit(lambda params: row_losses(plain, params, batch))
    np.testing.assert_allclose(found, expected(merged(params)), rtol=2e-5)
    for _, leaves in adapted(params):
        assert np.abs(np.asarray(leaves["lora_b"])).max() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_neither_the_network_nor_its_draws(architecture: str) -> None:
    network, plain = adapted_network(architecture, rank=200), BUILDERS[architecture]()
    params, base = (jax.jit(one.init)(jax.random.key(3)) for one in (network, plain))
    found = paths(params)
    assert set(found) - set(paths(base)) == {
        f"blocks/{part}/{target}/{side}"
        for target in TARGETS[architecture]
        for part in ["attention" if target in ("query", "key", "value", "out") else "mlp"]
        for side in ("lora_a", "lora_b")
    }
    for path, leaf in paths(base).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    for path, leaves in adapted(params):
        assert not np.any(leaves["lora_b"]), path
        inputs = np.prod(leaves["lora_a"].shape[1:-1])
        assert np.std(leaves["lora_a"]) == pytest.approx((3 * inputs) ** -0.5, rel=0.1), path
    batch = batch_of(SEGMENTS)
    states = [one.hidden(given, batch).states for one, given in ((network, params), (plain, base))]
    np.testing.assert_allclose(*states, rtol=1e-5, atol=1e-6)  # two programs, which may round differently


def test_axes_are_those_of_the_kernel_around_the_rank() -> None:
    axes = paths(adapted_network("llama").axes())
    attention, mlp = "blocks/attention/", "blocks/mlp/"
    assert axes[f"{attention}query/lora_a"] == ("layers", "embed", "rank")
    assert axes[f"{attention}key/lora_b"] == ("layers", "rank", "kv_heads", "head_dim")
    assert axes[f"{attention}out/lora_a"] == ("layers", "heads", "head_dim", "rank")
    assert axes[f"{attention}out/lora_b"] == ("layers", "rank", "embed")
    assert axes[f"{mlp}down/lora_a"] == ("layers", "mlp", "rank")
    assert axes[f"{mlp}up/lora_b"] == ("layers", "rank", "mlp")


def test_adapters_stay_float32_beside_bfloat16_weights() -> None:
    network = BUILDERS["llama"](lora={}, compute={"param_dtype": "bfloat16", "dtype": "bfloat16"})
    dtypes = {path: leaf.dtype for path, leaf in paths(network.shapes()).items()}
    assert {path for path, dtype in dtypes.items() if dtype == jnp.float32} == {
        f"blocks/attention/{name}/{side}" for name in ("query", "value") for side in ("lora_a", "lora_b")
    }
    params = network.init(jax.random.key(0))
    assert network.hidden(params, batch_of(SEGMENTS)).states.dtype == jnp.bfloat16


def test_what_is_trained_is_cut_out_and_laid_back() -> None:
    params = params_of(adapted_network("llama", targets=("value",)))
    part = trained(params)
    assert sorted(paths(part)) == ["blocks/attention/value/lora_a", "blocks/attention/value/lora_b"]
    moved = overlay(params, jax.tree.map(lambda leaf: leaf + 1, part))
    for path, leaf in paths(moved).items():
        np.testing.assert_array_equal(leaf, paths(params)[path] + (path in paths(part)))
    whole = params_of(BUILDERS["llama"]())
    assert trained(whole) is whole


def test_folding_changes_the_split_and_not_the_network() -> None:
    network = adapted_network("llama", targets=("query", "down"))
    params, batch = params_of(network), batch_of(SEGMENTS)
    assert network.config.lora is not None
    changed = fold(params, network.config.lora, jax.random.key(5))
    assert len(paths(changed)) == 6
    folded = overlay(params, changed)
    for path, leaves in adapted(folded):
        assert not np.any(leaves["lora_b"]), path
        assert not np.array_equal(leaves["lora_a"], dict(adapted(params))[path]["lora_a"]), path
        np.testing.assert_allclose(leaves["kernel"], _kernels(merged(params))[path], rtol=1e-5, atol=1e-6)
    losses = jax.jit(lambda params: row_losses(network, params, batch))
    np.testing.assert_allclose(losses(folded), losses(params), rtol=2e-5)


def _kernels(params: Any) -> dict[str, Any]:
    return {path.removesuffix("/kernel"): leaf for path, leaf in paths(params).items() if path.endswith("/kernel")}


def test_generation_uses_the_adapter() -> None:
    network = adapted_network("llama", targets=("query", "value", "down"))
    params = params_of(network)
    prompts = [[3, 1, 4, 1], [7, 2]]
    answers = {}
    for name, one, given in (
        ("adapter", network, params),
        ("merged", BUILDERS["llama"](), merged(params)),
        ("base", BUILDERS["llama"](), merged(jax.tree_util.tree_map_with_path(_without_b, params))),
    ):
        options: dict[str, Any] = {"batch_size": 2, "prompt_length": 4, "max_new_tokens": 6, "eos_id": None}
        answers[name] = Generator(one, pad_id=0, **options)(given, prompts)
    assert answers["adapter"] == answers["merged"] != answers["base"]


def _without_b(path: Any, leaf: jax.Array) -> jax.Array:
    return jnp.zeros_like(leaf) if path[-1].key == "lora_b" else leaf


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("query", "gate")}, "an encoder has no gate; allowed are query, key, value, out, up, down"),
        ({"targets": ()}, "at least 1"),
        ({"targets": ("q_proj",)}, "'query', 'key'"),
        ({"rank": 0}, "greater than 0"),
    ],
)
def test_impossible_adapters_are_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILDERS["roberta"](lora=lora)


def test_scale_is_alpha_over_rank() -> None:
    assert LoraConfig(rank=4, alpha=10.0).scale == 2.5
