"""The decoder. `LlamaConfig` has the switches by which families differ; with none of them set it is LLaMA.

A switch that is not set leaves no trace in the compiled program. What differs from layer to layer is data that is
scanned along (`LayerKind`), so that the program does not grow with depth.

Axis names: batch, length, heads, kv_heads, head_dim, embed, mlp, experts, expert_mlp, vocab, layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxcl.models.activation import ACTIVATIONS
from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.compute import recomputed
from jaxcl.models.experts import LlamaExperts
from jaxcl.models.gates import Gates, VisionGates, gate
from jaxcl.models.layer import Context, LayerKind, Noise
from jaxcl.models.layers import Embedding, Linear, RMSNorm
from jaxcl.models.llama_config import LlamaConfig, Rope
from jaxcl.models.lora import adapter_for
from jaxcl.models.mask import capped
from jaxcl.models.rotary import Rotary, rotary, rotate, unrotated
from jaxcl.models.soft_tokens import soft_id
from jaxcl.models.vision import Vision

__all__ = ["Llama", "LlamaConfig"]


def _norm(config: LlamaConfig, layers: int | None, unit: str | None = None, **sizes: int) -> RMSNorm:
    sizes = sizes or {"embed": config.hidden_size}
    return RMSNorm(sizes, eps=config.norm_eps, compute=config.compute, layers=layers, how=config.norm_scale, unit=unit)


class LlamaAttention(nnx.Module):
    """The four projections of grouped-query attention, and the norms of queries and keys."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        embed, depth = {"embed": c.hidden_size}, {"head_dim": c.head_dim}
        heads, kv_heads = {"heads": c.num_heads, **depth}, {"kv_heads": c.num_kv_heads, **depth}
        linear = partial(Linear, rngs, bias=c.attention_bias, compute=c.compute, layers=layers, quantised=c.quantise)
        lora = partial(adapter_for, c.lora)
        self.query = linear(embed, heads, std=c.init_std, unit="heads", lora=lora("query"))
        self.key = linear(embed, kv_heads, std=c.init_std, unit="heads", lora=lora("key"))
        self.value = linear(embed, kv_heads, std=c.init_std, unit="heads", lora=lora("value"))
        out_bias = c.attention_bias if c.attention_out_bias is None else c.attention_out_bias
        self.out = linear(heads, embed, std=_residual_std(c), unit="heads", lora=lora("out"), bias=out_bias)
        norm = partial(_norm, c, layers, "heads")
        self.query_norm, self.key_norm = {
            "none": lambda: (None, None),
            "head": lambda: (norm(**depth), norm(**depth)),  # shared by the heads, so it belongs to none of them
            "flat": lambda: (norm(**heads), norm(**kv_heads)),
        }[c.qk_norm]()

    def project(self, x: Float[Array, "batch length embed"], rotary: Rotary) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        query, key = self.query(x), self.key(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, rotary), rotate(key, rotary), self.value(x)


class LlamaMlp(nnx.Module):
    """`down(activation(gate x) * up x)` (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        embed, mlp = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}
        linear = partial(Linear, rngs, bias=c.mlp_bias, compute=c.compute, layers=layers, quantised=c.quantise)
        lora = partial(adapter_for, c.lora)
        self.gate = linear(embed, mlp, std=c.init_std, unit="intermediate", lora=lora("gate"))
        self.up = linear(embed, mlp, std=c.init_std, unit="intermediate", lora=lora("up"))
        self.down = linear(mlp, embed, std=_residual_std(c), unit="output", lora=lora("down"))
        self.activation = c.activation

    def __call__(
        self, x: Float[Array, "batch length embed"], gates: Gates | None, norm: RMSNorm | None = None
    ) -> Array:
        """Feed-forward output, normalised and gated.

        The gate of an output unit is on what the unit adds to the residual stream, so it comes after the norm.
        """
        gated, up = (constrain(part(x), "batch", "length", "mlp") for part in (self.gate, self.up))

        @recomputed
        def rest(gated: Array, up: Array, factor: Array | None) -> Array:
            return self.down(gate(ACTIVATIONS[self.activation](gated) * up, factor, axis=2))

        if gates is None:
            out = rest(gated, up, None)
        else:
            out = rest(gates.before_activation(gated), up, gates.after_activation)
        out = out if norm is None else norm(out)
        return out if gates is None else gate(out, gates.output, axis=2)


class LlamaBlock(nnx.Module):
    """`x + attention(x)`, then `x + mlp(x)`, with norms before the branches (`pre`), after them (`post`), or both."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        before, after = c.norm_placement != "post", c.norm_placement != "pre"
        self.attention_norm = _norm(c, layers) if before else None
        self.attention = LlamaAttention(c, rngs, layers)
        self.attention_post_norm = _norm(c, layers) if after else None
        self.mlp_norm = _norm(c, layers) if before else None
        self.mlp = LlamaExperts(c, rngs, layers, _residual_std(c)) if c.num_experts else LlamaMlp(c, rngs, layers)
        self.mlp_post_norm = _norm(c, layers, "output") if after else None
        self.residual_scale = c.residual_scale

    def project(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        return self.attention.project(x if self.attention_norm is None else self.attention_norm(x), context.tables)

    def complete(self, x: Array, attended: Array, gates: Gates | None, noise: Noise | None) -> Array:
        """Output projection, residual, feed-forward, residual."""
        update = self.attention.out(attended)
        if self.attention_post_norm is not None:
            update = self.attention_post_norm(update)
        x = x + self._branch(update, noise, 1)
        with jax.named_scope("mlp"):
            update = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x), gates, self.mlp_post_norm)
        return x + self._branch(update, noise, 2)

    def _branch(self, update: Array, noise: Noise | None, place: int) -> Array:
        update = update if noise is None else noise.drop(update, place)
        return update if self.residual_scale == 1.0 else update * jnp.asarray(self.residual_scale, update.dtype)


