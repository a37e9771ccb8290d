"""The learning rate as a function of traced values, so that tasks of all lengths share one compiled step.

The schedules that optax builds need their lengths when the step is compiled; those here follow the same formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcl.errors import UserError
from jaxcl.training.optimizer import OptimizerConfig


class Phases(NamedTuple):
    """Numbers of steps of a task's phases; the rest of the task is between cooldown and decay."""

    warmup: int
    cooldown: int
    decay: int


class Clock(NamedTuple):
    """Position within a task. Traced, so that all tasks share one compiled step.

    Attributes:
      step: optimizer steps done in this task, int32.
      warmup: warm-up steps, int32.
      total: steps of the task, int32.
      cooldown: steps from the highest to the constant rate, int32; `None` for schedules without a decay of its own.
      decay: steps of the decay at the end, int32; likewise.
    """

    step: Int[Array, ""]
    warmup: Int[Array, ""]
    total: Int[Array, ""]
    cooldown: Int[Array, ""] | None = None
    decay: Int[Array, ""] | None = None

    @classmethod
    def start(cls, config: OptimizerConfig, total: int, *, first: bool = True) -> Clock:
        """The clock at the start of a task of `total` steps; 0: before the first task.

        Args:
          config: the optimizer section.
          total: optimizer steps of the task.
          first: whether no task was learned before; see `phases`.

        Raises:
          UserError: the phases do not fit into the task.
        """
        sizes = phases(config, total, first=first) if total else Phases(0, 0, 0)
        clock = cls(jnp.int32(0), jnp.int32(sizes.warmup), jnp.int32(total))
        if not config.goes_on_before_decay:
            return clock  # without further fields, as in checkpoints from before there were any
        return clock._replace(cooldown=jnp.int32(sizes.cooldown), decay=jnp.int32(sizes.decay))

    @property
    def decay_start(self) -> int | None:
        """The task's steps before the decay, which are at least 1; `None` for schedules without a decay of its own."""
        return None if self.decay is None else int(self.total) - int(self.decay)


def phases(config: OptimizerConfig, total: int, *, first: bool = True) -> Phases:
    """How many of a task's steps each phase of the schedule has.

    Shares are those of the steps after `warm_moments`, rounded up. In tasks of a few steps a later phase has what
    earlier ones leave, and at least one step comes before the decay.

    Args:
      config: the optimizer section.
      total: optimizer steps of the task, at least 1.
      first: whether no task was learned before: schedule `infinite` warms up and cools down in the first task only.

    Raises:
      UserError: no step is left after `warm_moments`, or sizes given in steps do not fit into the task.

    Examples:
      >>> phases(OptimizerConfig(schedule="wsd", warmup=0.1, decay=5), 20)
      Phases(warmup=2, cooldown=0, decay=5)
      >>> phases(OptimizerConfig(schedule="wsd", warmup=16, decay=5), 20)
      Traceback (most recent call last):
      jaxcl.errors.UserError: optimizer: warmup 16 and decay 5 steps do not fit into 20 steps
    """
    rest = total - config.warm_moments
    if rest < 1:
        raise UserError(f"optimizer: warm_moments {config.warm_moments} leaves none of {total} steps", exit_code=2)
    sizes = {"warmup": config.warmup, "cooldown": 0.0, "decay": 0.0}
    if config.goes_on_before_decay:
        sizes["decay"] = config.decay
    if config.schedule == "infinite":
        sizes |= {"cooldown": config.cooldown} if first else {"warmup": 0.0}
    steps = {name: math.ceil(size * rest - 1e-9) if size < 1 else round(size) for name, size in sizes.items()}
    in_steps = any(size >= 1 for size in sizes.values())
    if in_steps and (sum(steps.values()) > rest or steps["decay"] == total > 1):
        listed = " and ".join(f"{name} {number}" for name, number in steps.items() if number)
        after = f" after warm_moments {config.warm_moments}" if config.warm_moments else ""
        raise UserError(f"optimizer: {listed} steps do not fit into {rest} steps{after}", exit_code=2)
    warmup = min(steps["warmup"], rest)
    cooldown = min(steps["cooldown"], rest - warmup)
    return Phases(warmup, cooldown, min(steps["decay"], rest - warmup - cooldown, total - 1))


