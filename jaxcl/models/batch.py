"""What one step sees: a batch of token rows and where the loss applies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, the positions that are predicted, and the tokens expected there.

    The same type serves packed pre-training text, masked language modelling and instruction pairs; they differ
    only in `predict`, `targets` and `weights`. A row that exists only to fill the batch has all weights and all
    segments 0 and changes nothing.

    Attributes:
      tokens: token ids, int32.
      segments: 1-based document number within the row, 0 for padding, int32. A token attends only to tokens of its
        own segment.
      positions: position of each token within its segment, from 0, int32.
      predict: indices along `length` of the positions whose output is scored, int32; `None` scores all of them,
        and `targets` and `weights` then have shape `[batch, length]`.
      targets: token id expected at each scored position (for a causal model: the *next* token), int32.
      weights: 1 where the score counts, 0 for padding, float32.
      task: index of the task each row comes from, int32; for general rows, of a task that learns them.
      example: index of the row's example within its task's training set, int32 (for packed text the row's index;
        -1 for rows that only fill a batch).
      labels: class of each row, int32; only for end tasks.
      teacher: what a method stored with remembered rows (`Method.signals`), leading axis `batch`; `None` for
        rows of the current task.
      types: token type of each position, int32, for encoders that have them; `None` means 0 everywhere.
      packed: `False` promises that every row is at most one document followed by padding, which makes attention
        masks cheaper. Static.
      origin: `"task"` for rows of the current task, `"memory"` for remembered rows, `"general"` for general rows
        (`data.general`). Static: each origin compiles its own step.
      memory: remembered rows that are learned in the same step (`replay.mode: mix`); `None` for none.
    """

    tokens: Int[Array, "batch length"]
    segments: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    predict: Int[Array, "batch predict"] | None
    targets: Int[Array, "batch predict"]
    weights: Float[Array, "batch predict"]
    task: Int[Array, " batch"]
    example: Int[Array, " batch"]
    labels: Int[Array, " batch"] | None = None
    teacher: dict[str, Any] | None = None
    types: Int[Array, "batch length"] | None = None
    packed: bool = dataclasses.field(default=True, metadata={"static": True})
    origin: str = dataclasses.field(default="task", metadata={"static": True})
    memory: Batch | None = None

    @classmethod
    def abstract(cls, rows: int, length: int, predict: int | None, *, sharding: Any = None, **fields: Any) -> Batch:
        """A batch whose arrays are `jax.ShapeDtypeStruct`, for tracing and compiling without data.

        Args:
          rows: number of rows.
          length: tokens of a row.
          predict: scored positions of a row; `None` scores all.
          sharding: of every array.
          fields: values of further fields.
        """

        def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        whole, scored = (rows, length), (rows, length if predict is None else predict)
        # Where every position is scored, the data says so by leaving the list of positions out.
        positions = None if predict is None else array(*scored)
        tokens = array(*whole), array(*whole), array(*whole)
        return cls(
            *tokens, positions, array(*scored), array(*scored, dtype=jnp.float32), array(rows), array(rows), **fields
        )

    @property
    def size(self) -> int:
        """Number of rows, fillers included."""
        return self.tokens.shape[0]

    def keys(self, key: Array) -> Key[Array, " batch"]:
        """One random key per row, from `key` and the row's task and example alone."""
        return jax.vmap(lambda task, example: jax.random.fold_in(jax.random.fold_in(key, task), example))(
            self.task.astype("uint32"), self.example.astype("uint32")
        )
