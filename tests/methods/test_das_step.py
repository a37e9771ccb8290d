"""The second version of DAS within the real training step, compiled as in a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.methods.base import Method
from jaxcl.methods.das import Das, DasOptions
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.sequential import Sequential
from jaxcl.models.network import Network
from jaxcl.models.trainable import trained
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer
from tests.tiny.batches import make_batch
from tests.tiny.networks import init, named, tiny_llama

pytestmark = pytest.mark.optimised  # bits are compared
NETWORK = tiny_llama(num_layers=1)
STEPS = 3


def train(method: Method, network: Network, importance: float | None, **section: Any) -> dict[str, Any]:
    layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
    optimizer = OptimizerConfig(**{"learning_rate": 0.01, "weight_decay": 0.1, "warmup": 1, **section})
    trainer = Trainer(method, optimizer, layout, accumulate=1, seed=0)
    state = trainer.start_task(trainer.init(init(network)), STEPS)
    if importance is not None:
        filled = jax.tree.map(lambda leaf: jnp.full_like(leaf, importance), state.method_state["importance"])
        state = trainer.with_method_state(state, {**state.method_state, "importance": filled})
    for seed in range(STEPS):
        state, metrics = trainer.step(state, jax.device_put(make_batch((6, 4), seed=seed), trainer.layout.batch))
        assert np.isfinite(metrics["loss"])
    return named(trained(state.params))


@pytest.mark.slow
def test_where_nothing_is_known_it_trains_like_plain_fine_tuning() -> None:
    """Without a pull to the bit; with one but for rounding: a compiler fuses other products and sums."""
    plain = train(Sequential(MethodOptions(), NETWORK, 1), NETWORK, None)
    start = named(init(NETWORK))
    exact = train(Das(DasOptions(hold="both", strength=0.0), NETWORK, 1), NETWORK, 0.0)
    pulled = train(Das(DasOptions(hold="pull"), NETWORK, 1), NETWORK, 0.0)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(exact[path], leaf, err_msg=path)
        far = float(jnp.max(jnp.abs(leaf - start[path])))
        np.testing.assert_allclose(pulled[path], leaf, atol=1e-4 * far, err_msg=path)


def test_great_importance_holds_params_where_they_were() -> None:
    """Weight decay is on: it does not move what is held either. Any optimizer."""
    start = named(init(NETWORK))
    for name in ("adamw", "lion", "sgd", "adafactor"):
        moved = train(Das(DasOptions(), NETWORK, 1), NETWORK, 0.0, name=name)
        found = train(Das(DasOptions(), NETWORK, 1), NETWORK, 1e12, name=name)
        for path, leaf in start.items():
            far = float(jnp.max(jnp.abs(moved[path] - leaf)))
            assert far > 0
            np.testing.assert_allclose(found[path], leaf, atol=1e-3 * far + 1e-7, err_msg=f"{name} {path}")


@pytest.mark.slow
def test_a_mask_slows_and_a_pull_of_half_the_importance_holds_less() -> None:
    start, moved = named(init(NETWORK)), train(Sequential(MethodOptions(), NETWORK, 1), NETWORK, None)

    def distance(found: dict[str, Any]) -> float:
        return float(sum(jnp.sum(jnp.square(leaf - start[path])) for path, leaf in found.items()))

    masked = train(Das(DasOptions(hold="mask", mask_strength=1.0), NETWORK, 1), NETWORK, 1.0)
    assert 0 < distance(masked) < 0.9 * distance(moved)
    pulls = [distance(train(Das(DasOptions(strength=30.0), NETWORK, 1), NETWORK, size)) for size in (1.0, 10.0, 100.0)]
    assert distance(moved) > pulls[0] > pulls[1] > pulls[2] > 0
