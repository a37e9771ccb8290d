"""What must not change DAS's numbers: rematerialisation, precision, micro-batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.functional.importance import ImportanceSums, gate_gradients, normalise_tanh
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.passes.importance import add_domain_importance, add_general_importance
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.compute import Compute
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer
from tests.tiny.batches import make_batch
from tests.tiny.networks import filled, init, named, tiny_llama, tiny_roberta


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """To `tolerance` of the largest value of a leaf; a leaf of zeros would show nothing."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def measure(network: Network, params: Any, general: bool) -> Gates:
    batch = make_batch((6, 4, 5))

    def run() -> Gates:
        sums = ImportanceSums.zero(network.gates())
        if general:
            return add_general_importance(network, sums, params, batch, jax.random.key(1), 0.2, 2).mean()
        return add_domain_importance(network, sums, params, batch, 2).mean()

    return jax.jit(run)()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "general"), [(tiny_llama, False), (tiny_roberta, True)])
def test_rematerialisation_changes_no_importance(make: Any, general: bool) -> None:
    params = init(make())
    plain = measure(make(), params, general)
    for remat in ("full", "dots"):
        assert_close(measure(make(compute=Compute(remat=remat)), params, general), plain, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_roberta])
def test_bfloat16_gives_nearly_the_same_gate_gradients(make: Any) -> None:
    # A product in bfloat16 is off by up to 2^-9 of itself, and a gradient passes through some twenty of them, whose
    # errors are independent: sqrt(20) / 512 = 0.9%. The sums over tokens must not add to that.
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "max_length": 256, "init_std": 0.1}
    params = init(make(**shape))
    batch = make_batch((256, 200), length=256, predict=32)

    def gradients(dtype: Any) -> Gates:
        network = make(**shape, compute=Compute(dtype=dtype))

        def losses(gates: Gates) -> jax.Array:
            return example_losses(network, params, network.hidden(params, batch, gates=gates).states, batch, 0)

        return jax.jit(lambda: gate_gradients(losses, network.gates(batch.size)))()

    for wide, low in zip(*map(jax.tree.leaves, (gradients("float32"), gradients("bfloat16"))), strict=True):
        assert low.dtype == jnp.float32
        error = np.sqrt(np.mean(np.square(low - wide)) / np.mean(np.square(wide)))
        assert 1e-4 < error < 0.015


OPTIMIZERS = {
    # Masks on each micro-batch would leave 0.4^4 of a gradient instead of 0.4.
    "gradient": OptimizerConfig(name="sgd", b1=0.0, learning_rate=0.1, schedule="constant", clip_norm=None),
    "update": OptimizerConfig(name="adamw", learning_rate=0.1, eps=1e-2, weight_decay=0.1, schedule="constant"),
}


@pytest.mark.parametrize("mask_on", [pytest.param("gradient", marks=pytest.mark.slow), "update"])
def test_masks_act_once_however_many_micro_batches(mask_on: Any) -> None:
    network = tiny_llama(num_layers=1)
    layout = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), network.axes(), network.shapes())
    batch = jax.device_put(make_batch((6, 4, 5, 3)), layout.batch)
    method = DasPaper(DasPaperOptions(contrast_weight=0.0, mask_on=mask_on), network, 1)
    start = named(init(network))
    moved = []
    for accumulate in (1, 4):
        trainer = Trainer(method, OPTIMIZERS[mask_on], layout, accumulate=accumulate, seed=0)
        state = trainer.start_task(trainer.init(init(network)), 1)
        state = trainer.with_method_state(state, {**state.method_state, "importance": filled(network, 0.6)})
        after = named(trainer.step(state, batch)[0].params)
        moved.append({path: np.asarray(leaf) - start[path] for path, leaf in after.items()})
    assert_close(moved[1], moved[0], 1e-4)


SMALL = tiny_llama(num_layers=1, intermediate_size=6)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=8, max_size=8), min_size=3, max_size=3), st.booleans())
def test_accumulated_importance_never_falls_and_each_domain_is_kept(domains: list[list[int]], tanh: bool) -> None:
    method = DasPaper(DasPaperOptions(normalisation="tanh" if tanh else "quantile"), SMALL, 3)
    state = method.init(None)
    seen = []
    for place, values in enumerate(domains, start=1):
        total = jax.tree.map(
            lambda gate, values=values: 1e-4 * jnp.array([values[: gate.shape[1]]]), state["importance"]
        )
        new = method.update_state(state, ImportanceSums(total, jnp.float32(2)), jnp.int32(place))
        for before, after in zip(jax.tree.leaves(state["importance"]), jax.tree.leaves(new["importance"]), strict=True):
            assert np.all((np.asarray(after) >= before) & (np.asarray(after) <= 1))
        seen.append(jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), new["history"]))
        state = new
    for place, one in enumerate(seen, start=1):
        kept = jax.tree.map(lambda leaf, place=place: leaf[place], state["history"])
        jax.tree.map(np.testing.assert_array_equal, kept, one)
    highest = jax.tree.map(lambda *leaves: np.max(leaves, axis=0), *seen)
    jax.tree.map(np.testing.assert_array_equal, state["importance"], highest)


@pytest.mark.parametrize("value", [0.1, 0.3, 1e-7, 3e4])
def test_units_that_are_all_equal_are_none_of_them_important(value: float) -> None:
    # Their mean is rounded: what is left after subtracting it must not be taken for a deviation.
    for units in (1, 7, 12, 3072):
        np.testing.assert_array_equal(normalise_tanh(jnp.full((2, units), value)), 0.0)
