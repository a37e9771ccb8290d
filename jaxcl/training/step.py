"""One optimizer step as a pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxcl.errors import UserError
from jaxcl.functional.norm import global_norm
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import overlay, trained
from jaxcl.sharding.layout import Layout
from jaxcl.training.low_bits import split, widen
from jaxcl.training.micro_batches import micro_batches
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.privacy import PrivacyConfig, private_gradient
from jaxcl.training.schedule import learning_rate
from jaxcl.training.state import TrainState, check_replacement

Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]
Sums = Mapping[str, Float[Array, ""]]


def make_train_step(
    method: Method,
    transform: optax.GradientTransformationExtraArgs,
    optimizer: OptimizerConfig,
    *,
    accumulate: int,
    layout: Layout,
    privacy: PrivacyConfig | None = None,
    on_devices: TrainState | None = None,
) -> Step:
    r"""The training step of a method; pure, not compiled.

    It minimises $\sum_i w_i S_i / C_i$ over the method's terms, where $S_i$ and $C_i$ are sum and count over the
    *whole* batch. With `accumulate > 1` the batch is processed in micro-batches: first the counts (a
    forward pass that the compiler drops where they do not depend on the model), then the gradients of
    $\sum_i w_i s_i / C_i$ per micro-batch, added in float32. Clipping, masks and moments are applied once, to the sum.

    If the network has adapters, only they have gradients, moments and updates (`trained`); the method's loss still sees
    all params.

    A step whose loss, or whose gradient's norm, is not finite changes nothing but the two counts of steps: params,
    optimizer state, method state and low bits keep their bits. One bad micro-batch or example is enough. The decision
    follows from two numbers that all devices share.

    Args:
      method: the method.
      transform: what `method.transform` returned.
      optimizer: the optimizer section, for the schedule.
      accumulate: micro-batches per batch; divides the batch size.
      layout: the run's layout.
      privacy: clip each example's gradient and add noise; see `private_gradient`.
      on_devices: shardings of the state on the devices, where what waits on the host is brought for the update; `None`:
        nothing waits there.

    Returns:
      `step(state, batch, key) -> (state, metrics)`. `key` is the run's; the step's number is folded into it. Metrics
      are float32 scalars: `loss`; `term/<name>`, the mean of each term; `grad_norm` (before clipping), `param_norm` and
      `update_norm`, of the trained params in float32; `learning_rate`; `tokens`, the number of tokens that are not
      padding; `skipped`, 1 if the step changed nothing, else 0.
    """
    gradient = _whole if accumulate == 1 else _accumulated(accumulate, layout)
    if privacy is not None:
        gradient = private_gradient(privacy, accumulate, layout)

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        params = trained(state.params)
        # A key that was split is not used again: its parts would come back, as `split(key)[i]` is `fold_in(key, i)`.
        loss_key, update_key = jax.random.split(jax.random.fold_in(key, state.step))

        def loss(params: PyTree, batch: Batch, key: Array) -> Terms:
            with jax.named_scope("loss"):
                return all_terms(method, overlay(state.params, params), _own(state.method_state), batch, key)

        (total, means), grads = gradient(loss, params, batch, loss_key)
        # The optimizer works in float32, whatever the dtype of the params; see `Trainer.init`.
        grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
        norm = global_norm(grads)
        usable = jnp.isfinite(total) & jnp.isfinite(norm)
        rate = learning_rate(optimizer, state.clock)
        with jax.named_scope("optimizer"):
            held = state.opt_state, state.low_bits, state.method_state
            if on_devices is not None:
                held = jax.device_put(held, (on_devices.opt_state, on_devices.low_bits, on_devices.method_state))
            opt_state, low_bits, own = held
            extra = method.update_args(state.params, _own(own), batch, update_key)
            before = widen(params, low_bits)
            updates, new_opt_state = transform.update(grads, opt_state, before, learning_rate=rate, **extra)
            after = optax.apply_updates(before, updates)
            if optimizer.warm_moments:  # adding updates of 0 would change -0.0
                still = state.clock.step < optimizer.warm_moments
                after = jax.tree.map(lambda old, new: jnp.where(still, old, new), before, after)
            new = (*split(after, low_bits), new_opt_state)
            params, low_bits, opt_state = _where(usable, new, (params, low_bits, opt_state))
        with jax.named_scope("track"):
            tracked = method.track(after, _own(state.method_state), before, grads, means)
            tracked = check_replacement("method state", state.method_state, tracked)
            method_state = _where(usable, tracked, state.method_state)
        with jax.named_scope("metrics"):
            both = [batch] if batch.memory is None else [batch, batch.memory]
            metrics = {
                "loss": total,
                **{f"term/{name}": mean for name, mean in means.items()},
                "grad_norm": norm,
                "param_norm": global_norm(after),
                "update_norm": global_norm(updates),
                "learning_rate": rate,
                "tokens": sum((jnp.sum(one.segments > 0) for one in both), jnp.int32(0)),
                "skipped": ~usable,
            }
            metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        clock = state.clock._replace(step=state.clock.step + 1)
        params = overlay(state.params, params)
        return TrainState(state.step + 1, clock, params, opt_state, method_state, low_bits), metrics

    return step


def all_terms(method: Method, params: PyTree, state: PyTree, batch: Batch, key: Array) -> Terms:
    """The method's terms of a batch; those of its remembered rows (`batch.memory`) are prefixed with `memory_`."""
    if batch.memory is None:
        return _terms(method, params, state, batch, key)
    keys = jax.random.split(key)
    terms = _terms(method, params, state, dataclasses.replace(batch, memory=None), keys[0])
    remembered = _terms(method, params, state, batch.memory, keys[1])
    return {**terms, **{f"memory_{name}": term for name, term in remembered.items()}}


