"""What one step sees: a batch of token rows and where the loss applies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from jaxcl.models.images import NO_IMAGE, Images

IGNORED = -100
"""Label of a token that is not predicted, as transformers has it."""


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
      teacher: what a method stored with remembered rows, leading axis `batch`; `None` for rows of the current task.
        Its names, shapes and dtypes are those that the method's `signals` documents.
      types: token type of each position, int32, for encoders that have them; `None` means 0 everywhere.
      images: what the rows show in addition to text, for decoders that see (`LlamaConfig.vision`); `None` for text
        alone.
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
    images: Images | None = None
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

    @classmethod
    def from_labels(
        cls,
        input_ids: Int[ArrayLike, "batch length"],
        attention_mask: ArrayLike | None = None,
        labels: Int[ArrayLike, "batch length"] | None = None,
        *,
        causal: bool,
        token_type_ids: Int[ArrayLike, "batch length"] | None = None,
    ) -> Batch:
        """A batch from what Hugging Face's tokenizers and data collators give; can be jitted.

        Labels lie where their tokens are: the shift to the position that predicts them is made here. Padding may be on
        the left, on the right or in between; it is moved to the right, where methods expect it, so the states of a row
        that was padded on the left come out further left than its tokens went in. Positions count from 0 at a row's
        first real token. Padding is never scored, whatever its label, and nothing is predicted from it: of a causal
        row, the first real token has no prediction. (transformers scores every label that is not -100, those of padding
        and those predicted from padding included.)

        Args:
          input_ids: token ids.
          attention_mask: `[batch, length]`, 0 for padding; default: no padding.
          labels: the token id expected at each position, -100 where there is none; default, for causal models only:
            every real token.
          causal: whether a token is predicted from those before it (`Network.causal`) or, in masked language modelling,
            from all others.
          token_type_ids: for encoders that have types.

        Returns:
          A batch of `task` 0 with examples 0, 1, ... (-1 for rows of padding), scored at every position.

        Raises:
          ValueError: shapes or dtypes that do not fit, or no labels for a masked model.

        Examples:
          >>> batch = Batch.from_labels(jnp.array([[0, 7, 8, 9]]), jnp.array([[0, 1, 1, 1]]), causal=True)
          >>> batch.tokens.tolist(), batch.targets.tolist(), batch.weights.tolist()
          ([[7, 8, 9, 0]], [[8, 9, 0, 0]], [[1.0, 1.0, 0.0, 0.0]])
        """
        ids = jnp.asarray(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids: expected shape [batch, length], got {list(ids.shape)}")
        if labels is None and not causal:
            raise ValueError("labels: a masked model needs them: -100 but where a token is to be predicted")
        real = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        given = {"input_ids": ids, "labels": ids if labels is None else jnp.asarray(labels)}
        given |= {} if token_type_ids is None else {"token_type_ids": jnp.asarray(token_type_ids)}
        for name, array in {**given, "attention_mask": real}.items():
            if array.shape != ids.shape:
                raise ValueError(f"{name}: expected the shape of input_ids, {list(ids.shape)}, got {list(array.shape)}")
            if name in given and not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name}: expected integers, got {array.dtype}")
        targets, scored = given["labels"], real & (given["labels"] != IGNORED)
        if causal:
            targets, scored = (jnp.pad(array[:, 1:], ((0, 0), (0, 1))) for array in (targets, scored))
        scored = scored & real
        order = jnp.argsort(~real, axis=1, stable=True)

        def moved(array: Array, dtype: Any = jnp.int32) -> Array:
            return jnp.take_along_axis(array, order, axis=1).astype(dtype)

        places = jnp.arange(ids.shape[1]) - jnp.argmax(real, axis=1)[:, None]
        rows = jnp.arange(len(ids), dtype=jnp.int32)
        return cls(
            tokens=moved(jnp.where(real, ids, 0)),
            segments=moved(real),
            positions=moved(jnp.where(real, places, 0)),
            predict=None,
            targets=moved(jnp.where(scored, targets, 0)),
            weights=moved(scored, jnp.float32),
            task=jnp.zeros_like(rows),
            example=jnp.where(jnp.any(real, axis=1), rows, -1),
            types=None if token_type_ids is None else moved(given["token_type_ids"]),
            packed=False,
        )

    @property
    def size(self) -> int:
        """Number of rows, fillers included."""
        return self.tokens.shape[0]

    @property
    def modality(self) -> Int[Array, "batch length"] | None:
        """Number of each position's modality, 0 for words and 1 for images; `None` for text alone."""
        return None if self.images is None else (self.images.index != NO_IMAGE).astype(jnp.int32)

    def keys(self, key: Array) -> Key[Array, " batch"]:
        """One random key per row, from `key` and the row's task and example alone."""
        return jax.vmap(lambda task, example: jax.random.fold_in(jax.random.fold_in(key, task), example))(
            self.task.astype("uint32"), self.example.astype("uint32")
        )