class Classifier(nnx.Module):
    """A linear layer on the state of the last real token."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        inputs, outputs = {"embed": config.hidden_size}, {"labels": config.num_labels}
        self.out = Linear(
            rngs,
            inputs,
            outputs,
            bias=False,
            std=config.init_std,
            compute=config.compute,
            kernel_axes=("embed", None),
        )


class Llama(nnx.Module):
    """The whole decoder; `Network` runs its stages."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.config = c
        table = ("vocab", "embed")
        self.embed = Embedding(rngs, c.vocab_size, c.hidden_size, axes=table, std=c.init_std, compute=c.compute)
        self.blocks = LlamaBlock(c, rngs, c.num_layers)
        self.final_norm = _norm(c, None)
        embed, vocab = {"embed": c.hidden_size}, {"vocab": c.vocab_size}
        untied = not c.tie_embeddings
        self.head = Linear(rngs, embed, vocab, bias=False, std=c.init_std, compute=c.compute) if untied else None
        self.classifier = Classifier(c, rngs) if c.num_labels else None
        # Drawn last: the rest of the network is the same with and without them.
        self.vision = None if c.vision is None else Vision(c.vision, c.hidden_size, c.lora, c.compute, rngs)
        self.soft_tokens = _soft_tokens(c, rngs) if c.soft_tokens else None

    def context(self, batch: Batch) -> Context:
        """Rotary tables and mask inputs of a batch."""
        c = self.config
        kinds = [
            None if rope is None else rotary(batch.positions, c.rotary_width, rope.theta, rope.scaling)
            for rope in _kinds(c.ropes)
        ]
        rotated = next(tables for tables in kinds if tables is not None)
        every = [unrotated(rotated) if tables is None else tables for tables in kinds]
        tables = every[0] if len(every) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
        window = c.window or None
        return Context(
            batch.segments, tables, c.causal, batch.packed, c.scale, c.compute.kernel, window, c.attention_cap
        )

    def kinds(self) -> LayerKind | None:
        """What tells the layers apart, leaves `[layers]`; `None` if they are alike."""
        c = self.config
        ropes, windowed = _kinds(c.ropes), set(c.windowed)
        rotary = jnp.array([ropes.index(rope) for rope in c.ropes], jnp.int32) if len(ropes) > 1 else None
        which = jnp.array(c.windowed) if len(windowed) > 1 else None
        return None if rotary is None and which is None else LayerKind(rotary, which)

    def start(
        self, batch: Batch, noise: Noise | None, gates: VisionGates | None = None
    ) -> Float[Array, "batch length embed"]:
        """Token embeddings, and the states of images in their places; see `soft_tokens` for negative ids."""
        x = self._vectors(batch.tokens)
        scale = self.config.embedding_scale
        x = x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
        if batch.images is None:
            return x
        if self.vision is None:
            raise ValueError("images: expected a config with vision, got none")
        return batch.images.place(x, self.vision(batch.images, gates))

    def _vectors(self, tokens: Array) -> Array:
        if self.soft_tokens is None:
            return self.embed(tokens)
        soft = tokens < 0
        words = self.embed(jnp.where(soft, 0, tokens))
        return jnp.where(soft[..., None], self.soft_tokens(jnp.where(soft, soft_id(tokens), 0)), words)

    def finish(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """The norm after the last layer."""
        return self.final_norm(x)

    def logits(self, states: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of the next token, float32."""
        logits = self.embed.logits(states) if self.head is None else self.head.in_float32(states)
        divisor = self.config.logit_divisor
        return capped(logits if divisor == 1.0 else logits / divisor, self.config.logit_cap)

    def classify(self, states: Array, batch: Batch, noise: Noise | None) -> Float[Array, "batch labels"]:
        """Class scores from the last real token (the first, if positions see later ones), float32."""
        if self.classifier is None:
            raise ValueError("classify: expected a config with num_labels > 0, got 0")
        if not self.config.causal:
            return self.classifier.out.in_float32(states[:, 0])
        index = jnp.arange(batch.segments.shape[1])
        last = jnp.max(jnp.where(batch.segments != 0, index, 0), axis=1)
        pooled = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return self.classifier.out.in_float32(pooled)


def _kinds(ropes: Sequence[Rope | None]) -> list[Rope | None]:
    """Those that differ, in the order of the layers."""
    return [rope for place, rope in enumerate(ropes) if rope not in ropes[:place]]


def _soft_tokens(config: LlamaConfig, rngs: nnx.Rngs) -> Embedding:
    """Float32, as adapters are: a step's changes are too small for bfloat16."""
    compute = config.compute.model_copy(update={"param_dtype": "float32"})
    sizes = config.soft_tokens, config.hidden_size
    return Embedding(rngs, *sizes, axes=(None, "embed"), std=config.init_std, compute=compute)


def _residual_std(config: LlamaConfig) -> float:
    """Each layer adds two branches to the residual stream; scaled so that depth does not widen their sum."""
    return config.init_std * (2 * config.num_layers) ** -0.5