def _terms(method: Method, params: PyTree, state: PyTree, batch: Batch, key: Array) -> Terms:
    terms = method.loss(params, state, batch, key)
    wanted = f"{type(method).__name__}.loss: expected a mapping from names to Term(sum, count, weight), got"
    if not isinstance(terms, Mapping):
        raise UserError(f"{wanted} a {type(terms).__name__}")
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise UserError(f"{wanted} a {type(term).__name__} at {name!r}")
    return terms


def _own(state: PyTree) -> PyTree:
    """A copy of the containers, so that in-place changes by a method have no effect elsewhere."""
    return jax.tree.map(lambda leaf: leaf, state)


def _where(usable: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new arrays if they are usable, else the old ones; what a step never changes is left out of the program."""
    return jax.tree.map(lambda one, other: other if one is other else jnp.where(usable, one, other), new, old)


def weighted_loss(terms: Terms, counts: Sums) -> Float[Array, ""]:
    """`sum of weight * sum / count` over the terms; a term with count 0 adds 0."""
    return sum((term.weight * _mean(term.sum, counts[name]) for name, term in terms.items()), jnp.float32(0))


def _mean(total: Array, count: Array) -> Array:
    return total / jnp.where(count == 0, 1.0, count)


def _whole(loss: Callable[..., Terms], params: PyTree, batch: Batch, key: Array) -> tuple[tuple[Array, Sums], PyTree]:
    def objective(params: PyTree) -> tuple[Array, Sums]:
        terms = loss(params, batch, key)
        counts = {name: jax.lax.stop_gradient(term.count) for name, term in terms.items()}
        return weighted_loss(terms, counts), {name: _mean(term.sum, counts[name]) for name, term in terms.items()}

    return jax.value_and_grad(objective, has_aux=True)(params)


def _accumulated(accumulate: int, layout: Layout) -> Callable[..., tuple[tuple[Array, Sums], PyTree]]:
    def gradient(
        loss: Callable[..., Terms], params: PyTree, batch: Batch, key: Array
    ) -> tuple[tuple[Array, Sums], PyTree]:
        parts = micro_batches(batch, accumulate)
        keys = jax.random.split(key, accumulate)

        def count(_: None, part: tuple[Batch, Array]) -> tuple[None, Sums]:
            return None, {name: jnp.asarray(term.count) for name, term in loss(params, *part).items()}

        with jax.named_scope("counts"):
            counts = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jax.lax.scan(count, None, (parts, keys))[1])

        def objective(params: PyTree, part: Batch, key: Array) -> tuple[Array, Sums]:
            terms = loss(params, part, key)
            return weighted_loss(terms, counts), {name: _mean(term.sum, counts[name]) for name, term in terms.items()}

        def add(carry: PyTree, part: tuple[Batch, Array]) -> tuple[PyTree, tuple[Array, Sums]]:
            result, grads = jax.value_and_grad(objective, has_aux=True)(params, *part)
            carry = jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32), carry, grads)
            return jax.lax.with_sharding_constraint(carry, trained(layout.params)), result

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        grads, results = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), results), grads

    return gradient
