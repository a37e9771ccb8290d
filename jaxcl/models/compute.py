"""How a network computes, as opposed to what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from jaxcl.schema import Schema

Kernel = Literal["auto", "xla", "cudnn", "splash"]
Remat = Literal["none", "full", "dots"]


class Compute(Schema):
    """Precision, rematerialisation and attention kernel. Changing it never changes the parameter tree."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of activations and matrix products; norms, softmax and logits stay float32"
    )
    param_dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision in which params are held")
    remat: Remat = Field(
        "none",
        description="what the backward pass recomputes in each layer: none: nothing; "
        "dots: everything but matrix products; full: the whole layer",
    )
    kernel: Kernel = Field(
        "auto",
        description="attention kernel; auto: splash (Pallas) on TPU, cudnn on GPU, xla elsewhere, "
        "chosen when the step is traced",
    )

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    @property
    def parameter_dtype(self) -> jnp.dtype:
        """The dtype of parameters."""
        return jnp.dtype(self.param_dtype)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps only the arguments and does the rest again.

    For element-wise maths, which is cheaper to do twice than to write to memory and read back. Where both passes
    are in the same program the compiler may merge the two computations: it then knows better.
    """
    return jax.checkpoint(function, prevent_cse=False)
