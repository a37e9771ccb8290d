"""What is stored of selected heads with remembered rows, and how a layer's own is compared with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxcl.functional.attention_distillation import AttentionRows, AttentionTeacher, attention_divergence, write_rows
from jaxcl.functional.attention_rows import AttentionView, CodedRows, encode_rows
from jaxcl.functional.head_values import ValueTeacher, value_divergence, write_values
from jaxcl.functional.modalities import PartWeights
from jaxcl.methods.base import Stored
from jaxcl.models.network import Network


class AttentionStore(Protocol):
    """A way to store what selected heads do at some queries."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """See `Method.stored`."""
        ...

    def empty(self, network: Network, rows: int, selected: int, queries: int, length: int) -> PyTree:
        """The arrays, before anything is written.

        Args:
          network: the network.
          rows: number of rows.
          selected: number of heads.
          queries: number of queries.
          length: tokens of a row.
        """
        ...

    def write(self, view: AttentionView, arrays: PyTree, heads: Array, queries: Array) -> PyTree:
        """`arrays` with what this layer's heads do.

        Args:
          view: the layer's attention.
          arrays: as from `empty`.
          heads: which of this layer's heads each selected one is, -1 for those of other layers.
          queries: query positions, -1 for none.
        """
        ...

    def named(self, arrays: PyTree) -> dict[str, Array]:
        """Arrays by the names of `stored`."""
        ...

    def divergence(
        self, view: AttentionView, teacher: Mapping[str, Array], heads: Array, modality: Array | None
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        """Each example's mean over this layer's heads, 0 if it has none, and whether it has any.

        Args:
          view: the layer's attention.
          teacher: the named arrays, and `queries`.
          heads: see `write`.
          modality: number of each position's modality, `None` for models that do not see.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RowStore:
    """Attention rows, compared by KL divergence.

    Attributes:
      coded: in 8 bits, see `encode_rows`; else float32.
      parts: weights of the parts into which a divergence falls by modality; `None`: all are 1.
    """

    coded: bool
    parts: PartWeights | None = None

    @property
    def stored(self) -> Mapping[str, Stored]:
        """See `AttentionStore`."""
        rows = {"rows": Stored((None, "queries", "length"))}
        return rows | {"largest": Stored((None, "queries"))} if self.coded else rows

    def empty(self, network: Network, rows: int, selected: int, queries: int, length: int) -> AttentionRows:
        """See `AttentionStore`."""
        zeros = jnp.zeros((rows, selected, queries, length))
        return encode_rows(zeros) if self.coded else zeros

    def write(self, view: AttentionView, arrays: AttentionRows, heads: Array, queries: Array) -> AttentionRows:
        """See `AttentionStore`."""
        return write_rows(view, AttentionTeacher(arrays, heads, queries))

    def named(self, arrays: AttentionRows) -> dict[str, Array]:
        """See `AttentionStore`."""
        return {"rows": arrays.codes, "largest": arrays.largest} if isinstance(arrays, CodedRows) else {"rows": arrays}

    def divergence(
        self, view: AttentionView, teacher: Mapping[str, Array], heads: Array, modality: Array | None
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        """See `AttentionStore`."""
        rows = CodedRows(teacher["rows"], teacher["largest"]) if "largest" in teacher else teacher["rows"]
        return attention_divergence(view, AttentionTeacher(rows, heads, teacher["queries"]), modality, self.parts)


@dataclasses.dataclass(frozen=True)
class ValueStore:
    """What heads give, compared by relative squared distance.

    Attributes:
      exact: float32; else the compute dtype.
    """

    exact: bool

    @property
    def stored(self) -> Mapping[str, Stored]:
        """See `AttentionStore`."""
        return {"values": Stored((None, "queries"))}

    def empty(self, network: Network, rows: int, selected: int, queries: int, length: int) -> Array:
        """See `AttentionStore`."""
        dtype = jnp.dtype("float32") if self.exact else network.config.compute.activation_dtype
        return jnp.zeros((rows, selected, queries, network.head_dim), dtype)

    def write(self, view: AttentionView, arrays: Array, heads: Array, queries: Array) -> Array:
        """See `AttentionStore`."""
        return write_values(view, ValueTeacher(arrays, heads, queries))

    def named(self, arrays: Array) -> dict[str, Array]:
        """See `AttentionStore`."""
        return {"values": arrays}

    def divergence(
        self, view: AttentionView, teacher: Mapping[str, Array], heads: Array, modality: Array | None
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        """See `AttentionStore`."""
        return value_divergence(view, ValueTeacher(teacher["values"], heads, teacher["queries"]))


__all__ = ["AttentionStore", "RowStore", "ValueStore"]
