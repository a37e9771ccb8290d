import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional.soft_masks import clip_by_what_moves, masked_decay, masked_optimizer, soft_mask
from jaxcl.methods.base import OptimizerParts
from jaxcl.methods.passes.losses import language_model_terms
from tests.tiny.batches import make_batch
from tests.tiny.networks import filled, in_unit, init, named, tiny_llama
from tests.tiny.stored import masks_of

pytestmark = pytest.mark.optimised  # bits are compared


def make_parts(weight_decay: float = 0.1, clip: float = 1.0) -> OptimizerParts:
    return OptimizerParts(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(0.01),
    )


def masked(parts: OptimizerParts, mask_on: Any) -> optax.GradientTransformationExtraArgs:
    return masked_optimizer(**parts._asdict(), mask_on=mask_on)


@pytest.fixture(scope="module")
def trained() -> dict[Any, Any]:
    """Params after five steps along real gradients, by several optimizers, each compiled as one program."""
    network = tiny_llama(num_layers=1, attention_bias=True)
    params = init(network)

    def loss(params: Any, batch: Any) -> jax.Array:
        return language_model_terms(network, params, batch, jax.random.key(0), 0)["loss"].sum

    gradient = jax.jit(jax.grad(loss))
    gradients = [gradient(params, make_batch(seed=seed)) for seed in range(5)]

    def train(transform: Any, masks: Any, options: dict[str, Any] | None = None) -> Any:
        extra = {} if masks is None else {"masks": masks}

        @functools.partial(jax.jit, compiler_options=options)
        def step(params: Any, state: Any, gradient: Any, extra: Any) -> Any:
            updates, state = transform.update(gradient, state, params, **extra)
            return optax.apply_updates(params, updates), state

        current, state = params, transform.init(params)
        for gradient in gradients:
            current, state = step(current, state, gradient, extra)
        return named(current)

    parts = make_parts()
    masks = {value: masks_of(network, filled(network, value)) for value in (0.0, 1.0)}
    everything = masks_of(network, filled(network, 1.0), "mean")
    # Fused with a mask, Adam's own sums are contracted into other multiply-adds than without.
    apart = {"xla_disable_hlo_passes": "fusion"}
    return {
        "start": named(params),
        ("update", "plain"): train(parts.chain(), None),
        ("update", 0): train(masked(parts, "update"), masks[0.0]),
        ("gradient", "plain"): train(parts.chain(), None, apart),
        ("gradient", 0): train(masked(parts, "gradient"), masks[0.0], apart),
        ("update", 1): train(masked(parts, "update"), masks[1.0]),
        ("gradient", 1): train(masked(parts, "gradient"), masks[1.0]),
        "frozen": train(masked(parts, "update"), everything),
    }


@pytest.mark.parametrize("mask_on", ["update", "gradient"])
def test_importance_0_is_the_plain_optimizer_to_the_bit(trained: dict[Any, Any], mask_on: str) -> None:
    for path, leaf in trained[mask_on, "plain"].items():
        np.testing.assert_array_equal(trained[mask_on, 0][path], leaf, err_msg=path)
        assert not np.array_equal(leaf, trained["start"][path])


@pytest.mark.parametrize("mask_on", ["update", "gradient"])
def test_importance_1_freezes_to_the_bit(trained: dict[Any, Any], mask_on: str) -> None:
    # Weight decay is on: it must not move what is masked either.
    for path, leaf in trained["start"].items():
        assert np.array_equal(trained[mask_on, 1][path], leaf) == in_unit(path), path
        np.testing.assert_array_equal(trained["frozen"][path], leaf, err_msg=path)


def single_update(transform: Any, gradients: Any, params: Any, **extra: Any) -> Any:
    return transform.update(gradients, transform.init(params), params, **extra)[0]


PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
GRADIENTS = {"a": jnp.array([0.3, 0.1]), "b": jnp.array([[-0.2]])}
MASKS = {"a": jnp.array([0.25]), "b": jnp.array(1.0)}


