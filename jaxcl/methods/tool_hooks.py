"""What tools ask of a method. Training asks for none of it, and a new method can leave all of it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from jaxcl.models.batch import Batch


class Exact(NamedTuple):
    """A method that stores its signals without loss.

    Attributes:
      method: the method with options under which nothing is lost.
      read: `read(params, batch, key)` reads what it would store at the places that `batch.teacher` names; pure.
    """

    method: Any
    read: Callable[[PyTree, Batch, Array], dict[str, Array]]


class ToolHooks:
    """Hooks for `jaxcl plan`, `jaxcl importance`, `jaxcl teacher`, reports and private training.

    Attributes:
      loop_trips: trip count that `jaxcl plan` assumes for a loop of the step whose length depends on the batch.
    """

    loop_trips: int = 1

    @property
    def couples_examples(self) -> bool:
        """Whether the loss of an example depends on the others of its batch: private training refuses that."""
        return False

    def tables(self, state: PyTree) -> dict[str, Array]:
        """Arrays worth a picture in the report: importance, masks, selected heads; pure."""
        return {}

    def measurements(self, before: PyTree, params: PyTree, state: PyTree, batch: Batch, key: Array) -> dict[str, Any]:
        """What `prepare` and `consolidate` compute of one batch, by name; pure. `jaxcl plan` compiles each.

        Args:
          before: params before the task.
          params: params after it.
          state: the method's state.
          batch: token rows.
          key: a random key.
        """
        return {}

    @classmethod
    def without_training(cls, options: Any) -> tuple[Any, str]:
        """How `jaxcl importance` measures `tables` on a model that is not trained between `prepare` and `consolidate`.

        Returns:
          The options to measure with, and a line about what cannot be measured that way; empty if all can.
        """
        return options, ""

    def exact(self) -> Exact | None:
        """The method with a store that loses nothing, for `jaxcl teacher`; `None` if its own store loses nothing."""
        return None
