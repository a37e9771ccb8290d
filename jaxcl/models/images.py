"""The images of a batch, and where their states go in its rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcl.models.axes import constrain

NO_IMAGE = -1
"""Entry of `Images.index` for a position that is not an image token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """Images (or the tiles of larger ones) that belong to the rows of a batch.

    All rows have the same number of images, so that shapes stay few; a row with fewer is filled up with anything, since
    only what `index` points at is read.

    Attributes:
      pixels: normalised pixels, float32; or raw ones, uint8, which the model normalises.
      index: for each position of the row, the number of its image token among those of all images of the row, image
        after image; `NO_IMAGE` where the position is not an image token. int32.
      seen: which patches hold a part of an image; `None`: all of them.
    """

    pixels: Float[Array, "batch images height width 3"]
    index: Int[Array, "batch length"]
    seen: Bool[Array, "batch images rows columns"] | None = None

    def place(
        self, words: Float[Array, "batch length embed"], states: Float[Array, "batch tokens embed"]
    ) -> Float[Array, "batch length embed"]:
        """`words`, with the states of images where `index` says.

        Args:
          words: vectors of all tokens.
          states: those of the image tokens of each row, in the order of the images.

        Examples:
          >>> images = Images(jnp.zeros((1, 1, 2, 2, 3)), jnp.array([[-1, 1, 0]]))
          >>> images.place(jnp.zeros((1, 3, 1)), jnp.array([[[5.0], [7.0]]])).ravel().tolist()
          [0.0, 7.0, 5.0]
        """
        is_image = (self.index != NO_IMAGE)[..., None]
        placed = jnp.take_along_axis(states, jnp.maximum(self.index, 0)[..., None], axis=1)
        words, placed = (constrain(part, "batch", "length", "embed") for part in (words, placed))
        return jnp.where(is_image, placed.astype(words.dtype), words)
