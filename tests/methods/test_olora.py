import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.methods.olora import Olora, OloraOptions, overlap
from jaxcl.models.lora import adapted
from jaxcl.models.network import Network
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, perturbed, tiny_llama

NETWORK = tiny_llama(lora={"rank": 2, "alpha": 3.0, "targets": ["query", "out"]})


def method(weight: float = 0.5) -> Olora:
    return Olora(OloraOptions(orthogonality=weight), NETWORK, 3)


def test_overlap_by_hand() -> None:
    # One layer, three inputs, rank 2. The columns of A_1 and A_2 are the earlier directions, those of A_t the new ones.
    past = jnp.array([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]]])
    new = jnp.array([[[1.0, 0.0], [3.0, 0.0], [0.5, -1.0]]])
    # A_1^T A_t = [[1, 0], [3, 0]], A_2^T A_t = [[1, -2], [0, 0]]
    assert float(overlap(new, past)) == 1 + 9 + 1 + 4


def test_penalty_is_the_sum_over_tasks_layers_and_projections() -> None:
    params, olora = perturbed(init(NETWORK), 0.3), method(weight=0.25)
    state = olora.init(params)
    rng = np.random.default_rng(0)
    past = {path: rng.normal(size=leaf.shape) for path, leaf in state["past"].items()}
    for path in past:
        past[path][2] = 0.0  # a task to come
    term = olora.loss(params, {"past": jax.tree.map(jnp.asarray, past)}, make_batch(), jax.random.key(0))[
        "orthogonality"
    ]
    expected = 0.0
    for path, leaves in adapted(params):
        new = np.asarray(leaves["lora_a"], np.float64).reshape(2, -1, 2)
        for task in range(2):
            for layer in range(2):
                old = past[path][task, layer].reshape(-1, 2)
                expected += sum((old[:, j] @ new[layer][:, k]) ** 2 for j in range(2) for k in range(2))
    assert sorted(past) == ["blocks/attention/out", "blocks/attention/query"]
    assert float(term.sum) == pytest.approx(expected, rel=1e-4)
    assert (float(term.count), term.weight) == (1.0, 0.25)


def test_the_first_task_is_plain() -> None:
    olora, params, batch = method(), init(NETWORK), make_batch()
    terms = olora.loss(params, olora.init(params), batch, jax.random.key(0))
    assert float(terms["orthogonality"].sum) == 0.0


def test_after_a_task_its_directions_are_kept_and_its_adapter_stays_in_effect() -> None:
    olora, params, batch = method(), perturbed(init(NETWORK), 0.3), make_batch()
    state = olora.init(params)
    task: object = StandInTask([batch], index=1)
    state = olora.consolidate(params, state, task)  # type: ignore[arg-type]
    after = olora.final_params(params, state, task)  # type: ignore[arg-type]
    for path, leaves in adapted(params):
        np.testing.assert_array_equal(state["past"][path][1], leaves["lora_a"])
        assert not np.any(state["past"][path][jnp.array([0, 2])])
        new = dict(adapted(after))[path]
        assert not np.any(new["lora_b"])
        assert not np.array_equal(new["lora_a"], leaves["lora_a"])
    np.testing.assert_array_equal(after["embed"]["embedding"], params["embed"]["embedding"])
    states = jax.jit(lambda params: NETWORK.hidden(params, batch).states)
    np.testing.assert_allclose(states(after), states(params), rtol=1e-4, atol=1e-5)


def test_a_model_without_adapters_is_refused() -> None:
    plain: Network = tiny_llama()
    with pytest.raises(ValueError, match=r"^name: olora trains adapters and the model has none; set model\.lora"):
        Olora.check(OloraOptions(), plain.config)
