"""One method with one layout: its state and its compiled step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxcl.errors import UserError
from jaxcl.functional.averaging import Averaged, averaged, finish_average, restart_average
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import ADAPTER_NAMES, overlay, trained
from jaxcl.sharding.layout import Layout, put
from jaxcl.training.compile import Compiler
from jaxcl.training.feed import Feed, RowIterator
from jaxcl.training.freeze import freezing, moving
from jaxcl.training.keys import run_key
from jaxcl.training.low_bits import no_low_bits, split, widen
from jaxcl.training.optimizer import OptimizerConfig, make_parts
from jaxcl.training.privacy import PrivacyConfig
from jaxcl.training.schedule import Clock
from jaxcl.training.state import TrainState, abstract, offloaded, replace_method_state, replace_params, state_shardings
from jaxcl.training.step import Metrics, make_train_step


class Trainer:
    """What is the same for all tasks of a run: the method, the layout, and the compiled step.

    Attributes:
      method: the method.
      layout: shardings of the run's arrays.
      compile: `jax.jit` with the run's shardings (`Task.compile`).
      shardings: a `TrainState` of `NamedSharding`.
      target: a `TrainState` of `jax.ShapeDtypeStruct` with shardings, for `Checkpoints.restore`.
    """

    def __init__(
        self,
        method: Method,
        optimizer: OptimizerConfig,
        layout: Layout,
        *,
        accumulate: int,
        seed: int,
        privacy: PrivacyConfig | None = None,
        drift: optax.GradientTransformation | None = None,
        freeze_a: bool = False,
    ) -> None:
        """Prepares the step; nothing is computed or compiled yet.

        Args:
          method: the method.
          optimizer: the optimizer section.
          layout: shardings of the run's arrays.
          accumulate: micro-batches per batch.
          seed: seed of everything random within steps (dropout, sampled queries).
          privacy: clip each example's gradient and add noise; `None`: do not.
          drift: applied to gradients before the method's own transformation; `None`: nothing is.
          freeze_a: whether the first factor of each adapter stays as it is.
        """
        self.method = method
        self.optimizer = optimizer
        self.layout = layout
        self.compile = Compiler(layout)
        self._transform = method.transform(make_parts(optimizer))
        if drift is not None:
            self._transform = optax.chain(drift, self._transform)
        if freeze_a:
            self._transform = _without_a(self._transform, method)
        if optimizer.freeze_layers or optimizer.freeze_embeddings:
            self._transform = freezing(self._transform, _moving(method, optimizer))
        if optimizer.averaging is not None:
            self._transform = averaged(self._transform, *optimizer.averaging, optimizer.average_every)
        shapes = jax.eval_shape(self._init, layout.shapes)
        self.shardings = state_shardings(shapes, layout)
        self._on_devices = self.shardings if optimizer.offload else None
        if optimizer.offload:
            self.shardings = offloaded(shapes, self.shardings, method.offloaded)
        self.target: TrainState = abstract(shapes, self.shardings)
        self._seed = seed
        self._reset = jax.jit(_fresh(self._init_optimizer), out_shardings=self.shardings.opt_state)
        self._restart = jax.jit(restart_average, donate_argnums=0, out_shardings=self.shardings.opt_state)
        ends = layout.params, self.shardings.low_bits
        self._finish = jax.jit(self._averaged_params, donate_argnums=0, out_shardings=ends)
        self._no_low_bits = jax.jit(_no_low_bits, out_shardings=self.shardings.low_bits)
        step = make_train_step(
            method,
            self._transform,
            optimizer,
            accumulate=accumulate,
            layout=layout,
            privacy=privacy,
            on_devices=self._on_devices,
        )
        self.jitted_step = jax.jit(
            self.compile.trace(step),
            donate_argnums=0,
            in_shardings=(self.shardings, layout.batch, layout.replicated),
            out_shardings=(self.shardings, layout.replicated),
        )

    @functools.cached_property
    def key(self) -> Array:
        """The key of everything random within steps, replicated; made when first needed."""
        return put(run_key(self._seed, "steps"), self.layout.replicated)

    def with_seed(self, seed: int) -> Trainer:
        """A trainer with this one's compiled step and another `seed` of everything random within steps."""
        other = copy.copy(self)
        other._seed = seed
        vars(other).pop("key", None)
        return other

    def init(self, params: PyTree) -> TrainState:
        """The state before the first task.

        Args:
          params: the model's params; moved to the shardings `layout.params` if necessary. The state owns them: the
            first step deletes them.

        Returns:
          The state at step 0.
        """
        params = put(params, self.layout.params)
        method_state = self.init_method(params)
        step, clock = put((jnp.int32(0), Clock.start(self.optimizer, 0)), self.layout.replicated)
        return TrainState(step, clock, params, self._reset(params), method_state, self._no_low_bits(params))

    def init_method(self, params: PyTree) -> PyTree:
        """The method's state before the first task, sharded."""
        return jax.jit(_fresh(self.method.init), out_shardings=self.shardings.method_state)(params)

    def target_of(self, num_tasks: int) -> TrainState:
        """The `target` of a run of the same method with a different number of tasks."""
        method = type(self.method)(self.method.options, self.method.network, num_tasks)
        shapes = jax.eval_shape(method.init, self.layout.shapes)
        return self.target.replace(method_state=abstract(shapes, self.layout.like_params(shapes)))

    def grow(self, state: TrainState) -> TrainState:
        """The state of a run of fewer tasks, grown to this run's number of tasks; see `Method.grow`."""
        grow = jax.jit(self.method.grow, out_shardings=self.shardings.method_state)
        return state.replace(method_state=grow(state.params, state.method_state))

    def start_task(self, state: TrainState, total: int, *, first: bool = True) -> TrainState:
        """The state at the start of a task: the schedule starts, and the moments are reset if so configured.

        Args:
          state: the state after the previous task; do not use it any more.
          total: optimizer steps of the task.
          first: whether `state` has learned no task; schedule `infinite` warms up only then.

        Raises:
          UserError: the phases of the schedule do not fit into the task.
        """
        clock = put(Clock.start(self.optimizer, total, first=first), self.layout.replicated)
        if self.optimizer.reset_optimizer:
            # The old moments are deleted before the new ones are created, so that memory never holds both.
            jax.tree.map(lambda leaf: leaf.delete(), state.opt_state)
            state = state.replace(opt_state=self._reset(state.params))
        if self.optimizer.averaging is not None:
            opt_state, low_bits = self._held(state)
            state = state.replace(opt_state=self._restart(opt_state, widen(trained(state.params), low_bits)))
        return state.replace(clock=clock)

    def finish_task(self, state: TrainState) -> TrainState:
        """The state after a task's last step, with its params averaged (`optimizer.average`); `state` is donated."""
        if self.optimizer.averaging is None:
            return state
        params, low_bits = self._finish(state.params, *self._held(state))
        return state.replace(params=params, low_bits=low_bits)

    def _averaged_params(self, params: PyTree, opt_state: Averaged, low_bits: PyTree) -> tuple[PyTree, PyTree]:
        assert self.optimizer.averaging is not None
        end = finish_average(opt_state, widen(trained(params), low_bits), *self.optimizer.averaging)
        part, low_bits = split(end, low_bits)
        return overlay(params, part), low_bits

    def _held(self, state: TrainState) -> tuple[Any, PyTree]:
        """Optimizer state and low bits on the devices, wherever they are held."""
        held, there = (state.opt_state, state.low_bits), self._on_devices
        return held if there is None else jax.device_put(held, (there.opt_state, there.low_bits))

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Dispatches one optimizer step; `state` is donated. See `make_train_step`."""
        return self.jitted_step(state, batch, self.key)

    def with_method_state(self, state: TrainState, new: PyTree) -> TrainState:
        """The state with the method state that `Method.prepare` or `Method.consolidate` returned.

        Args:
          state: the state before.
          new: the method's new state.

        Raises:
          ValueError: structure, shapes or dtypes changed.
        """
        return replace_method_state(state, new, self.shardings.method_state)

    def with_params(self, state: TrainState, new: PyTree) -> TrainState:
        """The state with the params that `Method.final_params` returned.

        Args:
          state: the state before.
          new: the new params.

        Raises:
          ValueError: structure, shapes or dtypes changed.
        """
        replaced = replace_params(state, new, self.layout)
        # Low bits complete the params that the optimizer left, no others.
        return replaced if new is state.params else replaced.replace(low_bits=self._no_low_bits(replaced.params))

    def feed(self, rows: RowIterator, *, prefetch: int) -> Feed:
        """Batches on this run's devices.

        Args:
          rows: the iterator of a pipeline.
          prefetch: batches that are brought to the devices ahead.
        """
        return Feed(rows, self.layout.batch, prefetch=prefetch)

    def _init(self, params: PyTree) -> TrainState:
        method_state = self.method.init(params)
        return TrainState(
            jnp.int32(0),
            Clock.start(self.optimizer, 0),
            params,
            self._init_optimizer(params),
            method_state,
            _no_low_bits(params),
        )

    def _init_optimizer(self, params: PyTree) -> PyTree:
        """Moments in float32 even if the params are bfloat16: a second moment in bfloat16 would stop changing."""
        return self._transform.init(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained(params)))


def _without_a(transform: optax.GradientTransformation, method: Method) -> optax.GradientTransformationExtraArgs:
    """A transformation in which the first factor of each adapter has neither gradients nor updates."""
    part = trained(method.network.shapes())
    moves = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.float32(jax.tree_util.keystr(path[-1:], simple=True) != ADAPTER_NAMES[0]), part
    )
    first = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, moves))
    # A decay of weights or a pull would move it without a gradient.
    return freezing(optax.chain(first, transform), moves)


def _moving(method: Method, optimizer: OptimizerConfig) -> PyTree:
    """What is not frozen, of what is trained."""
    network, layers = method.network, optimizer.freeze_layers
    if layers > network.num_layers:
        raise UserError(f"optimizer.freeze_layers: {layers} is over the model's {network.num_layers}", exit_code=2)
    moves = moving(network.axes(), network.shapes(), layers=layers, embeddings=optimizer.freeze_embeddings)
    part = trained(moves)
    if not any(leaf.any() for leaf in jax.tree.leaves(part)):
        raise UserError("optimizer.freeze_layers, freeze_embeddings: nothing is left to train", exit_code=2)
    return part


def _no_low_bits(params: PyTree) -> PyTree:
    return no_low_bits(trained(params))


def _fresh(function: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """`function` with copied results: a step cannot donate a buffer that they share with the argument."""
    return lambda params: jax.tree.map(jnp.copy, function(params))
