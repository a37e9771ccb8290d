"""Mixture of experts: each token goes through the few feed-forward parts that a router chooses for it.

No token is dropped: tokens are sorted by expert, and grouped products take groups of any size. Where experts are split
over devices, each device computes what its own experts add to the tokens that it holds, and the parts are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxcl.models.activation import ACTIVATIONS
from jaxcl.models.axes import Names, per_shard
from jaxcl.models.compute import recomputed
from jaxcl.models.gates import Gates, gate
from jaxcl.models.grouped import grouped_product
from jaxcl.models.layers import Linear, RMSNorm, parameter
from jaxcl.models.llama_config import LlamaConfig

# Logical axes of what each device computes on its own.
_TOKENS = ("batch", "length", None)
_KERNEL = ("experts", None, None)


class Routed(NamedTuple):
    """What the router of a layer decided.

    Attributes:
      probs: of each token, over all experts; float32.
      chosen: the experts that each token goes to.
      weights: their factors; float32.
    """

    probs: Float[Array, "batch length experts"]
    chosen: Int[Array, "batch length chosen"]
    weights: Float[Array, "batch length chosen"]


class Load(NamedTuple):
    """How evenly a layer's router spreads the real tokens; with leading axes, of several layers.

    Attributes:
      tokens: how many tokens each expert is chosen for.
      probs: sum of each expert's probability over the tokens.
    """

    tokens: Float[Array, "... experts"]
    probs: Float[Array, "... experts"]


def route(logits: Float[Array, "*tokens experts"], count: int, normalise: bool) -> tuple[Array, Array, Array]:
    """Probabilities over all experts, and the `count` likeliest experts with their factors.

    Args:
      logits: scores of the experts, float32.
      count: experts of a token. Static.
      normalise: whether the factors are divided by their sum. Static.

    Returns:
      The fields of `Routed`.

    Examples:
      >>> probs, chosen, weights = route(jnp.log(jnp.array([0.1, 0.6, 0.3])), count=2, normalise=True)
      >>> chosen.tolist(), [f"{weight:.3f}" for weight in weights]
      ([1, 2], ['0.667', '0.333'])
    """
    probs = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probs, count)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probs, chosen, weights


def load_of(routed: Routed, real: Bool[Array, "batch length"]) -> Load:
    """The load of a layer's experts; positions that are not `real` do not count."""
    counted = real[..., None].astype(jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(routed.chosen, routed.probs.shape[-1]), axis=2)
    return Load(jnp.sum(chosen * counted, axis=(0, 1)), jnp.sum(routed.probs * counted, axis=(0, 1)))


def balance_loss(load: Load, tokens: Float[Array, ""]) -> Float[Array, ""]:
    """The load-balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), over all layers together.

    Number of experts times the sum over experts of (share of the tokens that go to it, averaged over layers) times (its
    mean probability, likewise). As in transformers, shares sum up to the number of experts that a token goes to, so
    that evenly spread tokens give that number.

    Args:
      load: leaves `[layers, experts]`.
      tokens: number of real tokens; with none, the loss is 0.

    Examples:
      >>> even = jnp.full((1, 4), 6.0)  # 12 tokens, two experts each
      >>> float(balance_loss(Load(even, even / 2), jnp.float32(12)))
      2.0
    """
    layers, experts = load.tokens.shape
    rows = jnp.maximum(layers * tokens, 1)
    return experts * jnp.sum(jnp.sum(load.tokens, axis=0) / rows * (jnp.sum(load.probs, axis=0) / rows))


class Grouped(nnx.Module):
    """The kernels of one projection of all experts, `[experts, inputs, outputs]`."""

    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig, layers: int, *, down: bool, std: float) -> None:
        units = {"expert_mlp": config.expert_size}
        embed = {"embed": config.hidden_size}
        sizes = {"experts": config.num_experts, **(units | embed if down else embed | units)}
        unit = "output" if down else "intermediate"
        shape, axes = list(sizes.values()), list(sizes)
        self.kernel = parameter(rngs.params(), shape, axes, std, config.compute, layers, unit, inputs=1, stacked=1)


