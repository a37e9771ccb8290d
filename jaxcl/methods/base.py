"""What a continual-learning method is: a handful of functions over one pytree of state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from pydantic import Field

from jaxcl.models.batch import Batch
from jaxcl.models.network import ModelConfig, Network
from jaxcl.schema import Schema

Params = Any
State = Any
Record = dict[str, np.ndarray]


class Term(NamedTuple):
    """One addend of a loss, `weight * sum / count`, kept apart so that accumulation over uneven batches is exact."""

    sum: Float[Array, ""]
    count: Float[Array, ""]  # type: ignore[assignment]  # nobody counts occurrences in a term
    weight: float = 1.0


Terms = Mapping[str, Term]


class OptimizerParts(NamedTuple):
    """The optimizer in the pieces a method may stand between, in order of application."""

    clip: optax.GradientTransformation
    precondition: optax.GradientTransformation
    weight_decay: optax.GradientTransformation
    learning_rate: optax.GradientTransformation

    def chain(self) -> optax.GradientTransformationExtraArgs:
        """The plain optimizer."""
        return optax.with_extra_args_support(optax.chain(*self))


class Synthetic(Schema):
    """How a model writes samples of a task it has learned."""

    writer: Literal["start", "before"] = Field(
        "start",
        description="who writes the prompts; start: the model that the run began with (needs weights); before: the "
        "model as it was before the task",
    )
    candidates: int = Field(4, ge=1, description="samples written for each one that is kept")
    temperature: float = Field(0.8, gt=0, description="divides the scores that prompts are drawn by")
    top_p: float = Field(0.95, gt=0, le=1, description="prompts are drawn among the likeliest tokens of this mass")
    similarity: float = Field(
        0.8, ge=0, le=1, description="share of equal letters from which a sample counts as a copy of another prompt"
    )
    prefix: str | None = Field(
        None, description="what each prompt begins with; none: the longest beginning that a task's prompts share"
    )


class Replay(Schema):
    """How examples of earlier tasks are kept and fed back."""

    source: Literal["kept", "synthetic"] = Field(
        "kept",
        description="what is remembered; kept: examples; synthetic: samples that the model writes before it moves on, "
        "so that nothing of an earlier task's data is kept (prompt-answer tasks)",
    )
    synthetic: Synthetic = Field(Synthetic(), description="how samples are written")
    fraction: float = Field(
        0.01, ge=0, le=1, description="share of each task's training examples that is kept; above 0, at least one is"
    )
    minimum: int = Field(1, ge=0, description="smallest number of examples kept from a task")
    mode: str = Field(
        "interleave",
        pattern="^(interleave|mix)$",
        description="interleave: a step on a memory batch every so many steps; mix: every step is on a task batch and "
        "a memory batch, and minimises the sum of both losses",
    )
    every: int = Field(
        0,
        ge=0,
        description="interleave: steps between memory batches, at most as many as the task has; 0: so that each epoch "
        "of the task sees the memory once",
    )

    def check(self) -> None:
        """For methods that are nothing without a memory.

        Raises:
          ValueError: nothing is kept.
        """
        if self.fraction == 0 and self.minimum == 0:
            raise ValueError("replay.fraction: 0 with replay.minimum 0 keeps nothing; allowed: either above 0")


class MethodConfig(Schema):
    """Options that all methods have."""

    loss_chunk: int = Field(
        512,
        ge=0,
        description="scored positions of a row whose token scores exist at the same time; more are worked through "
        "one part after the other and computed again in the backward pass; 0: no limit",
    )


class RowShape(Protocol):
    """Static shape of the rows of a batch."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    @property
    def predict(self) -> int | None:
        """Scored positions; `None`: every position is scored."""
        ...


