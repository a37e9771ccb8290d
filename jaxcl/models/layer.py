"""What every layer does around its attention, whatever the architecture: gates, noise, probe and tap."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcl.models.attention import attention, explicit_attention
from jaxcl.models.axes import constrain
from jaxcl.models.compute import Kernel
from jaxcl.models.gates import Gates, gate
from jaxcl.models.layers import derive, dropout
from jaxcl.models.mask import Window, visible
from jaxcl.models.probe import AttentionView, Probe, Tap
from jaxcl.models.rotary import Rotary


class LayerKind(NamedTuple):
    """What one layer has and another has not, scanned along with their params.

    Attributes:
      rotary: which of `Context.rotary` it uses; `None`: there is only one.
      windowed: whether it has the window; `None`: all have it, or none.
      first: whether it is the first one; `None`: the first is like the others.
      distances: vectors of distances between tokens, the same for each layer; `None`: attention reads none.
    """

    rotary: Int[Array, "..."] | None
    windowed: Bool[Array, "..."] | None
    first: Bool[Array, "..."] | None = None
    distances: Float[Array, "... places embed"] | None = None


class Context(NamedTuple):
    """What all layers need to know of the batch, computed once.

    Attributes:
      segments: document number of each position, 0 for padding.
      rotary: tables of the rotary embedding, `None` for learned positions. Where layers differ, one for each kind,
        with a leading axis, until `at` chooses.
      causal: whether later positions are hidden.
      packed: whether a row may hold several documents.
      scale: factor on the products of queries and keys.
      kernel: which attention kernel.
      window: how many tokens apart queries and keys may not be; `None`: no limit.
      cap: soft cap of the scaled products; `None`: none.
      windowed: whether the layer at hand has the window; `None`: all have it.
      first: whether the layer at hand is the first, where that one differs; see `LayerKind`.
      distances: see `LayerKind`.
    """

    segments: Int[Array, "batch length"]
    rotary: Rotary | None
    causal: bool
    packed: bool
    scale: float
    kernel: Kernel
    window: int | None = None
    cap: float | None = None
    windowed: Bool[Array, ""] | None = None
    first: Bool[Array, ""] | None = None
    distances: Float[Array, "places embed"] | None = None

    def at(self, kind: LayerKind | None) -> Context:
        """The context of one layer; its `kind` comes from `Network.blocks`."""
        if kind is None:
            return self
        rotary = self.rotary
        if kind.rotary is not None:
            rotary = jax.tree.map(lambda table: table[kind.rotary], rotary)
        return self._replace(**{**kind._asdict(), "rotary": rotary})

    @property
    def tables(self) -> Rotary:
        """The rotary tables of the layer at hand.

        Raises:
          ValueError: the model has none.
        """
        if self.rotary is None:
            raise ValueError("rotary: expected the tables of rotary positions, got None")
        return self.rotary

    @property
    def reach(self) -> Window:
        """The window of the layer at hand; where layers differ, a number that the program computes."""
        if self.window is None or self.windowed is None:
            return self.window
        return jnp.where(self.windowed, self.window, self.segments.shape[1])


@dataclasses.dataclass(frozen=True)
class Noise:
    """Dropout: its rates, and the key (or one key per row) that it draws from. Each place in a layer has a number."""

    key: Array
    hidden: float
    attention: float

    def drop(self, x: Array, place: int) -> Array:
        """Drops from hidden states."""
        return dropout(x, self.hidden, self._key(place)) if self.hidden > 0 else x

    def drop_attention(self, probs: Array) -> Array:
        """Drops from attention probabilities."""
        return dropout(probs, self.attention, self._key(0)) if self.attention > 0 else probs

    def _key(self, place: int) -> Array:
        return derive(lambda key: jax.random.fold_in(key, place), self.key)


class Block(Protocol):
    """The two halves of a layer, before and after attention. Generation puts its cache between them."""

    def project(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Array, Array]:
        """Queries `[batch, length, heads, head_dim]`, keys and values `[batch, length, kv_heads, head_dim]`."""
        ...

    def complete(
        self,
        x: Float[Array, "batch length embed"],
        attended: Float[Array, "batch length heads head_dim"],
        gates: Gates | None,
        noise: Noise | None,
    ) -> Float[Array, "batch length embed"]:
        """The layer's output from its input and what attention gave."""
        ...


@runtime_checkable
class RelativeBlock(Block, Protocol):
    """A block whose scores have a part that depends on how far apart queries and keys are."""

    def relative(self, query: Array, key: Array, context: Context) -> Float[Array, "batch heads length length"]:
        """That part, before scaling, from what `project` gave."""
        ...


def apply_block(
    block: Block,
    x: Float[Array, "batch length embed"],
    context: Context,
    *,
    gates: Gates | None = None,
    tap: Tap | None = None,
    probe: Probe | None = None,
    noise: Noise | None = None,
) -> tuple[Float[Array, "batch length embed"], Any]:
    """One layer. `gates`, `tap.inputs` and `probe.inputs` are those of this layer, without the layer axis.

    Returns:
      The layer's output, and the probe's (`None` without one).
    """
    with jax.named_scope("project"):
        query, key, value = block.project(x, context)
    query = constrain(query, "batch", "length", "heads", "head_dim")
    key = constrain(key, "batch", "length", "kv_heads", "head_dim")
    value = constrain(value, "batch", "length", "kv_heads", "head_dim")
    with jax.named_scope("attention"):
        relative = block.relative(query, key, context) if isinstance(block, RelativeBlock) else None
        attended = _attend(query, key, value, context, tap, noise, relative)
    attended = constrain(attended, "batch", "length", "heads", "head_dim")
    gated = attended if gates is None else gate(attended, gates.heads, axis=2)
    with jax.named_scope("complete"):
        x = constrain(block.complete(x, gated, gates, noise), "batch", "length", "embed")
    if probe is None:
        return x, None
    if relative is not None:
        query, key = _with_relative(query, key, relative)
    view = AttentionView(
        query, key, context.segments, context.causal, context.scale, context.reach, context.cap, attended
    )
    with jax.named_scope("probe"):
        return x, probe.function(view, probe.inputs)


def _with_relative(query: Array, key: Array, relative: Array) -> tuple[Array, Array]:
    """Queries and keys whose products include the relative part: as coordinates of a query, one for each key."""
    batch, length, heads, _ = key.shape
    one = jnp.broadcast_to(jnp.eye(length, dtype=key.dtype)[:, None], (batch, length, heads, length))
    own = relative.swapaxes(1, 2).astype(query.dtype)
    return jnp.concatenate([query, own], axis=-1), jnp.concatenate([key, one], axis=-1)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    context: Context,
    tap: Tap | None,
    noise: Noise | None,
    relative: Array | None,
) -> Array:
    drops = noise is not None and noise.attention > 0
    if tap is None and not drops and relative is None:
        return attention(
            query,
            key,
            value,
            segments=context.segments,
            causal=context.causal,
            scale=context.scale,
            kernel=context.kernel,
            packed=context.packed,
            window=context.window,
            windowed=context.windowed,
            cap=context.cap,
        )

    def transform(probs: Array) -> Array:
        if tap is not None:
            probs = tap.function(probs, visible(context.segments, context.causal, context.reach), tap.inputs)
        return probs if noise is None else noise.drop_attention(probs)

    return explicit_attention(
        query,
        key,
        value,
        segments=context.segments,
        causal=context.causal,
        scale=context.scale,
        packed=context.packed,
        window=context.reach,
        cap=context.cap,
        relative=relative,
        transform=transform,
    )
