"""From images to states that a decoder reads: a SigLIP tower (arXiv 2303.15343) and a connector with pixel shuffle.

The tower is a ViT with norms before the branches, biases, and no class token. Its layers are stacked and scanned like
the decoder's, along an axis of their own.

Axis names: batch, images, height, width (pixels), rows, columns, patches, heads, head_dim, embed, mlp, tower_layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxcl.functional.soft_masks import CONNECTOR, TOWER, Unit
from jaxcl.models.activation import ACTIVATIONS
from jaxcl.models.attention import attention
from jaxcl.models.axes import constrain
from jaxcl.models.compute import Compute, recomputed
from jaxcl.models.gates import Gates, VisionGates, gate
from jaxcl.models.images import Images
from jaxcl.models.layers import Embedding, LayerNorm, Linear
from jaxcl.models.lora import LoraConfig, adapter_for
from jaxcl.models.product import rematerialised
from jaxcl.models.vision_config import VisionConfig

_ALMOST_ONE = np.float32(1.0 - 1e-6)


class TowerBlock(nnx.Module):
    """`x + attention(norm x)`, then `x + mlp(norm x)`; every patch sees all patches of its image."""

    def __init__(self, config: VisionConfig, lora: LoraConfig | None, compute: Compute, rngs: nnx.Rngs) -> None:
        c = config
        layers = c.num_layers
        embed, mlp = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        linear = partial(Linear, rngs, bias=True, std=c.init_std, compute=compute, layers=layers)
        norm = partial(LayerNorm, c.hidden_size, eps=c.layer_norm_eps, compute=compute, layers=layers)
        self.attention_norm = norm()
        own = partial(adapter_for, lora)
        self.query = linear(embed, heads, unit="heads", lora=own("tower_query"))
        self.key = linear(embed, heads, unit="heads", lora=own("tower_key"))
        self.value = linear(embed, heads, unit="heads", lora=own("tower_value"))
        self.out = linear(heads, embed, unit="heads", lora=own("tower_out"))
        self.mlp_norm = norm()
        self.up = linear(embed, mlp, unit="intermediate", lora=own("tower_up"))
        self.down = linear(mlp, embed, unit="output", lora=own("tower_down"))
        self.activation, self.kernel, self.scale = c.activation, compute.kernel, c.head_dim**-0.5

    def __call__(
        self,
        x: Float[Array, "images patches embed"],
        seen: Bool[Array, "images patches"] | None,
        gates: Gates | None = None,
    ) -> Float[Array, "images patches embed"]:
        """One layer; patches that are not `seen` are read by none (`None`: all are seen)."""
        normed = self.attention_norm(x)
        parts = (self.query(normed), self.key(normed), self.value(normed))
        query, key, value = (constrain(part, "batch", "length", "heads", "head_dim") for part in parts)
        with jax.named_scope("attention"):
            if seen is None:
                ones = jnp.ones(x.shape[:2], jnp.int32)
                run = partial(attention, query, key, value, segments=ones, causal=False, packed=False)
                attended = run(scale=self.scale, kernel=self.kernel)
            else:
                mask = seen[:, None, None, :]
                attended = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=self.scale)
        x = x + self.out(attended if gates is None else gate(attended, gates.heads, axis=2))

        @recomputed
        def rest(up: Array, factor: Array | None) -> Array:
            return self.down(gate(ACTIVATIONS[self.activation](up), factor, axis=2))

        with jax.named_scope("mlp"):
            up = constrain(self.up(self.mlp_norm(x)), "batch", "length", "mlp")
            update = rest(up, None if gates is None else gates.intermediate)
            x = x + (update if gates is None else gate(update, gates.output, axis=2))
        return constrain(x, "batch", "length", "embed")


class Tower(nnx.Module):
    """Patches to vectors, positions, layers, a norm."""

    def __init__(self, config: VisionConfig, lora: LoraConfig | None, compute: Compute, rngs: nnx.Rngs) -> None:
        c = config
        patch = {"height": c.patch_size, "width": c.patch_size, "channels": 3}
        sizes, axes = {"embed": c.hidden_size}, (None, None, None, "embed")
        self.patch = Linear(rngs, patch, sizes, bias=True, std=c.init_std, compute=compute, kernel_axes=axes)
        table = c.side**2, c.hidden_size
        self.position = Embedding(rngs, *table, axes=(None, "embed"), std=c.init_std, compute=compute)
        self.blocks = TowerBlock(c, lora, compute, rngs)
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps, compute=compute)
        self.config, self.remat = c, compute.remat
        _apart(self.blocks)

    def __call__(
        self,
        pixels: Float[Array, "images height width 3"],
        seen: Bool[Array, "images rows columns"] | None,
        gates: Gates | None = None,
    ) -> Float[Array, "images rows columns embed"]:
        """States of all patches, compute dtype; what comes out at patches that are not seen is finite."""
        count, height, width, _ = pixels.shape
        side = self.config.patch_size
        rows, columns = height // side, width // side
        patches = pixels[:, : rows * side, : columns * side].reshape(count, rows, side, columns, side, 3)
        x = self.patch(patches.transpose(0, 1, 3, 2, 4, 5))
        x = x + self.position(position_ids(rows, columns, self.config.side, seen))
        x = constrain(x.reshape(count, rows * columns, -1), "batch", "length", "embed")
        own = None if seen is None else seen.reshape(count, rows * columns)
        graph, state = nnx.split(self.blocks)

        def body(x: Array, layer: tuple[Any, Gates | None]) -> tuple[Array, None]:
            return nnx.merge(graph, layer[0])(x, own, layer[1]), None

        x, _ = jax.lax.scan(rematerialised(body, self.remat), x, (state, gates))
        return self.norm(x).reshape(count, rows, columns, -1)


class Vision(nnx.Module):
    """Tower and connector."""

    def __init__(
        self, config: VisionConfig, embed: int, lora: LoraConfig | None, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        c = config
        self.tower = Tower(c, lora, compute, rngs)
        inputs, outputs = {"features": c.hidden_size * c.shuffle**2}, {"embed": embed}
        self.connector = Linear(
            rngs,
            inputs,
            outputs,
            bias=False,
            std=c.init_std,
            compute=compute,
            kernel_axes=(None, "embed"),
            lora=adapter_for(lora, "connector"),
        )
        for param in (self.connector.kernel, self.connector.lora_b):
            if param is not None:
                param.set_metadata(unit=Unit(f"{CONNECTOR}output", 1, layer=0))
        self.config = c

    @jax.named_scope("vision")
    def __call__(self, images: Images, gates: VisionGates | None = None) -> Float[Array, "batch tokens embed"]:
        """The states of each row's image tokens, image after image.

        Args:
          images: those of a batch.
          gates: factors on units.

        Raises:
          ValueError: patches do not make whole squares that are shuffled.
        """
        batch, count, height, width, _ = images.pixels.shape
        patch, shuffle = self.config.patch_size, self.config.shuffle
        if height // patch % shuffle or width // patch % shuffle:
            raise ValueError(
                f"pixels: expected sides of {patch} pixels times a multiple of {shuffle}, got {height} and {width}"
            )
        pixels = self._normalised(images.pixels).reshape(batch * count, height, width, 3)
        seen = None if images.seen is None else images.seen.reshape(batch * count, *images.seen.shape[2:])
        own = None if gates is None else gates.per_image(count)
        states = self.tower(pixels, seen, None if own is None else own.tower)
        states = self.connector(pixel_shuffle(states, self.config.shuffle))
        states = states if own is None else gate(states, own.connector[0], axis=2)
        return constrain(states.reshape(batch, -1, states.shape[-1]), "batch", "length", "embed")

    def _normalised(self, pixels: Array) -> Array:
        if jnp.issubdtype(pixels.dtype, jnp.floating):
            return pixels
        mean, std = (jnp.array(one, jnp.float32) for one in (self.config.image_mean, self.config.image_std))
        return (pixels.astype(jnp.float32) * np.float32(1 / 255) - mean) / std


def position_ids(
    rows: int, columns: int, side: int, seen: Bool[Array, "images rows columns"] | None
) -> Int[Array, "*images rows columns"]:
    """Which row of the position table each patch reads: that of the same place in a full square image.

    An image of another shape is stretched over the square, along with its patches, and each reads the vector of the
    place that it comes to lie on. The square itself is only stretched onto itself, but for rounding.

    Args:
      rows: patches from top to bottom.
      columns: patches from left to right.
      side: patches along a side of the square.
      seen: which patches hold a part of the image, a rectangle at the top left; `None`: all.

    Returns:
      Indices, without the axis of images if `seen` is `None`; 0 for patches that are not seen.

    Examples:
      >>> position_ids(2, 2, 4, None).tolist()
      [[0, 2], [8, 10]]
    """
    # The numbers of torch, to the bit: boundaries are rounded once, coordinates are products of rounded factors.
    boundaries = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)

    def bucket(count: int, own: Array) -> Array:
        step = np.float32(1.0) / jnp.maximum(own, 1).astype(jnp.float32)
        places = jnp.minimum(jnp.arange(count, dtype=jnp.float32) * step[..., None], _ALMOST_ONE)
        return jnp.searchsorted(boundaries, places, side="right")

    if seen is None:
        down, across = bucket(rows, jnp.int32(rows)), bucket(columns, jnp.int32(columns))
    else:
        down, across = bucket(rows, jnp.sum(seen[:, :, 0], axis=1)), bucket(columns, jnp.sum(seen[:, 0], axis=1))
    ids = down[..., :, None] * side + across[..., None, :]
    return ids if seen is None else jnp.where(seen, ids, 0)


def pixel_shuffle(x: Float[Array, "images rows columns embed"], scale: int) -> Float[Array, "images tokens features"]:
    """Squares of `scale` by `scale` patches to one vector each: their vectors, one after another, row by row.

    Examples:
      >>> pixel_shuffle(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).tolist()
      [[[0.0, 1.0, 2.0, 3.0]]]
    """
    images, rows, columns, embed = x.shape
    x = x.reshape(images, rows // scale, scale, columns // scale, scale, embed).swapaxes(2, 3)
    return x.reshape(images, (rows // scale) * (columns // scale), scale * scale * embed)


def _apart(blocks: nnx.Module) -> None:
    """Says of the params of a tower's layers that they are stacked along their own axis and belong to its own units."""
    for _, node in nnx.iter_graph(blocks):
        if isinstance(node, nnx.Param):
            axes, unit = (node.get_metadata()[name] for name in ("axes", "unit"))
            node.set_metadata(axes=("tower_layers", *axes[1:]), unit=unit._replace(kind=TOWER + unit.kind))
