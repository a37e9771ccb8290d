from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError

from jaxcl.training.optimizer import OptimizerConfig, decayed, make_parts
from jaxcl.training.schedule import Clock, learning_rate


def tree(seed: int, scale: float = 1.0) -> Any:
    random = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (4, 3), "bias": (3,)}, "norm": {"scale": (4,)}, "embedding": (5, 4)}
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def run_parts(config: OptimizerConfig, total: int, steps: int) -> Any:
    transform = make_parts(config).chain()
    params, state, clock = tree(0), transform.init(tree(0)), Clock.start(config, total)
    for step in range(steps):
        rate = learning_rate(config, clock._replace(step=jnp.int32(step)))
        updates, state = transform.update(tree(step + 1, 3.0), state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
    return params


def run_optax(transform: optax.GradientTransformation, steps: int) -> Any:
    params, state = tree(0), transform.init(tree(0))
    for step in range(steps):
        updates, state = transform.update(tree(step + 1, 3.0), state, params)
        params = optax.apply_updates(params, updates)
    return params


def mask(params: Any) -> Any:
    return {"a": {"kernel": True, "bias": False}, "norm": {"scale": False}, "embedding": True}


REFERENCES = {
    "adamw": lambda rate: optax.adamw(rate, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, mask=mask),
    "lion": lambda rate: optax.lion(rate, b1=0.8, b2=0.95, weight_decay=0.1, mask=mask),
    "rmsprop": lambda rate: optax.chain(
        optax.scale_by_rms(decay=0.95, eps=1e-6),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(rate),
    ),
    "sgd": lambda rate: optax.chain(
        optax.trace(0.8), optax.add_decayed_weights(0.1, mask), optax.scale_by_learning_rate(rate)
    ),
}


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_equals_plain_optax(name: str) -> None:
    options = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
    config = OptimizerConfig(name=name, schedule="constant", clip_norm=1.5, **options)
    expected = run_optax(optax.chain(optax.clip_by_global_norm(1.5), REFERENCES[name](0.02)), 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), run_parts(config, 6, 6), expected)


def test_adafactor_equals_plain_optax_without_its_parameter_scale() -> None:
    config = OptimizerConfig(name="adafactor", learning_rate=0.02, schedule="constant", b1=0.8, clip_norm=None)
    reference = optax.adafactor(0.02, multiply_by_parameter_scale=False, momentum=0.8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
        run_parts(config, 6, 6),
        run_optax(reference, 6),
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 0.1])
def test_schedule_equals_optax(schedule: str, warmup: float) -> None:
    total, peak, final = 30, 0.5, 0.0 if schedule == "constant" else 0.2
    config = OptimizerConfig(learning_rate=peak, schedule=schedule, warmup=warmup, final=final)
    rise = 3 if warmup else 0
    rest = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * final, total - rise),
        "cosine": optax.cosine_decay_schedule(peak, total - rise, alpha=final),
    }[schedule]
    reference = optax.join_schedules([optax.linear_schedule(0.0, peak, rise), rest], [rise]) if rise else rest
    clock = Clock.start(config, total)
    for step in range(total + 3):
        got = float(learning_rate(config, clock._replace(step=jnp.int32(step))))
        assert got == pytest.approx(float(reference(step)), rel=1e-6, abs=1e-9), step


def test_clipping_limits_the_global_norm_only_when_it_is_exceeded() -> None:
    clip = make_parts(OptimizerConfig(clip_norm=2.0)).clip
    for scale, expected in ((10.0, 2.0), (0.01, None)):
        grads = tree(1, scale)
        norm = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(grads)))
        clipped = clip.update(grads, clip.init(grads))[0]
        after = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(clipped)))
        assert after == pytest.approx(norm if expected is None else expected, rel=1e-5)


def test_weight_decay_leaves_norms_and_biases() -> None:
    assert decayed(tree(0)) == mask(None)


def test_every_field_changes_the_result() -> None:
    base = {"learning_rate": 0.02, "warmup": 2, "weight_decay": 0.1, "final": 0.1, "clip_norm": 1.0}
    changes = {
        "name": "sgd",
        "learning_rate": 0.03,
        "schedule": "cosine",
        "warmup": 3,
        "final": 0.3,
        "b1": 0.5,
        "b2": 0.5,
        "eps": 0.1,
        "weight_decay": 0.2,
        "clip_norm": 0.5,
        "moment_dtype": "bfloat16",
        "warm_moments": 1,
        "decay": 4,
        "decay_shape": "linear",
        "constant": 0.3,
        "cooldown": 2,
        "cooldown_shape": "inverse_sqrt",
        "cooldown_steepness": 2.0,
    }
    infinite = {**base, "schedule": "infinite", "warmup": 1, "cooldown": 3, "decay": 2}
    bases = dict.fromkeys(("decay", "decay_shape", "constant", "cooldown", "cooldown_shape"), infinite)
    bases["cooldown_steepness"] = {**infinite, "cooldown_shape": "inverse_sqrt"}
    # What is left acts outside of the update: test_averaging.py, test_freeze.py; where moments wait changes no bit
    # (test_step.py).
    outside = {"reset_optimizer", "offload", "average", "average_rate", "average_every"}
    outside |= {"freeze_layers", "freeze_embeddings"}
    assert set(changes) == set(OptimizerConfig.model_fields) - outside
    for name, value in changes.items():
        # Adam is blind to the scale of gradients unless epsilon is large.
        common = {**base, "eps": 1.0} if name == "clip_norm" else bases.get(name, base)
        reference = run_parts(OptimizerConfig(**common), 8, 8)
        changed = run_parts(OptimizerConfig(**{**common, name: value}), 8, 8)
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), reference, changed)
        assert max(jax.tree.leaves(apart)) > 1e-6, name


def test_the_learning_rate_must_be_given() -> None:
    transform = make_parts(OptimizerConfig()).chain()
    with pytest.raises(TypeError, match="learning_rate"):
        transform.update(tree(1), transform.init(tree(0)), tree(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "constant", "final": 0.1}, "final is only for schedule linear or cosine or wsd or infinite"),
        ({"average": "ema", "average_every": 5}, "average_every is only for average sfa; average is ema"),
        ({"average_every": 5}, "average_every is only for average sfa; average is none"),
    ],
)
def test_what_would_have_no_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "adamm"), ("b1", 1.0), ("eps", 0), ("clip_norm", 0), ("learning_rate", -1), ("schedule", "step")],
)
def test_impossible_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        OptimizerConfig(**{field: value})


def test_warmup_never_exceeds_the_task() -> None:
    for warmup, total in itertools.product((0.5, 0.99), (1, 7)):
        assert int(Clock.start(OptimizerConfig(warmup=warmup), total).warmup) <= total


def test_a_warmup_of_one_is_one_step_and_below_one_a_share() -> None:
    for warmup, steps in ((1, 1), (1.0, 1), (2, 2), (0.5, 5), (0.01, 1)):
        assert Clock.start(OptimizerConfig(warmup=warmup), 10).warmup == steps
