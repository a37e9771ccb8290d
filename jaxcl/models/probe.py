"""Looking into attention from outside: a probe reads queries and keys, a tap sees the probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Bool, Float, PyTree

from jaxcl.functional.attention_rows import AttentionView


@dataclasses.dataclass(frozen=True)
class Probe:
    """Computes something from each layer's queries and keys, while attention keeps its fast kernel.

    Attributes:
      function: from `AttentionView` and the layer's `inputs` to a pytree of arrays. It runs inside the scan, and
        is recomputed with the layer under rematerialisation. Results come back stacked along `layers`.
      inputs: pytree with leaves `[layers, ...]`.
    """

    function: Callable[[AttentionView, PyTree], PyTree]
    inputs: PyTree = None


@dataclasses.dataclass(frozen=True)
class Tap:
    """A function on each layer's attention probabilities, between the softmax and the product with the values.

    Attributes:
      function: from probabilities `[batch, heads, length, length]` float32, the mask `[batch, 1, length, length]`
        of real (query, key) pairs and the layer's `inputs` to probabilities. The identity with a gradient of its
        own is a typical one. Rows of padding hold something finite.
      inputs: pytree with leaves `[layers, ...]`.
    """

    function: Callable[[Float[Array, "batch heads query length"], Bool[Array, "batch 1 query length"], PyTree], Array]
    inputs: PyTree = None
