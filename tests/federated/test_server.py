"""What a server makes of its clients' params, against the papers' formulas written in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional import (
    ClientMean,
    adaptive_server,
    clip_update,
    combine_shared,
    noised_mean,
    pseudo_gradient,
    server_step,
    why_refused,
)


def tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(scale * rng.normal(size=(3, 2)), jnp.float32), "b": jnp.asarray(rng.normal(), jnp.float32)}


def mean_of(clients: list[Any], weights: list[float]) -> Any:
    found = ClientMean.zero(clients[0])
    for client, weight in zip(clients, weights, strict=True):
        found = found.add(client, weight)
    return found


def assert_close(found: Any, expected: Any, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_the_mean_weighs_clients_by_their_share() -> None:
    clients, weights = [tree(seed) for seed in range(3)], [10.0, 1.0, 5.0]
    found = mean_of(clients, weights)
    assert float(found.weight) == 16
    assert_close(found.mean, jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *clients))


def test_the_pseudo_gradient_is_minus_the_weighted_mean_of_updates() -> None:
    params, clients, weights = tree(9), [tree(seed) for seed in range(3)], np.array([10.0, 1.0, 5.0])
    found = pseudo_gradient(params, mean_of(clients, weights.tolist()).mean)
    updates = [jax.tree.map(jnp.subtract, client, params) for client in clients]
    expected = jax.tree.map(lambda *leaves: -np.tensordot(weights / 16, np.stack(leaves), 1), *updates)
    assert_close(found, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_client_under_federated_averaging_keeps_its_params_to_the_bit(compiled: bool) -> None:
    """Also where `params + (own - params)` is another number, and for zeros of either sign."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=1000) * 10.0 ** rng.integers(-6, 6, 1000), jnp.float32)
    own = jnp.asarray(rng.normal(size=1000) * 10.0 ** rng.integers(-6, 6, 1000), jnp.float32).at[:2].set([0.0, -0.0])
    assert bits(params + (own - params)) != bits(own)
    average = optax.sgd(1.0)

    def round_of_one(params: Any, own: Any) -> Any:
        mean = ClientMean.zero(params).add(own, 7.0).mean
        return server_step(average, average.init(params), params, mean)[0]

    assert bits((jax.jit(round_of_one) if compiled else round_of_one)(params, own)) == bits(own)


def test_params_keep_their_dtype() -> None:
    params, own = jnp.asarray([1.0, 2.0], jnp.bfloat16), jnp.asarray([1.5, -3.0], jnp.bfloat16)
    average = optax.sgd(1.0)
    mean = ClientMean.zero(params).add(own, 3.0).mean
    assert mean.dtype == jnp.float32
    found = server_step(average, average.init(params), params, mean)[0]
    assert found.dtype == jnp.bfloat16
    assert bits(found) == bits(own)


def test_one_step_of_gradient_descent_at_every_client_is_one_on_the_joined_batch() -> None:
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32), jnp.asarray(rng.normal(size=12), jnp.float32)
    params, rate = jnp.asarray(rng.normal(size=4), jnp.float32), 0.1
    slope = jax.grad(lambda w, x, y: jnp.mean((x @ w - y) ** 2))
    clients = [params - rate * slope(params, x[rows], y[rows]) for rows in np.split(np.arange(12), 3)]
    average = optax.sgd(1.0)
    found = server_step(average, average.init(params), params, mean_of(clients, [4, 4, 4]).mean)[0]
    np.testing.assert_allclose(found, params - rate * slope(params, x, y), rtol=1e-6)


def test_the_optimizer_sees_the_pseudo_gradient_round_by_round() -> None:
    """FedAvgM: v <- beta v + g, params <- params - eta v (Reddi et al., 2021, algorithm 1 with SGD and momentum)."""
    optimizer, params = optax.sgd(0.5, momentum=0.9), tree(0)
    state, expected = optimizer.init(params), jax.tree.map(np.asarray, params)
    speed = jax.tree.map(np.zeros_like, expected)
    for seed in range(1, 4):
        params, state = server_step(optimizer, state, params, tree(seed))
        speed = jax.tree.map(lambda v, x, mean: 0.9 * v + (x - mean), speed, expected, tree(seed))
        expected = jax.tree.map(lambda x, v: x - 0.5 * v, expected, speed)
    assert_close(params, expected)


SQUARES = {
    "adagrad": lambda v, delta: v + delta**2,
    "adam": lambda v, delta: 0.95 * v + 0.05 * delta**2,
    "yogi": lambda v, delta: v - 0.05 * delta**2 * np.sign(v - delta**2),
}


