"""One method on one layout: its state, its compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.lora import trained
from jaxcl.sharding.layout import Layout, put
from jaxcl.training.compile import Compiler
from jaxcl.training.feed import Feed, RowIterator
from jaxcl.training.optimizer import Clock, OptimizerConfig, make_parts
from jaxcl.training.privacy import PrivacyConfig
from jaxcl.training.state import TrainState, abstract, on_host, replace_method_state, replace_params, state_shardings
from jaxcl.training.step import Metrics, make_train_step

PyTree = Any


class Trainer:
    """What stays the same over all tasks of a run: the method, where arrays live, and the step compiled for them.

    Attributes:
      method: the method.
      layout: where arrays live.
      compile: `jax.jit` with the run's shardings (`Task.compile`).
      shardings: a `TrainState` of `NamedSharding`.
      target: a `TrainState` of `jax.ShapeDtypeStruct` with shardings: what `Checkpoints.restore` restores to.
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
    ) -> None:
        """Prepares the step; nothing is computed or compiled yet.

        Args:
          method: the method.
          optimizer: the optimizer section.
          layout: where arrays live.
          accumulate: micro-batches of a batch.
          seed: seed of everything random within steps (dropout, sampled queries).
          privacy: train with clipped gradients and noise.
        """
        self.method = method
        self.optimizer = optimizer
        self.layout = layout
        self.compile = Compiler(layout)
        self._transform = method.transform(make_parts(optimizer))
        shapes = jax.eval_shape(self._init, layout.shapes)
        self.shardings = state_shardings(shapes, layout)
        moments = None
        if optimizer.offload:
            moments = self.shardings.opt_state
            self.shardings = self.shardings.replace(opt_state=on_host(shapes.opt_state, moments))
        self.target: TrainState = abstract(shapes, self.shardings)
        self._seed = seed
        self._reset = jax.jit(_fresh(self._init_optimizer), out_shardings=self.shardings.opt_state)
        step = make_train_step(
            method,
            self._transform,
            optimizer,
            accumulate=accumulate,
            layout=layout,
            privacy=privacy,
            moments=moments,
        )
        self.jitted_step = jax.jit(
            self.compile.trace(step),
            donate_argnums=0,
            in_shardings=(self.shardings, layout.batch, layout.replicated),
            out_shardings=(self.shardings, layout.replicated),
        )

    @functools.cached_property
    def key(self) -> Array:
        """What everything random within steps comes from, on all devices; not made before a step runs."""
        return put(jax.random.key(self._seed), self.layout.replicated)

    def init(self, params: PyTree) -> TrainState:
        """The state before the first task.

        Args:
          params: the model's params, sharded as `layout.params` says (others are moved there). The state takes them
            over: the first step deletes them.

        Returns:
          Step 0, no task begun.
        """
        params = put(params, self.layout.params)
        method_state = self.init_method(params)
        step, clock = put((jnp.int32(0), Clock.start(self.optimizer, 0)), self.layout.replicated)
        return TrainState(step, clock, params, self._reset(params), method_state)

    def init_method(self, params: PyTree) -> PyTree:
        """The method's state before the first task, sharded."""
        return jax.jit(_fresh(self.method.init), out_shardings=self.shardings.method_state)(params)

    def target_of(self, num_tasks: int) -> TrainState:
        """The `target` of a run of the same method with another number of tasks."""
        method = type(self.method)(self.method.config, self.method.network, num_tasks)
        shapes = jax.eval_shape(method.init, self.layout.shapes)
        return self.target.replace(method_state=abstract(shapes, self.layout.like_params(shapes)))

    def grow(self, state: TrainState) -> TrainState:
        """The state of a run of fewer tasks, with room for this run's; see `Method.grow`."""
        grow = jax.jit(self.method.grow, out_shardings=self.shardings.method_state)
        return state.replace(method_state=grow(state.params, state.method_state))

    def start_task(self, state: TrainState, total: int) -> TrainState:
        """The state at the start of a task: schedule at 0 of `total` steps, moments forgotten if so configured.

        Args:
          state: the state after the previous task; do not use it any more.
          total: optimizer steps of the task.
        """
        clock = put(Clock.start(self.optimizer, total), self.layout.replicated)
        if self.optimizer.reset_optimizer:
            # The old moments go before the new ones come: there need not be room for both.
            jax.tree.map(lambda leaf: leaf.delete(), state.opt_state)
            state = state.replace(opt_state=self._reset(state.params))
        return state.replace(clock=clock)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One optimizer step, dispatched and not waited for; `state` is donated. See `make_train_step`."""
        return self.jitted_step(state, batch, self.key)

    def with_method_state(self, state: TrainState, new: PyTree) -> TrainState:
        """The state with what `Method.prepare` or `Method.consolidate` returned.

        Args:
          state: the state before.
          new: the method's new state.

        Raises:
          ValueError: structure, shapes or dtypes changed.
        """
        return replace_method_state(state, new, self.layout)

    def with_params(self, state: TrainState, new: PyTree) -> TrainState:
        """The state with what `Method.finish` returned.

        Args:
          state: the state before.
          new: the new params.

        Raises:
          ValueError: structure, shapes or dtypes changed.
        """
        return replace_params(state, new, self.layout)

    def feed(self, rows: RowIterator, *, prefetch: int) -> Feed:
        """Batches from rows, on this run's devices.

        Args:
          rows: the iterator of a pipeline.
          prefetch: batches that are brought to the devices ahead.
        """
        return Feed(rows, self.layout.batch, prefetch=prefetch)

    def _init(self, params: PyTree) -> TrainState:
        method_state = self.method.init(params)
        return TrainState(
            jnp.int32(0), Clock.start(self.optimizer, 0), params, self._init_optimizer(params), method_state
        )

    def _init_optimizer(self, params: PyTree) -> PyTree:
        """Moments in float32, also where the params are bfloat16: a second moment in bfloat16 stops moving."""
        return self._transform.init(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained(params)))


def _fresh(function: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """`function`, whose results share no buffer with its argument: a step could not donate such a buffer twice."""
    return lambda params: jax.tree.map(jnp.copy, function(params))
