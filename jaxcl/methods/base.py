"""What a continual-learning method is: a handful of functions over one pytree of state."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import jax
import optax
from jaxtyping import Array, PyTree

from jaxcl.functional.federated import Combine
from jaxcl.functional.terms import Terms
from jaxcl.methods.options import MethodOptions, ReplayConfig, ReplayOptions
from jaxcl.methods.passes.losses import language_model_terms
from jaxcl.methods.tool_hooks import ToolHooks
from jaxcl.models.batch import Batch
from jaxcl.models.network import ModelConfig, Network

Params = PyTree
State = PyTree
OptionsT = TypeVar("OptionsT", bound=MethodOptions)


class OptimizerParts(NamedTuple):
    """The parts of an optimizer that a method may put transformations between, in order of application."""

    clip: optax.GradientTransformation
    precondition: optax.GradientTransformation
    weight_decay: optax.GradientTransformation
    learning_rate: optax.GradientTransformation

    def chain(self) -> optax.GradientTransformationExtraArgs:
        """The plain optimizer."""
        return optax.with_extra_args_support(optax.chain(*self))


class Stored(NamedTuple):
    """How an array that `Method.signals` returns for a row is stored without its padding and put back into a batch.

    Attributes:
      axes: names of its axes behind `batch`, from the first to the last one that is padded. `length`: the row's tokens;
        `predict`: its scored positions; the name of another stored array: the entries of that array that are not its
        `fill`; `None`: an axis that is stored whole.
      fill: value of the padding, and of rows that only fill a batch.
    """

    axes: tuple[str | None, ...] = ()
    fill: int = 0


class Task(Protocol):
    """What a method may ask of the task at hand, before or after training on it.

    Attributes:
      index: position of the task in the sequence.
      name: its name.
      count: number of tasks in the sequence.
      key: a random key of this task; another one before and after training.
    """

    index: int
    name: str
    count: int
    key: Array

    def examples(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass over (the first `limit` of a seeded shuffle of) the task's training examples, in micro-batches.

        Their size is `training.batch_size / training.accumulate`: what is computed from a batch as a whole, such as the
        square of its mean gradient, depends on it. The last batch may hold rows that only fill it.
        """
        ...

    def memory(self) -> Iterator[Batch]:
        """One pass over the examples of this task that go into the memory."""
        ...

    def fold(
        self, add: Callable[[Any, Batch], Any], start: PyTree, *, limit: int | None = None, memory: bool = False
    ) -> PyTree:
        """`start` with every batch added: `add(add(start, first), second)` and so on.

        A run that is asked to stop saves the total after a batch, and its next start continues with the next batch.

        Args:
          add: returns the new total, a tree like `start`. What it keeps elsewhere is lost at a stop.
          start: a tree of arrays and numbers.
          limit: see `examples`.
          memory: over the batches of `memory` instead of those of `examples`.
        """
        ...

    def params_before(self) -> Params:
        """The params before this task: after the task before, with the decay of its schedule."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`jax.jit` with the run's shardings; use it for every function of params that a method runs."""
        ...


