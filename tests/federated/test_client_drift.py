"""FedProx and SCAFFOLD, against the papers' formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional import common_variate, finish_scaffold, proximal, scaffold, start_proximal, start_scaffold

# Two clients whose least squares differ.
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 3))
Y = RNG.normal(size=(2, 6))


def loss(client: int, w: Any) -> Any:
    return jnp.mean((X[client] @ w - Y[client]) ** 2)


def slope(client: int, w: np.ndarray) -> np.ndarray:
    return 2 / 6 * X[client].T @ (X[client] @ w - Y[client])


def test_the_proximal_gradient_is_that_of_the_papers_penalty() -> None:
    """Li et al., 2020, equation 2."""
    w, centre, mu = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.1, -1.0]), 0.7
    whole = jax.grad(lambda w: loss(0, w) + mu / 2 * jnp.sum((w - centre) ** 2))(w)
    near = proximal(mu)
    found, state = near.update(jax.grad(lambda w: loss(0, w))(w), near.init(centre), w)
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    again, _ = near.update(jnp.zeros(3), start_proximal(w), w)
    assert not again.any()
    assert near.update(w, state, w)[0].tolist() != w.tolist()
    assert proximal(0.0).update(jnp.array([-0.0]), near.init(centre[:1]), w[:1])[0].tolist() == [-0.0]


def test_the_proximal_term_holds_a_client_at_the_minimum_of_the_whole() -> None:
    near = optax.chain(proximal(2.0), optax.sgd(0.1))
    centre = jnp.array([1.0, 1.0, 1.0])
    w, state = centre, near.init(centre)
    for _ in range(300):
        updates, state = near.update(jax.grad(lambda w: loss(1, w))(w), state, w)
        w = w + updates
    best = np.linalg.solve(2 / 6 * X[1].T @ X[1] + 2 * np.eye(3), 2 / 6 * X[1].T @ Y[1] + 2 * np.asarray(centre))
    np.testing.assert_allclose(w, best, rtol=1e-4)


@pytest.mark.parametrize("sampled", [(0, 1), (1,)])
def test_scaffold_is_the_papers_algorithm(sampled: tuple[int, ...]) -> None:
    """Karimireddy et al., 2020, algorithm 1 with option II, in float64; with one client of two in a round as well."""
    eta, steps, clients = 0.05, 3, 2
    x, c, own = np.array([1.0, -1.0, 0.5]), np.zeros(3), np.zeros((clients, 3))
    variates = optax.chain(scaffold(), optax.sgd(eta))
    params, common = jnp.asarray(x, jnp.float32), jnp.zeros(3)
    kept = [scaffold().init(params) for _ in range(clients)]
    for _ in range(4):
        moves, changes = [], []
        sums, deltas = [], []
        for client in sampled:
            y = x.copy()
            for _ in range(steps):
                y = y - eta * (slope(client, y) - own[client] + c)
            new = own[client] - c + (x - y) / (steps * eta)
            moves.append(y - x)
            changes.append(new - own[client])
            own[client] = new

            w, state = params, variates.init(params)
            state = (start_scaffold(kept[client], common), *state[1:])
            for _ in range(steps):
                updates, state = variates.update(jax.grad(lambda w, k=client: loss(k, w))(w), state, w)
                w = w + updates
            kept[client], delta = finish_scaffold(state[0])
            sums.append(w - params)
            deltas.append(delta)
        x, c = x + np.mean(moves, axis=0), c + len(sampled) / clients * np.mean(changes, axis=0)
        params = params + sum(sums) / len(sums)
        common = common_variate(common, sum(deltas) / len(deltas), len(sampled) / clients)
        np.testing.assert_allclose(params, x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(common, c, rtol=1e-4, atol=1e-6)
        for client in sampled:
            np.testing.assert_allclose(kept[client].own, own[client], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(common, np.mean([one.own for one in kept], axis=0), rtol=1e-4, atol=1e-6)


def test_scaffold_leads_where_averaging_does_not() -> None:
    """Many local steps: averaging ends away from the minimum of the mean loss, SCAFFOLD at it."""
    best = np.linalg.solve(np.einsum("kni,knj->ij", X, X), np.einsum("kni,kn->i", X, Y))

    def rest(corrected: bool) -> Any:
        first = scaffold() if corrected else optax.identity()
        step = optax.chain(first, optax.sgd(0.05))

        def one(params: Any, states: Any, common: Any) -> Any:
            ends, changes, news = [], [], []
            for client in range(2):
                w, state = params, step.init(params)
                if corrected:
                    state = (start_scaffold(states[client], common), *state[1:])
                for _ in range(10):
                    updates, state = step.update(jax.grad(lambda w, k=client: loss(k, w))(w), state, w)
                    w = w + updates
                if corrected:
                    new, change = finish_scaffold(state[0])
                    news.append(new)
                    changes.append(change)
                ends.append(w)
            if corrected:
                common = common_variate(common, sum(changes) / 2, 1.0)
            return sum(ends) / 2, news, common

        params = jnp.zeros(3)
        states, common, compiled = [scaffold().init(params)] * 2, jnp.zeros(3), jax.jit(one)
        for _ in range(150):
            params, states, common = compiled(params, states if corrected else [], common)
        return params

    np.testing.assert_allclose(rest(corrected=True), best, rtol=1e-3)
    assert np.abs(rest(corrected=False) - best).max() > 0.01


def test_a_round_without_a_step_changes_no_variate() -> None:
    state = scaffold().init(jnp.zeros(2))._replace(own=jnp.array([1.0, 2.0]))
    after, change = finish_scaffold(start_scaffold(state, jnp.array([5.0, 5.0])))
    assert after.own.tolist() == [1.0, 2.0]
    assert change.tolist() == [0.0, 0.0]
    assert after.common.tolist() == [5.0, 5.0]