def test_mask_on_update_scales_the_whole_update() -> None:
    plain = single_update(make_parts().chain(), GRADIENTS, PARAMS)
    found = single_update(masked(make_parts(), "update"), GRADIENTS, PARAMS, masks=MASKS)
    np.testing.assert_allclose(found["a"], 0.25 * plain["a"], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], plain["b"])


def test_mask_on_gradient_is_undone_by_adam_but_for_the_decay() -> None:
    found = single_update(masked(make_parts(), "gradient"), GRADIENTS, PARAMS, masks=MASKS)
    # Adam's first step is the gradient's sign, whatever its size; the decay is masked: -0.01 (sign + 0.1 * 0.25 p).
    np.testing.assert_allclose(found["a"], [-0.01 * (1 + 0.025), -0.01 * (1 - 0.05)], rtol=1e-5)
    sgd = make_parts(weight_decay=0.0)._replace(precondition=optax.identity())
    found = single_update(masked(sgd, "gradient"), GRADIENTS, PARAMS, masks=MASKS)
    np.testing.assert_allclose(found["a"], [-0.01 * 0.25 * 0.3, -0.01 * 0.25 * 0.1], rtol=1e-6)


def test_clipping_sees_the_unmasked_gradient() -> None:
    parts = make_parts(weight_decay=0.0, clip=0.1)._replace(precondition=optax.identity())
    found = single_update(masked(parts, "gradient"), GRADIENTS, PARAMS, masks=MASKS)
    norm = np.sqrt(0.3**2 + 0.1**2 + 0.2**2)
    np.testing.assert_allclose(found["a"], -0.01 * 0.25 * np.array([0.3, 0.1]) * 0.1 / norm, rtol=1e-5)


def test_masked_decay_passes_structure_masks_on() -> None:
    decay = masked_decay(optax.add_decayed_weights(0.5, mask={"a": True, "b": False}))
    found = single_update(decay, jax.tree.map(jnp.zeros_like, PARAMS), PARAMS, masks=MASKS)
    np.testing.assert_allclose(found["a"], 0.5 * 0.25 * PARAMS["a"])
    np.testing.assert_array_equal(found["b"], 0.0)


def test_masks_cannot_be_forgotten() -> None:
    transform = masked(make_parts(), "update")
    with pytest.raises(TypeError, match="masks"):
        single_update(transform, GRADIENTS, PARAMS)


def test_masks_keep_low_precision() -> None:
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), GRADIENTS)
    found = single_update(soft_mask(), low, PARAMS, masks=jax.tree.map(jnp.ones_like, MASKS))
    jax.tree.map(np.testing.assert_array_equal, found, low)
    assert found["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize("mask_on", ["update", "gradient"])
def test_clipping_may_see_what_moves_alone(mask_on: str) -> None:
    """Gradient norms of 10 where the mask is 0 and of 0.1 elsewhere: a clip to 1 does not concern the latter."""
    gradients = {"held": jnp.array([6.0, 8.0]), "free": jnp.array([0.1])}
    params, masks = jax.tree.map(jnp.zeros_like, gradients), {"held": jnp.zeros(2), "free": jnp.ones(1)}
    parts = make_parts(weight_decay=0.0, clip=1.0)._replace(precondition=optax.identity())
    plain = single_update(masked(parts, mask_on), gradients, params, masks=masks)
    np.testing.assert_allclose(plain["free"], -0.01 * 0.1 / np.sqrt(100.01), rtol=1e-5)
    parts = parts._replace(clip=clip_by_what_moves(parts.clip))
    found = single_update(masked(parts, mask_on), gradients, params, masks=masks)
    np.testing.assert_allclose(found["free"], -0.01 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(found["held"], [0.0, 0.0])
    half = {"held": jnp.full(2, 0.5), "free": jnp.ones(1)}
    found = single_update(masked(parts, mask_on), gradients, params, masks=half)
    norm = np.sqrt(3**2 + 4**2 + 0.1**2)
    np.testing.assert_allclose(found["held"], -0.01 * np.array([3.0, 4.0]) / norm, rtol=1e-5)
    nothing = jax.tree.map(jnp.zeros_like, masks)
    np.testing.assert_array_equal(
        single_update(masked(parts, mask_on), gradients, params, masks=nothing)["free"], [0.0]
    )
