"""Looking into attention from outside: a probe reads queries and keys, a tap sees the probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Bool, Float, PyTree

from jaxcl.functional.attention_rows import AttentionView


@dataclasses.dataclass(frozen=True)
class Probe:
    """Computes something from each layer's queries and keys, while attention keeps its fast kernel.

    What it computes comes back as `Hidden.probed`, also inside `jax.jit`. `attention_maps` for example gives all maps:

    >>> import jax
    >>> from jaxcl.functional import attention_maps
    >>> from jaxcl.models import Batch, LlamaConfig, Network
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2)
    >>> network = Network.create(config)
    >>> params = network.init(jax.random.key(0))
    >>> batch = Batch.from_labels(jax.numpy.ones((3, 5), int), causal=True)
    >>> probe = Probe(lambda view, _: attention_maps(view))
    >>> jax.jit(lambda params: network.hidden(params, batch, probe=probe).probed)(params).shape
    (2, 3, 2, 5, 5)

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

    It changes them, or their gradients, and gives nothing back: a `Probe` with `attention_maps` reads them. Their
    gradient is the gradient of zeros `[layers, batch, heads, length, length]` that a tap adds:
    `Tap(lambda probs, seen, zeros: probs + zeros, zeros)`.

    Attributes:
      function: from probabilities `[batch, heads, length, length]` float32, the mask `[batch, 1, length, length]`
        of real (query, key) pairs and the layer's `inputs` to probabilities. The identity with a gradient of its
        own is a typical one. Rows of padding hold something finite.
      inputs: pytree with leaves `[layers, ...]`.
    """

    function: Callable[[Float[Array, "batch heads query length"], Bool[Array, "batch 1 query length"], PyTree], Array]
    inputs: PyTree = None