def sized_in_steps(config: OptimizerConfig) -> bool:
    """Whether a phase has a given number of steps, which may not fit into a task."""
    sizes = (config.warmup, config.cooldown, config.decay) if config.goes_on_before_decay else (config.warmup,)
    return config.warm_moments > 0 or any(size >= 1 for size in sizes)


def learning_rate(config: OptimizerConfig, clock: Clock) -> Float[Array, ""]:
    r"""The learning rate of the current step.

    With step $s$, warm-up $w$, total $T$, peak $\eta$ and final share $f$: $\eta s / w$ for $s < w$; after that, with
    $p = (s - w) / (T - w)$ limited to $[0, 1]$, $\eta$ (constant), $\eta (1 - (1 - f) p)$ (linear) or
    $\eta (f + (1 - f) (1 + \cos \pi p) / 2)$ (cosine).

    Schedules `wsd` (Hu et al. 2024, arXiv 2404.06395) and `infinite` (Ibrahim et al. 2024, arXiv 2403.08763) are
    constant after warm-up and cooldown, at $\eta_c = \eta$ (wsd) or $\eta$ times `constant` (infinite), until the last
    $d$ steps. There, with $q = (s - T + d) / d$ and $r = \eta f / \eta_c$, the rate is $\eta_c (1 - (1 - r) q)$
    (linear), $\eta_c (1 - (1 - r) \sqrt q)$ (sqrt) or $\eta_c r^q$ (exponential). In a cooldown of $c$ steps, with
    $x = (s - w) / c$, it is $\eta_c + (\eta - \eta_c) (1 + \cos \pi x) / 2$ (cosine) or
    $\eta + (\eta_c - \eta)\, h(x) / h(1)$ with $h(x) = 1 / \sqrt{1 + \alpha x} - 1$ (inverse_sqrt).

    With `warm_moments` $n$ the rate of the first $n$ steps is 0, and $s$ and $T$ are counted from there.

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
    step, warmup, total = (jnp.asarray(value).astype(jnp.float32) for value in clock[:3])
    step, total = step - config.warm_moments, total - config.warm_moments
    if config.goes_on_before_decay:
        share = _with_decay(config, clock, step, warmup, total)
    else:
        progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
        share = jnp.ones_like(progress)
        if config.schedule != "constant":
            share = _fall(config, config.schedule, progress, config.final)
    rise = step / jnp.maximum(warmup, 1.0)
    rate = config.learning_rate * jnp.where(step < warmup, rise, share)
    return jnp.where(step < 0, 0.0, rate) if config.warm_moments else rate


def _with_decay(config: OptimizerConfig, clock: Clock, step: Array, warmup: Array, total: Array) -> Array:
    """Shares of the highest rate after the warm-up, for schedules with a decay of its own."""
    assert clock.cooldown is not None  # see `Clock.start`
    assert clock.decay is not None
    cooldown, decay = (jnp.asarray(value).astype(jnp.float32) for value in (clock.cooldown, clock.decay))
    decayed = jnp.clip((step - (total - decay)) / jnp.maximum(decay, 1.0), 0.0, 1.0)
    if config.schedule == "wsd":
        return _fall(config, config.decay_shape or "linear", decayed, config.final)
    level = config.constant
    share = level * _fall(config, config.decay_shape or "exponential", decayed, config.final / level)
    cooled = jnp.clip((step - warmup) / jnp.maximum(cooldown, 1.0), 0.0, 1.0)
    return jnp.where(step < warmup + cooldown, _fall(config, config.cooldown_shape, cooled, level), share)


def _fall(config: OptimizerConfig, shape: str, progress: Array, final: float) -> Array:
    """A fall from 1 at progress 0 to `final` at progress 1."""
    if shape == "linear":
        return 1.0 - (1.0 - final) * progress
    if shape == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    if shape == "sqrt":
        return 1.0 - (1.0 - final) * jnp.sqrt(progress)
    if shape == "exponential":
        return jnp.power(final, progress)
    alpha = config.cooldown_steepness
    height = (1.0 / jnp.sqrt(1.0 + alpha * progress) - 1.0) / (1.0 / math.sqrt(1.0 + alpha) - 1.0)
    return 1.0 + (final - 1.0) * height
