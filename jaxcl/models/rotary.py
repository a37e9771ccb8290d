"""Rotary position embedding (arXiv 2104.09864) and the rules that stretch it to longer texts."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxcl.schema import Schema


class RopeScaling(Schema):
    """How the rotation frequencies of a model trained on short texts are lowered for long ones."""

    type: Literal["llama3", "linear"] = Field(
        description="linear: all frequencies divided by `factor`; llama3: only the low ones, with a smooth transition"
    )
    factor: float = Field(ge=1, description="by how much low frequencies are divided")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: wavelengths above original_max_length / this scale")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: wavelengths below original_max_length / this stay")
    original_max_length: int = Field(8192, gt=0, description="llama3: window of the model before it was stretched")


class Rotary(NamedTuple):
    """Cosine and sine of each position's angles, float32."""

    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " half"]:
    """Angle per position of each pair of coordinates, float32.

    `theta^(-2i / head_dim)`, lowered by `scaling`. The llama3 rule divides frequencies whose wavelength exceeds
    `original_max_length / low_freq_factor` by `factor`, keeps those whose wavelength is below
    `original_max_length / high_freq_factor`, and interpolates between.

    Examples:
      >>> frequencies(4, 10000.0, None).tolist()
      [1.0, 0.009999999776482582]
    """
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain.astype(np.float32)
    lowered = plain / scaling.factor
    if scaling.type == "linear":
        return lowered.astype(np.float32)
    turns = scaling.original_max_length * plain / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (smooth * plain + (1 - smooth) * lowered).astype(np.float32)


def rotary(positions: Int[Array, "batch length"], freqs: Float[np.ndarray, " half"]) -> Rotary:
    """Tables for `rotate`. In float32: bfloat16 would round position 257 to 256."""
    angles = positions[..., None].astype(jnp.float32) * freqs
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "batch length heads head_dim"], tables: Rotary) -> Float[Array, "..."]:
    """Rotates coordinates `i` and `i + head_dim / 2` of each head by the position's angle; dtype of `x`.

    This pairing is that of Hugging Face checkpoints; the paper's (and GGUF's) pairs `2i` with `2i + 1`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[:, :, None], tables.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
