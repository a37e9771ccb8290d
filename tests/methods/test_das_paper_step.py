"""DAS within the real training step, compiled as in a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.methods.base import Method
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.sequential import Sequential
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer
from tests.tiny.batches import make_batch
from tests.tiny.networks import filled, in_unit, init, named, tiny_llama, tiny_roberta

pytestmark = pytest.mark.optimised  # bits are compared
STEPS = 4


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama(num_layers=1) if request.param == "llama" else tiny_roberta(num_layers=1)


@pytest.fixture(scope="module")
def masked(network: Network) -> Trainer:
    return make_trainer(network, DasPaper(DasPaperOptions(contrast_weight=0.0), network, 1))


def make_trainer(network: Network, method: Method) -> Trainer:
    layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, warmup=1)
    return Trainer(method, optimizer, layout, accumulate=1, seed=0)


def train(trainer: Trainer, network: Network, importance: float | None) -> dict[str, Any]:
    state = trainer.start_task(trainer.init(init(network)), STEPS)
    if importance is not None:
        state = trainer.with_method_state(state, {**state.method_state, "importance": filled(network, importance)})
    for seed in range(STEPS):
        state, metrics = trainer.step(state, jax.device_put(make_batch((6, 4), seed=seed), trainer.layout.batch))
        assert np.isfinite(metrics["loss"])
    return named(state.params)


def test_importance_0_trains_like_plain_fine_tuning_to_the_bit(network: Network, masked: Trainer) -> None:
    plain = train(make_trainer(network, Sequential(MethodOptions(), network, 1)), network, None)
    das = train(masked, network, 0.0)
    start = named(init(network))
    for path, leaf in plain.items():
        np.testing.assert_array_equal(das[path], leaf, err_msg=path)
        # Softmax does not see the keys' bias, and no gradient moves it.
        assert not np.array_equal(leaf, start[path]) or "key/bias" in path, path


def test_importance_1_freezes_to_the_bit(network: Network, masked: Trainer) -> None:
    # Weight decay is on: it must not move what is masked either.
    start = named(init(network))
    found = train(masked, network, 1.0)
    for path, leaf in start.items():
        assert np.array_equal(found[path], leaf) == in_unit(path), path
        assert jnp.all(jnp.isfinite(found[path]))


@pytest.mark.slow
def test_importance_1_with_shared_params_frozen_freezes_everything(network: Network) -> None:
    # The contrast is on: its gradient is masked like the other.
    trainer = make_trainer(network, DasPaper(DasPaperOptions(shared="frozen"), network, 1))
    start = named(init(network))
    for path, leaf in train(trainer, network, 1.0).items():
        np.testing.assert_array_equal(leaf, start[path], err_msg=path)
