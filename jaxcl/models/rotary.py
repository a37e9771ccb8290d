"""Rotary position embedding (arXiv 2104.09864) and the rules that stretch it to longer texts."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxcl.schema import Schema


class RopeScaling(Schema):
    """How the rotation frequencies of a model trained on short texts are lowered for long ones."""

    type: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = Field(
        description="linear: all frequencies divided by `factor`; llama3: only the low ones, with a smooth transition; "
        "yarn: likewise by number of turns; dynamic: by the length of each row; longrope: each by a number of its own"
    )
    factor: float = Field(1.0, ge=1, description="by how much low frequencies are divided; longrope: not used")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: wavelengths above original_max_length / this scale")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: wavelengths below original_max_length / this stay")
    original_max_length: int = Field(
        8192, gt=0, description="window of the model before it was stretched, in tokens; linear: not used"
    )
    beta_fast: float = Field(32.0, gt=0, description="yarn: pairs that turn more often than this in the window stay")
    beta_slow: float = Field(1.0, gt=0, description="yarn: pairs that turn less often than this scale")
    truncate: bool = Field(True, description="yarn: round the transition's ends to whole pairs")
    attention_factor: float = Field(1.0, gt=0, description="yarn, longrope: factor on rotated queries and keys")
    short_factors: tuple[float, ...] = Field(
        (), description="longrope: divisor of each frequency in rows of at most original_max_length tokens"
    )
    long_factors: tuple[float, ...] = Field((), description="longrope: the same in longer rows")

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.type == "longrope" and not (self.short_factors and len(self.short_factors) == len(self.long_factors)):
            raise ValueError("longrope needs short_factors and long_factors, one number for each pair of coordinates")
        return self


class Rotary(NamedTuple):
    """Cosine and sine of each position's angles, float32."""

    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]


def frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " half"]:
    """Angle per position of each pair of coordinates, float32.

    `theta^(-2i / width)`, lowered by `scaling`. The llama3 rule divides frequencies whose wavelength exceeds
    `original_max_length / low_freq_factor` by `factor`, keeps those whose wavelength is below
    `original_max_length / high_freq_factor`, and interpolates between. YaRN (arXiv 2309.00071, section 3.2) does so
    between pairs that turn `beta_slow` and `beta_fast` times in the original window. The rules that depend on the
    length of a row are those of short rows here; see `rotary`.

    Args:
      width: coordinates that are rotated; even.
      theta: base.
      scaling: how they are lowered.

    Examples:
      >>> frequencies(4, 10000.0, None).tolist()
      [1.0, 0.009999999776482582]
    """
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None or scaling.type == "dynamic":
        return plain.astype(np.float32)
    if scaling.type == "longrope":
        return (plain / np.asarray(scaling.short_factors)).astype(np.float32)
    lowered = plain / scaling.factor
    if scaling.type == "linear":
        return lowered.astype(np.float32)
    if scaling.type == "yarn":
        kept = 1 - _ramp(width, theta, scaling)
    else:
        turns = scaling.original_max_length * plain / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
    return (kept * plain + (1 - kept) * lowered).astype(np.float32)


def _ramp(width: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """YaRN's transition: 0 for pairs that stay, 1 for pairs that are lowered."""

    def pair(turns: float) -> float:
        """The pair, as a fraction, that turns so often within the original window."""
        return width * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0.0, 1.0)


def rotary(
    positions: Int[Array, "batch length"], width: int, theta: float, scaling: RopeScaling | None = None
) -> Rotary:
    """Tables for `rotate`. In float32: bfloat16 would round position 257 to 256.

    `dynamic` and `longrope` depend on how long a row is, which is its own largest position: transformers takes the
    longest row of a batch. While a text is generated, keys keep the rotation that they had when they were cached.

    Args:
      positions: position of each token within its text.
      width: coordinates of a head that are rotated; even.
      theta: base of the frequencies.
      scaling: how they are lowered.
    """
    freqs = frequencies(width, theta, scaling)
    if scaling is not None and scaling.type in ("dynamic", "longrope"):
        angles = positions[..., None].astype(jnp.float32) * _by_row(positions, width, theta, scaling)[:, None]
    else:
        angles = positions[..., None].astype(jnp.float32) * freqs
    tables = Rotary(jnp.cos(angles), jnp.sin(angles))
    if scaling is None or scaling.attention_factor == 1.0:
        return tables
    return Rotary(tables.cos * scaling.attention_factor, tables.sin * scaling.attention_factor)


def _by_row(
    positions: Int[Array, "batch length"], width: int, theta: float, scaling: RopeScaling
) -> Float[Array, "batch half"]:
    """Frequencies that follow from the length of each row."""
    length = (jnp.max(positions, axis=1, keepdims=True) + 1).astype(jnp.float32)
    original = scaling.original_max_length
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    if scaling.type == "longrope":
        short, long = ((theta**-exponents / np.asarray(f)) for f in (scaling.short_factors, scaling.long_factors))
        return jnp.where(length > original, long.astype(np.float32), short.astype(np.float32))
    stretch = scaling.factor * jnp.maximum(length, original) / original - (scaling.factor - 1)
    base = theta * stretch ** (width / (width - 2))
    return base ** -exponents.astype(np.float32)


def unrotated(like: Rotary) -> Rotary:
    """Tables that rotate nothing, of the shape of others."""
    return Rotary(jnp.ones_like(like.cos), jnp.zeros_like(like.sin))


def rotate(x: Float[Array, "batch length heads head_dim"], tables: Rotary) -> Float[Array, "..."]:
    """Rotates coordinates `i` and `i + width / 2` of each head by the position's angle; dtype of `x`.

    `width`, twice that of the tables, may be less than `head_dim`: the other coordinates stay. This pairing is that of
    Hugging Face checkpoints; the paper's (and GGUF's) pairs `2i` with `2i + 1`.
    """
    width = 2 * tables.cos.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], tables), x[..., width:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[:, :, None], tables.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
