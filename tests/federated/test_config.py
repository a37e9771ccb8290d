"""The section `federated`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional import server_step
from jaxcl.training.federated import FederatedConfig, ServerConfig

# Fields that each server uses, with a value that changes the second round.
FIELDS: dict[str, dict[str, float]] = {
    "fedavg": {"learning_rate": 0.5},
    "fedavgm": {"learning_rate": 0.5, "momentum": 0.5},
    "fedadagrad": {"learning_rate": 0.5, "b1": 0.5, "adaptivity": 0.1},
    "fedadam": {"learning_rate": 0.5, "b1": 0.5, "b2": 0.5, "adaptivity": 0.1},
    "fedyogi": {"learning_rate": 0.5, "b1": 0.5, "b2": 0.5, "adaptivity": 0.1},
}


def two_rounds(config: ServerConfig) -> np.ndarray:
    optimizer, params = config.build(), jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    for mean in ([1.5, -1.0], [0.5, 0.5]):
        params, state = server_step(optimizer, state, params, jnp.array(mean))
    return np.asarray(params)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_server_is_used(name: Any) -> None:
    plain = two_rounds(ServerConfig(name=name))
    for field, value in FIELDS[name].items():
        assert (two_rounds(ServerConfig(name=name, **{field: value})) != plain).any(), field  # type: ignore[arg-type]


def test_servers_differ() -> None:
    found = [tuple(two_rounds(ServerConfig(name=name)).tolist()) for name in FIELDS]  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
    assert found[0] == (0.5, 0.5)  # the mean of the last round
    momentum = jnp.array([1.5, -1.0]) - (0.9 * jnp.array([-0.5, -1.0]) + jnp.array([1.0, -1.5]))
    np.testing.assert_allclose(found[1], jax.device_get(momentum), rtol=1e-6)


def test_clients_of_a_round_are_drawn_anew_for_each() -> None:
    config = FederatedConfig(clients=10, rounds=1, steps=1, participation=0.3)
    drawn = [config.chosen(0, task, number) for task in range(2) for number in range(50)]
    assert all(len(one) == len(set(one.tolist())) == 3 for one in drawn)
    assert all((np.diff(one) > 0).all() for one in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert counts.min() > 15  # 30 expected; a deviation is 4.6
    assert (config.chosen(0, 1, 7) == config.chosen(0, 1, 7)).all()
    assert len({tuple(one.tolist()) for one in drawn}) > 30
    assert len(FederatedConfig(clients=3, rounds=1, steps=1, participation=0.34).chosen(0, 0, 0)) == 2  # rounded up