class LlamaExperts(nnx.Module):
    """A router, and experts that are each `down(activation(gate x) * up x)`; takes the place of `LlamaMlp`.

    The unit of a kernel `gate` or `up` is (expert, intermediate unit), all of them numbered one expert after another;
    that of `down` is the output unit. The router belongs to no unit.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int, residual_std: float) -> None:
        c = config
        self.config = c
        self.router = Linear(
            rngs,
            {"embed": c.hidden_size},
            {"experts": c.num_experts},
            bias=False,
            std=c.init_std,
            compute=c.compute,
            layers=layers,
            kernel_axes=("embed", None),  # each device routes all of its tokens
        )
        self.gate = Grouped(rngs, c, layers, down=False, std=c.init_std)
        self.up = Grouped(rngs, c, layers, down=False, std=c.init_std)
        self.down = Grouped(rngs, c, layers, down=True, std=residual_std)

    def __call__(
        self, x: Float[Array, "batch length embed"], gates: Gates | None, norm: RMSNorm | None = None
    ) -> Array:
        """As `LlamaMlp`. If the router has a loss, `load` reads afterwards what it decided."""
        c = self.config
        with jax.named_scope("router"):
            routed = Routed(*route(self.router.in_float32(x), c.experts_per_token, c.normalise_top_k))
        if c.router_loss_weight:
            self.routed = nnx.Intermediate(routed)
        x = x.astype(c.compute.activation_dtype)
        arguments = [x, routed.chosen, routed.weights, jnp.arange(c.num_experts)]
        arguments += [part.kernel[...].astype(x.dtype) for part in (self.gate, self.up, self.down)]
        names: list[Names] = [_TOKENS, _TOKENS, _TOKENS, ("experts",), _KERNEL, _KERNEL, _KERNEL]
        if gates is not None:
            arguments.append(gates.intermediate.reshape(-1, c.num_experts, c.expert_size))
            names.append(("batch" if gates.intermediate.ndim == 2 else None, "experts", None))
        kind = None if gates is None else type(gates)
        own = partial(_own_experts, c.num_experts, ACTIVATIONS[c.activation], kind)
        parts = per_shard(own, names, ("experts", *_TOKENS))(*arguments)
        out = jnp.sum(parts, axis=0)
        out = out if norm is None else norm(out)
        return out if gates is None else gate(out, gates.output, axis=2)

    def load(self, real: Bool[Array, "batch length"]) -> Load:
        """The load of the experts in the last call; see `load_of`."""
        return load_of(self.routed.get_value(), real)


def _own_experts(
    total: int,
    activation: Callable[[Array], Array],
    kind: type[Gates] | None,
    x: Float[Array, "batch length embed"],
    chosen: Int[Array, "batch length chosen"],
    weights: Float[Array, "batch length chosen"],
    numbers: Int[Array, " own"],
    gate_kernel: Float[Array, "own embed mlp"],
    up_kernel: Float[Array, "own embed mlp"],
    down_kernel: Float[Array, "own mlp embed"],
    factors: Float[Array, "rows own mlp"] | None = None,
) -> Float[Array, "1 batch length embed"]:
    """What some of the experts, next to each other, add to all tokens; `numbers` are theirs, out of `total`.

    `factors` are gates of `kind` on their units, for each row or for all.
    """
    (rows, length, count), held = chosen.shape, len(numbers)
    # Counted from the first of the own experts, so that what goes to others comes last.
    local = ((chosen - numbers[0]) % total).reshape(-1)
    order = jnp.argsort(local)
    sizes = jnp.sum(local[:, None] == jnp.arange(held), axis=0, dtype=jnp.int32)
    is_own = (jnp.arange(local.size) < jnp.sum(sizes))[:, None]

    def kept(values: Array) -> Array:
        """Without what a grouped product, or its gradient, leaves in rows that belong to none of its groups."""
        return values if held == total else jnp.where(is_own, values, 0)

    def product(values: Array, kernel: Array) -> Array:
        return kept(grouped_product(values, kernel, sizes))

    repeated = jnp.broadcast_to(x[:, :, None], (rows, length, count, x.shape[-1])).reshape(local.size, -1)
    sorted_x = kept(_taken(repeated, order))
    gated, up = product(sorted_x, gate_kernel), product(sorted_x, up_kernel)
    gates = None
    if kind is not None and factors is not None:
        row = jnp.minimum(order // (length * count), len(factors) - 1)
        own = factors[row, jnp.minimum(local[order], held - 1)]
        gates = kind(heads=own, intermediate=own, output=own)  # of which only `intermediate` is read

    @recomputed
    def rest(gated: Array, up: Array, gates: Gates | None) -> Array:
        # Each token is an example of its own here: `gate` wants [example, length, units].
        gated = gated if gates is None else gates.before_activation(gated[:, None])[:, 0]
        inner = activation(gated) * up
        inner = inner if gates is None else gate(inner[:, None], gates.after_activation, axis=2)[:, 0]
        return product(inner, down_kernel)

    out = _taken(rest(gated, up, gates), jnp.argsort(order)).reshape(*chosen.shape, -1)
    return jnp.sum(out * weights[..., None], axis=2).astype(x.dtype)[None]


def _taken(values: Float[Array, "rows _"], order: Int[Array, " rows"]) -> Float[Array, "rows _"]:
    """The rows in another order."""
    return values.at[order].get(unique_indices=True, mode="promise_in_bounds")
