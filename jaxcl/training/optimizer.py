"""The parts of the optimizer, and its configuration."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from pydantic import Field, model_validator

from jaxcl.functional.averaging import Average
from jaxcl.methods.base import OptimizerParts
from jaxcl.schema import Schema

_RATES: dict[Average, float] = {"ema": 0.02, "wise": 0.5, "sfa": 0.25}
_UNDECAYED = frozenset({"bias", "scale"})


# Fields that only some schedules have.
_ONLY_WITH: dict[str, tuple[str, ...]] = {
    "decay": ("wsd", "infinite"),
    "decay_shape": ("wsd", "infinite"),
    "cooldown": ("infinite",),
    "cooldown_shape": ("infinite",),
    "cooldown_steepness": ("infinite",),
    "constant": ("infinite",),
    "final": ("linear", "cosine", "wsd", "infinite"),
}


class OptimizerConfig(Schema):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adafactor", "lion", "rmsprop", "sgd"] = Field("adamw", description="the update rule")
    learning_rate: float = Field(1e-4, ge=0, description="highest learning rate")
    schedule: Literal["constant", "linear", "cosine", "wsd", "infinite"] = Field(
        "linear",
        description="shape of the schedule after the warm-up; constant, linear, cosine: over the steps of each task; "
        "wsd: constant, with a decay at the end of each task, and the next task goes on from before the decay; "
        "infinite: the same, but warm-up and a cooldown to the constant rate are in the first task only",
    )
    warmup: float = Field(
        0.0, ge=0, description="linear rise from 0: below 1 a share of the task's steps, otherwise a number of steps"
    )
    final: float = Field(0.0, ge=0, le=1, description="learning rate at the end of the task, as a share of the highest")
    decay: float = Field(
        0.1,
        gt=0,
        description="wsd, infinite: decay at the end of a task: below 1 a share of its steps, otherwise a number of "
        "steps",
    )
    decay_shape: Literal["linear", "sqrt", "exponential"] | None = Field(
        None,
        description="wsd, infinite: shape of the decay; sqrt: 1 minus a root; none: linear for wsd, exponential for "
        "infinite",
    )
    constant: float = Field(
        0.5, gt=0, le=1, description="infinite: learning rate of the constant phase, as a share of the highest"
    )
    cooldown: float = Field(
        0.1,
        ge=0,
        description="infinite: fall from the highest to the constant rate, after the warm-up of the first task: below "
        "1 a share of its steps, otherwise a number of steps",
    )
    cooldown_shape: Literal["cosine", "inverse_sqrt"] = Field("cosine", description="infinite: shape of the cooldown")
    cooldown_steepness: float = Field(
        10.0, gt=0, description="infinite: alpha of cooldown_shape inverse_sqrt; the larger, the faster at first"
    )
    warm_moments: int = Field(
        0,
        ge=0,
        description="first steps of each task, of those that the task has, in which moments are estimated and params "
        "stay as they are; the schedule has the remaining steps",
    )
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment (adamw, lion), momentum (sgd, adafactor)")
    b2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment (adamw, rmsprop, lion)")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment (adamw, rmsprop)")
    weight_decay: float = Field(0.0, ge=0, description="decay of all params but norms and biases")
    clip_norm: float | None = Field(1.0, gt=0, description="largest global norm of a gradient; null: no clipping")
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the first moment (adamw, lion, sgd)"
    )
    offload: bool = Field(
        False,
        description="keep the moments, and the anchor of das, in host memory and copy them to the devices for each "
        "update",
    )
    freeze_layers: int = Field(0, ge=0, description="lowest layers that stay as they are")
    freeze_embeddings: bool = Field(False, description="embeddings and output heads stay as they are")
    average: Literal["none", "ema", "wise", "sfa"] = Field(
        "none",
        description="params that a task ends with, for any method; ema: their running mean; wise: between those before "
        "the task and after it; sfa: pulled towards those before the task every average_every steps. Keeps a copy of "
        "the trained params",
    )
    average_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="ema: weight of a step's params in the mean, default 0.02; wise: share of the task's way that is "
        "kept, default 0.5; sfa: weight of the params before the task, default 0.25",
    )
    average_every: int = Field(25, ge=1, description="sfa: steps from one average to the next")
    reset_optimizer: bool = Field(
        True,
        description="reset the moments at the start of each task; where it is not given, false for wsd and infinite, "
        "whose tasks go on with the moments from before the decay",
    )

    @property
    def averaging(self) -> tuple[Average, float] | None:
        """How params are averaged, and the rate; see `jaxcl.functional.averaging`."""
        if self.average == "none":
            return None
        return self.average, _RATES[self.average] if self.average_rate is None else self.average_rate

    @property
    def goes_on_before_decay(self) -> bool:
        """Whether a task starts from the params and moments that the task before had before its decay."""
        return self.schedule in _ONLY_WITH["decay"]

    @model_validator(mode="before")
    @classmethod
    def _keep_moments(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("schedule") in _ONLY_WITH["decay"]:
            return {"reset_optimizer": False, **values}
        return values

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimizerConfig:
        for name, schedules in _ONLY_WITH.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and self.schedule not in schedules:
                raise ValueError(
                    f"{name} is only for schedule {' or '.join(schedules)}; the schedule is {self.schedule}"
                )
        if self.average == "none" and self.average_rate is not None:
            raise ValueError("average_rate is only for average ema, wise or sfa; average is none")
        if self.average != "sfa" and self.average_every != type(self).model_fields["average_every"].default:
            raise ValueError(f"average_every is only for average sfa; average is {self.average}")
        if self.average != "none" and self.warm_moments:
            raise ValueError(f"average {self.average} and warm_moments exclude each other")
        if not self.goes_on_before_decay:
            return self
        if self.average != "none":
            raise ValueError(
                f"average {self.average} needs a schedule whose tasks go on from the end of the last one: constant, "
                f"linear or cosine, not {self.schedule}"
            )
        if self.schedule == "infinite" and self.final > self.constant:
            raise ValueError(f"final must be at most constant ({self.constant}), got {self.final}")
        exponential = self.decay_shape == "exponential" or (self.decay_shape is None and self.schedule == "infinite")
        if exponential and self.final == 0:
            raise ValueError("final must be above 0, such as 0.1, for an exponential decay, or decay_shape another")
        sizes = ["warmup", "cooldown", "decay"] if self.schedule == "infinite" else ["warmup", "decay"]
        shares = {name: getattr(self, name) for name in sizes if getattr(self, name) < 1}
        if sum(shares.values()) > 1 + 1e-9:
            listed = ", ".join(f"{name} {value}" for name, value in shares.items())
            raise ValueError(f"shares of a task's steps must add up to at most 1, got {listed}")
        return self


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