class Method(ToolHooks, Generic[OptionsT]):
    """Plain fine-tuning, one task after another. A method overrides what it changes.

    `prepare`, `consolidate` and `final_params` run on the host between tasks: they call compiled functions and return
    the new state or params. All other functions are pure and traced.

    A subclass names the type of its options: `class Mine(Method[MyOptions])`.

    Attributes:
      Options: the type of the method's options; set from the type argument.
      joint: train on all tasks at once instead of one after another.
      individual: train a separate model for each task, from the params that the run began with; each task is answered
        by its own model.
      copies: how many copies of a row the longest pass of a step reads one behind the other. With more than one, tasks
        must be prompts and answers, one pair per row, and the model's window must hold all copies.
      asks_for_before: `consolidate` calls `Task.params_before`: a run that goes on within a task checks first that the
        checkpoint which has them is whole.
      offloaded: entries of the state that only `update_args` reads within a step: with `optimizer.offload` they wait in
        host memory. Between tasks, functions that are compiled by `Task.compile` get them on the devices.
      stored: how each array that `signals` returns is stored, by name.
      options: the method's options.
      network: the network.
      num_tasks: number of tasks in the sequence.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    joint: bool = False
    individual: bool = False
    copies: int = 1
    asks_for_before: bool = False
    offloaded: Sequence[str] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in typing.get_args(base):
                if isinstance(argument, type) and issubclass(argument, MethodOptions):
                    cls.Options = argument

    def __init__(self, options: OptionsT, network: Network, num_tasks: int) -> None:
        self.options = options
        self.network = network
        self.num_tasks = num_tasks

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """Checks that the method's options fit each other and the model.

        Raises:
          ValueError: they do not; the message starts with the option's name.
        """
        if isinstance(options, ReplayOptions):
            options.replay.check()

    @property
    def replay(self) -> ReplayConfig | None:
        """How earlier examples are kept and fed back; `None` keeps none."""
        return self.options.replay if isinstance(self.options, ReplayOptions) else None

    @property
    def couples_examples(self) -> bool:
        """See `ToolHooks`: the loss of routers compares where all tokens of a batch go."""
        return self.network.router_loss_weight > 0

    # State

    def init(self, params: Params) -> State:
        """State before the first task; its structure, shapes and dtypes never change.

        An array with an entry per task has the tasks on its first axis, so that `grow` can add entries.
        """
        return {}

    def grow(self, params: Params, state: State) -> State:
        """The `state` of a run of fewer tasks, with room for this one's `num_tasks`; pure. `params` are the run's.

        Arrays whose shape depends on the number of tasks keep the first entries of their first axis; the new entries
        are as `init` gives them.
        """

        def wider(new: Array, old: Array) -> Array:
            return old if old.shape == new.shape else new.at[: len(old)].set(old)

        return jax.tree.map(wider, self.init(params), state)

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """The `state` before training on `task`; `params` are those after the task before.

        Training begins with them, too, but for schedules that go on from before the last decay.
        """
        return state

    def track(
        self, params: Params, state: State, before: Params, gradient: Params, means: Mapping[str, Array]
    ) -> State:
        """The state after a step; pure. After a step whose loss or gradient is not finite, the state stays as it was.

        Args:
          params: what is trained, after the step; float32 even if the model holds bfloat16.
          state: the state that the step began with.
          before: what is trained, before the step; likewise.
          gradient: of the step's loss, float32, before clipping.
          means: mean of each term over the step's whole batch, by name, without its weight; those of remembered rows
            that are mixed into a batch are prefixed with `memory_`.
        """
        return state

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """The `state` after training on `task`, which ended with `params`."""
        return state

    # The step

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """The terms whose weighted sum is minimised; pure.

        Args:
          params: the model's params, of which `jaxcl.models.trained` are differentiated.
          state: the method's state.
          batch: token rows, of the task at hand, general or remembered (`Batch.origin`).
          key: new at every step.
        """
        return language_model_terms(self.network, params, batch, key, self.options.loss_chunk, self.options.loss_gate)

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """The optimizer, with the method's own transformations where they belong."""
        return parts.chain()

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """Keyword arguments of the optimizer's update (the soft masks, for example); pure.

        The optimizer sees only what is trained: cut a tree over all params with `jaxcl.models.trained`.

        Args:
          params: the model's params.
          state: the method's state.
          batch: the step's whole batch.
          key: another one than the loss gets.
        """
        return {}

    # Params

    def final_params(self, params: Params, state: State, task: Task) -> Params:
        """The params that the run goes on with after `task`; `state` is what `consolidate` returned.

        Called again, with the params from before the decay, where the schedule goes on from there.
        """
        return params

    def params_for(self, params: Params, state: State, index: Array) -> Params:
        """The params that answer task `index`, for methods that know the task at inference; from `params` and `state`.

        Pure. Evaluation asks for them, also for tasks that are scored before they are learned. Shapes are those of
        `params`.
        """
        return params

    # Several clients, one model

    @property
    def shared_by(self) -> Combine:
        """What the server makes of what several clients share: the weighted mean, or the maximum of each entry."""
        return "mean"

    def share(self, state: State) -> State:
        """What leaves a client of federated training after a task, besides params; pure. By default nothing.

        Everything else of the state, the memory and what is stored with it stay with the client.

        Args:
          state: the client's state after `prepare` or `consolidate`.
        """
        return {}

    def merge(self, state: State, shared: State) -> State:
        """A client's `state` with what all clients know in place of its own; pure.

        `shared` is what the server made of the clients' `share`. By default its entries replace those of the state that
        have the same names. Merging what a state itself shares changes nothing, so that it may be repeated, and one
        client alone learns as it would without a server.
        """
        return {**state, **shared} if shared else state

    # Memory and prompts

    @property
    def stored(self) -> Mapping[str, Stored]:
        """How each array that `signals` returns is stored, by name; others are stored whole."""
        return {}

    def signals(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Array] | None:
        """What is stored with each remembered row, leading axis `batch`; pure. `None` stores nothing.

        Called after `final_params`. Remembered batches carry it as `batch.teacher`.

        Args:
          params: the params after the task.
          state: the method's state after the task.
          batch: remembered rows of the task.
          key: the task's, the same for all batches: draw by `Batch.keys`, so that what is stored of an example does not
            depend on its batch.
        """
        return None

    def prompt_prefix(self, index: int) -> Sequence[int]:
        """Token ids before every prompt of task `index`: soft tokens, see `jaxcl.models.soft_tokens`."""
        return ()
