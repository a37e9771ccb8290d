"""The parts of the optimizer, and its schedule as a function of traced values."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from pydantic import Field

from jaxcl.methods.base import OptimizerParts
from jaxcl.schema import Schema

_UNDECAYED = frozenset({"bias", "scale"})


class OptimizerConfig(Schema):
    """The optimizer and its schedule, which restarts with every task."""

    name: Literal["adamw", "adafactor", "lion", "rmsprop", "sgd"] = Field("adamw", description="the update rule")
    learning_rate: float = Field(1e-4, ge=0, description="highest learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="shape of the schedule after the warm-up"
    )
    warmup: float = Field(
        0.0, ge=0, description="linear rise from 0: below 1 a share of the task's steps, otherwise a number of steps"
    )
    final: float = Field(0.0, ge=0, le=1, description="learning rate at the end of the task, as a share of the highest")
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment (adamw, lion), momentum (sgd, adafactor)")
    b2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment (adamw, rmsprop, lion)")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment (adamw, rmsprop)")
    weight_decay: float = Field(0.0, ge=0, description="decay of all params but norms and biases")
    clip_norm: float | None = Field(1.0, gt=0, description="largest global norm of a gradient; null: no clipping")
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the first moment (adamw, lion, sgd)"
    )
    offload: bool = Field(
        False, description="keep the moments in host memory and copy them to the devices for each update"
    )
    reset_optimizer: bool = Field(True, description="reset the moments at the start of each task")


class Clock(NamedTuple):
    """Position within a task. Traced, so that all tasks share one compiled step.

    Attributes:
      step: optimizer steps done in this task, int32.
      warmup: warm-up steps, int32.
      total: steps of the task, int32.
    """

    step: Int[Array, ""]
    warmup: Int[Array, ""]
    total: Int[Array, ""]

    @classmethod
    def start(cls, config: OptimizerConfig, total: int) -> Clock:
        """The clock at the start of a task of `total` steps."""
        warmup = math.ceil(config.warmup * total) if config.warmup < 1 else round(config.warmup)
        return cls(jnp.int32(0), jnp.int32(min(warmup, total)), jnp.int32(total))


def learning_rate(config: OptimizerConfig, clock: Clock) -> Float[Array, ""]:
    r"""The learning rate of the current step.

    With step $s$, warm-up $w$, total $T$, peak $\eta$ and final share $f$: $\eta s / w$ for $s < w$; after that, with
    $p = (s - w) / (T - w)$ limited to $[0, 1]$, $\eta$ (constant), $\eta (1 - (1 - f) p)$ (linear) or
    $\eta (f + (1 - f) (1 + \cos \pi p) / 2)$ (cosine).

    Args:
      config: the optimizer section.
      clock: position in the task.

    Returns:
      A float32 scalar.

    Examples:
      >>> config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup=2)
      >>> [float(learning_rate(config, Clock.start(config, 6)._replace(step=step))) for step in (0, 1, 2, 4, 6)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    step, warmup, total = (value.astype(jnp.float32) for value in map(jnp.asarray, clock))
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    if config.schedule == "constant":
        share = jnp.ones_like(progress)
    elif config.schedule == "linear":
        share = 1.0 - (1.0 - config.final) * progress
    else:
        share = config.final + (1.0 - config.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    rise = step / jnp.maximum(warmup, 1.0)
    return config.learning_rate * jnp.where(step < warmup, rise, share)


def make_parts(config: OptimizerConfig) -> OptimizerParts:
    """The optimizer's parts, which `Method.transform` combines.

    The learning rate is not a constant of the last part: `update` takes it as the keyword argument `learning_rate`, so
    that tasks of different lengths share one compiled step.

    Args:
      config: the optimizer section.

    Returns:
      The parts in order of application; a disabled part is the identity.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = optax.identity()
    if config.weight_decay:
        decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    return OptimizerParts(clip, _precondition(config), decay, scale_by_given_learning_rate())


def decayed(params: PyTree) -> PyTree:
    """Which params weight decay applies to: all but norms and biases, identified by name.

    Examples:
      >>> decayed({"kernel": 0, "norm": {"scale": 0, "bias": 0}})
      {'kernel': True, 'norm': {'bias': False, 'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in _UNDECAYED, params
    )


def scale_by_given_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies by the negative of the keyword argument `learning_rate` of `update`."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, *, learning_rate: Array, **_: Any) -> Any:
        return jax.tree.map(lambda leaf: (-learning_rate * leaf).astype(leaf.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _precondition(config: OptimizerConfig) -> optax.GradientTransformation:
    moment = jnp.dtype(config.moment_dtype)
    if config.name == "adamw":
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=moment)
    if config.name == "lion":
        return optax.scale_by_lion(b1=config.b1, b2=config.b2, mu_dtype=moment)
    if config.name == "rmsprop":
        return optax.scale_by_rms(decay=config.b2, eps=config.eps)
    if config.name == "adafactor":
        # Factored second moments, updates of at most unit root mean square: Shazeer & Stern 2018, algorithm 4,
        # with optax's decay; b1 = 0 keeps no first moment, which saves its memory.
        momentum = optax.ema(config.b1, debias=False) if config.b1 else optax.identity()
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), momentum)
    return optax.trace(decay=config.b1, accumulator_dtype=moment) if config.b1 else optax.identity()
