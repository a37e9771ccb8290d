"""DAS within the real training step, compiled as in a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_helpers import filled, in_unit, init, make_batch, named, tiny_llama

from jaxcl.methods.base import Method, MethodConfig
from jaxcl.methods.das import Das, DasConfig
from jaxcl.methods.sequential import Sequential
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer

OPTIMISED = True  # bits are compared
STEPS = 4


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_llama(num_layers=1)


def train(network: Network, method: Method, importance: float | None) -> dict[str, Any]:
    layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, warmup=1)
    trainer = Trainer(method, optimizer, layout, accumulate=1, seed=0)
    state = trainer.start_task(trainer.init(init(network)), STEPS)
    if importance is not None:
        state = trainer.with_method_state(state, {**state.method_state, "importance": filled(network, importance)})
    for seed in range(STEPS):
        state, metrics = trainer.step(state, jax.device_put(make_batch((6, 4), seed=seed), layout.batch))
        assert np.isfinite(metrics["loss"])
    return named(state.params)


def test_importance_0_trains_like_plain_fine_tuning_to_the_bit(network: Network) -> None:
    plain = train(network, Sequential(MethodConfig(), network, 1), None)
    das = train(network, Das(DasConfig(contrast_weight=0.0), network, 1), 0.0)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(das[path], leaf, err_msg=path)


def test_importance_1_freezes_to_the_bit(network: Network) -> None:
    start = named(init(network))
    found = train(network, Das(DasConfig(), network, 1), 1.0)
    for path, leaf in start.items():
        assert np.array_equal(found[path], leaf) == in_unit(path), path
        assert jnp.all(jnp.isfinite(found[path]))