class Task(Protocol):
    """What a method may ask of the task at hand, before or after training on it."""

    index: int
    name: str
    count: int
    key: Array

    def examples(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass over (the first `limit` of a seeded shuffle of) the task's training examples, in micro-batches.

        What is taken of a batch as a whole, such as the square of its mean gradient, depends on their size
        (`training.batch_size / training.accumulate`); the last batch may hold fillers.
        """
        ...

    def memory(self) -> Iterator[Batch]:
        """One pass over the examples of this task that go into the memory."""
        ...

    def params_before(self) -> Params:
        """The params as they were before this task."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`jax.jit`, with the run's shardings; use it for every function of params that a method runs."""
        ...


class Method:
    """Plain fine-tuning, one task after another. A method overrides what it changes.

    All functions but `prepare`, `consolidate` and `finish` are pure and traced. Those three run on the host between
    tasks, call compiled functions and return the new state or params.

    Attributes:
      Config: the method's own section of the configuration.
      replay: how earlier examples are kept and fed back; `None` keeps none.
      joint: train on all tasks at once instead of one after another.
      individual: train a model of its own for each task, from the params the run began with; each task is answered by
        its own model.
      turns: how often a loop of the step whose length depends on the batch turns, as `jaxcl plan` counts it.
    """

    Config: ClassVar[type[Schema]] = MethodConfig
    replay: Replay | None = None
    joint: bool = False
    individual: bool = False
    turns: int = 1

    @property
    def couples_examples(self) -> bool:
        """Whether the loss of an example depends on the others of its batch."""
        return False

    @classmethod
    def check(cls, config: Any, model: ModelConfig) -> None:
        """Holds the method's options against the model's shape.

        Raises:
          ValueError: they do not go together; the message starts with the option's name.
        """

    @classmethod
    def untrained(cls, config: Any) -> tuple[Any, str]:
        """How to measure what `tables` shows on a model that is not trained between `prepare` and `consolidate`.

        Returns:
          The options to measure with, and a line about what cannot be measured so; empty if all can.
        """
        return config, ""

    def __init__(self, config: Any, network: Network, num_tasks: int) -> None:
        self.config = config
        self.network = network
        self.num_tasks = num_tasks

    def init(self, params: Params) -> State:
        """State before the first task; its shapes never change.

        Arrays with a place for each task have them on their first axis, so that `grow` can add places.
        """
        return {}

    def grow(self, params: Params, state: State) -> State:
        """The state of a run of fewer tasks, with room for this one's `num_tasks`; pure.

        Arrays whose shape depends on the number of tasks keep what they hold on the first places of their first axis;
        the new places are as `init` gives them.
        """

        def wider(new: Array, old: Array) -> Array:
            return old if old.shape == new.shape else new.at[: len(old)].set(old)

        return jax.tree.map(wider, self.init(params), state)

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """Before training on `task`."""
        return state

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """The terms whose weighted sum is minimised; pure. `key` is new at every step."""
        from jaxcl.methods.losses import language_model_terms

        return language_model_terms(self.network, params, batch, key, self.config.loss_chunk)

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """The optimizer, with the method's own transformations at their places in it."""
        return parts.chain()

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """Keyword arguments for the optimizer's update (the soft masks, for example); pure.

        Of a tree over all params, the update sees the part that is trained; see `jaxcl.models.lora.trained`. `batch` is
        the step's whole batch, `key` another than the loss gets.
        """
        return {}

    def track(self, params: Params, state: State, before: Params, gradient: Params) -> State:
        """The state after a step; pure. Shapes and dtypes do not change.

        Args:
          params: what is trained, after the step.
          state: the state that the step began with.
          before: what is trained, before the step.
          gradient: of the step's loss, float32, before clipping.
        """
        return state

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """After training on `task`."""
        return state

    def finish(self, params: Params, state: State, task: Task) -> Params:
        """The params the run goes on with after `task`; `state` is what `consolidate` returned."""
        return params

    def signals(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Array] | None:
        """What is stored beside each remembered row, leading axis `batch`; pure. `None` stores nothing.

        Called after `finish`. Rows of remembered batches carry it as `batch.teacher`. `key` is the task's, the same for
        all batches: with `Batch.keys` each example has the same draws whatever batch it stands in.
        """
        return None

    def trim(self, record: Record) -> Record:
        """One row of `signals` as it is stored, without its padding; on the host."""
        return record

    def collate(self, records: Sequence[Mapping[str, np.ndarray]], shape: RowShape) -> Record:
        """The records of a batch's rows as arrays with leading axis `batch`; on the host.

        The shapes of the results follow from the batch's shape, never from the records at hand: all processes must
        agree on them.

        Args:
          records: what `trim` returned for each row; all zeros for rows that only fill the batch.
          shape: the shape of the batch's rows.
        """
        return {name: np.stack([record[name] for record in records]) for name in records[0]}

    def params_for(self, params: Params, state: State, index: Array) -> Params:
        """The params that answer task `index`, for methods that know the task at inference; pure.

        Evaluation asks for them, also for tasks not learned yet where those are scored. Shapes are those of `params`.
        """
        return params

    def opening(self, index: int) -> Sequence[int]:
        """Token ids that stand before every prompt of task `index`: soft tokens, see `jaxcl.models.soft_tokens`."""
        return ()

    @property
    def longest_opening(self) -> int:
        """Tokens of the longest `opening`."""
        return max(len(self.opening(index)) for index in range(self.num_tasks))

    def measurements(self, before: Params, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """What `prepare` and `consolidate` compute of one batch, by name; pure. `jaxcl plan` compiles each.

        `before` are the params before the task, `params` those after it.
        """
        return {}

    def tables(self, state: State) -> dict[str, Array]:
        """Arrays worth a picture in the report: importance, masks, selected heads."""
        return {}
