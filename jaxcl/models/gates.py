"""Virtual gates on the units of each layer: never trained, only differentiated or set."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcl.models.compute import recomputed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """Factors on head outputs, feed-forward intermediate activations and feed-forward outputs.

    Each array may have a batch axis after the layer axis: every example then has its own copy, and the gradient of
    a summed loss with respect to it is the per-example gradient (DAS, section 3.1: one backward pass, no loop).

    Attributes:
      heads: factor on each head's output, before the output projection.
      intermediate: factor on each intermediate unit, after the activation (SwiGLU: after gate times up). DAS's
        authors have it before the activation, as `EarlyGates` do. The units of experts come one expert after another.
      output: factor on each unit of the feed-forward output, before the residual sum.
    """

    heads: Float[Array, "layers ... heads"]
    intermediate: Float[Array, "layers ... mlp"]
    output: Float[Array, "layers ... embed"]

    @classmethod
    def ones(cls, *, layers: int, heads: int, intermediate: int, output: int, batch: int | None = None) -> Gates:
        """Gates that change nothing, float32.

        Args:
          layers: number of layers.
          heads: attention heads per layer.
          intermediate: feed-forward intermediate units per layer.
          output: feed-forward output units per layer.
          batch: number of examples, for a copy of the gates each; `None` for one copy shared by all.

        Examples:
          >>> Gates.ones(layers=3, heads=2, intermediate=6, output=4, batch=5).heads.shape
          (3, 5, 2)
        """
        lead = (layers,) if batch is None else (layers, batch)
        return cls(jnp.ones((*lead, heads)), jnp.ones((*lead, intermediate)), jnp.ones((*lead, output)))

    def before_activation(self, x: Float[Array, "batch length mlp"]) -> Float[Array, "batch length mlp"]:
        """What the activation reads: `x` itself."""
        return x

    @property
    def after_activation(self) -> Float[Array, "*batch mlp"] | None:
        """A layer's factor on what the activation gave."""
        return self.intermediate

    @property
    def decoder(self) -> Gates:
        """The gates of the layers that read tokens: all."""
        return self

    @property
    def vision(self) -> VisionGates | None:
        """The gates of tower and connector; none."""
        return None


class VisionGates(NamedTuple):
    """Gates of what makes states of images.

    Attributes:
      tower: gates of the tower's layers.
      connector: factor on each unit of the connector's output; its axis of layers has size 1.
    """

    tower: Gates
    connector: Float[Array, "1 ... embed"]

    def per_image(self, images: int) -> VisionGates:
        """Gates with a batch axis, once for each of the `images` of a row; others as they are."""

        def repeat(factor: Array) -> Array:
            return factor if factor.ndim == 2 else jnp.repeat(factor, images, axis=1)

        return jax.tree.map(repeat, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeeingGates(Gates):
    """Gates of a model that sees: on the units of its tower and its connector as well.

    Attributes:
      tower_heads: as `heads`, of the tower's layers.
      tower_intermediate: as `intermediate`, of the tower's layers.
      tower_output: as `output`, of the tower's layers.
      connector_output: factor on each unit of the states of images that the decoder reads. One layer.
    """

    tower_heads: Float[Array, "tower_layers ... heads"]
    tower_intermediate: Float[Array, "tower_layers ... mlp"]
    tower_output: Float[Array, "tower_layers ... embed"]
    connector_output: Float[Array, "1 ... embed"]

    @classmethod
    def around(cls, decoder: Gates, vision: VisionGates) -> SeeingGates:
        """Gates of the parts, put together.

        Args:
          decoder: of the layers that read tokens.
          vision: of tower and connector.
        """
        tower = {f"tower_{kind}": factor for kind, factor in vars(vision.tower).items()}
        return cls(**vars(decoder), **tower, connector_output=vision.connector)

    @property
    def decoder(self) -> Gates:
        """The gates of the layers that read tokens."""
        return Gates(self.heads, self.intermediate, self.output)

    @property
    def vision(self) -> VisionGates | None:
        """The gates of tower and connector."""
        return VisionGates(Gates(self.tower_heads, self.tower_intermediate, self.tower_output), self.connector_output)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EarlyGates(Gates):
    """Gates whose factor on intermediate units comes before the activation, as DAS's authors have it.

    It multiplies what the activation reads; in a decoder with SwiGLU that is the projection `gate`. All else is as with
    `Gates`, and the two can take each other's place.

    Examples:
      >>> EarlyGates(**vars(Gates.ones(layers=3, heads=2, intermediate=6, output=4))).intermediate.shape
      (3, 6)
    """

    def before_activation(self, x: Float[Array, "batch length mlp"]) -> Float[Array, "batch length mlp"]:
        """What the activation reads: `x` times a layer's factor."""
        return gate(x, self.intermediate, axis=2)

    @property
    def after_activation(self) -> Float[Array, "*batch mlp"] | None:
        """None."""
        return None


def gate(x: Float[Array, "batch length ..."], factor: Float[Array, "*batch units"] | None, axis: int) -> Array:
    """`x` times `factor` along dimension `axis` (and along the batch, if `factor` has one); `x` if it is `None`."""
    if factor is None:
        return x
    shape = [1] * x.ndim
    shape[axis] = factor.shape[-1]
    if factor.ndim == 2:
        shape[0] = factor.shape[0]
    factor = factor.reshape(shape)
    return x * factor if x.dtype == factor.dtype else _product_in_float32(x, factor)


@recomputed
def _product_in_float32(x: Array, factor: Array) -> Array:
    """In float32, so that the gradient of a factor, which is a sum over tokens, is summed in float32."""
    return (x.astype(factor.dtype) * factor).astype(x.dtype)