@pytest.mark.parametrize("rule", SQUARES)
def test_adaptive_servers_are_the_papers(rule: Any) -> None:
    """Reddi et al., 2021, algorithm 2, in float64."""
    tau, eta = 0.3, 0.1
    optimizer = adaptive_server(rule, eta, b1=0.8, b2=0.95, adaptivity=tau)
    params = tree(0)["a"]
    state, x = optimizer.init(params), np.asarray(params, np.float64)
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for seed in range(1, 5):
        mean = tree(seed, scale=0.5)["a"]
        params, state = server_step(optimizer, state, params, mean)
        delta = np.asarray(mean, np.float64) - x
        m = 0.8 * m + 0.2 * delta
        v = SQUARES[rule](v, delta)
        x = x + eta * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(params, x, rtol=1e-5)


def test_what_is_shared_is_combined_as_said() -> None:
    clients = [{"x": jnp.array([1.0, 5.0]), "n": jnp.int32(1)}, {"x": jnp.array([3.0, 1.0]), "n": jnp.int32(4)}]
    mean, most = combine_shared(clients, [3, 1], "mean"), combine_shared(clients, [3, 1], "maximum")
    assert mean["x"].tolist() == [1.5, 4.0]
    assert most["x"].tolist() == [3.0, 5.0]
    assert most["n"] == 4
    assert mean["n"].dtype == jnp.int32
    assert bits(combine_shared(clients[:1], [3], "mean")) == bits(clients[0])
    with pytest.raises(ValueError, match="shared: expected a tree per client"):
        combine_shared([], [], "mean")


def test_updates_are_clipped_by_the_norm_of_the_whole_tree() -> None:
    update = tree(3)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(update)))
    clipped, found = clip_update(update, 0.5)
    np.testing.assert_allclose(found, norm, rtol=1e-6)
    assert_close(clipped, jax.tree.map(lambda leaf: leaf * min(1, 0.5 / norm), update))
    assert bits(clip_update(update, float(norm) * 1.01)[0]) == bits(update)
    zero = jax.tree.map(jnp.zeros_like, update)
    assert bits(clip_update(zero, 0.5)[0]) == bits(zero)


def test_noise_has_the_stated_deviation() -> None:
    """z C / m for every entry, around the mean over the expected number of clients, independent between leaves."""
    total = {"a": jnp.full((200, 200), 6.0), "b": jnp.zeros((200, 200))}
    found = noised_mean(total, jax.random.key(0), limit=0.5, noise_multiplier=1.2, clients=4)
    noise = np.stack([found["a"] - 1.5, found["b"]])
    # The deviation of 40,000 draws is known to within 1 / sqrt(80,000) = 0.35%.
    np.testing.assert_allclose(noise.std(axis=(1, 2)), 1.2 * 0.5 / 4, rtol=0.02)
    np.testing.assert_allclose(noise.mean(axis=(1, 2)), 0, atol=0.003)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.02
    quiet = noised_mean(total, jax.random.key(0), limit=0.5, noise_multiplier=0, clients=4)
    assert_close(quiet, jax.tree.map(lambda leaf: leaf / 4, total))


REFUSED: dict[str, tuple[Any, str]] = {
    "another model": ({"a": np.ones((3, 2), np.float32)}, "expected the arrays of another model: b differs"),
    "another shape": (
        {"a": np.ones((3, 3), np.float32), "b": np.float32(0)},
        "a: expected shape (3, 2), got (3, 3)",
    ),
    "integers": ({"a": np.ones((3, 2), np.int32), "b": np.float32(0)}, "a: expected floats, got int32"),
    "nan": ({"a": np.ones((3, 2), np.float32), "b": np.float32(np.nan)}, "b: not finite"),
    "infinite": ({"a": np.full((3, 2), np.inf, np.float32), "b": np.float32(0)}, "a: not finite"),
    "too long": ({"a": np.ones((3, 2), np.float32), "b": np.float32(0)}, "norm 2.44949 is over the limit 2.4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_updates_are_refused_with_the_reason(name: str) -> None:
    update, reason = REFUSED[name]
    found = why_refused(update, tree(0), limit=2.4)
    assert found == reason


def test_usable_updates_are_not_refused() -> None:
    update = tree(1)
    clipped, norm = clip_update(update, 0.7)
    assert why_refused(update, tree(0)) is None
    assert why_refused(clipped, tree(0), limit=0.7) is None  # rounding may lift its norm a little
    assert why_refused(update, tree(0), limit=float(norm) * 0.999) is not None
    assert why_refused(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), update), tree(0)) is None
