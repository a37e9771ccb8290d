"""LLaMA-style decoder: LLaMA 2 and 3, Vicuna, SmolLM2, TinyLlama, Mistral without sliding window.

Axis names: batch, length, heads, kv_heads, head_dim, embed, mlp, vocab, layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, field_validator, model_validator

from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.compute import Compute, recomputed
from jaxcl.models.gates import Gates, gate
from jaxcl.models.layer import Context, Noise
from jaxcl.models.layers import Embedding, Linear, RMSNorm
from jaxcl.models.lora import LoraConfig, adapter_for
from jaxcl.models.rotary import RopeScaling, Rotary, frequencies, rotary, rotate
from jaxcl.models.soft_tokens import soft_id
from jaxcl.schema import Schema


class LlamaConfig(Schema):
    """Shape of a LLaMA-style decoder."""

    architecture: Literal["llama"] = Field("llama", description="decoder with rotary positions, RMSNorm and SwiGLU")
    vocab_size: int = Field(gt=0, description="number of token ids")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward intermediate units per layer")
    num_layers: int = Field(gt=0, description="number of layers")
    num_heads: int = Field(gt=0, description="attention (query) heads per layer")
    num_kv_heads: int = Field(0, ge=0, description="key/value heads per layer; 0: as many as num_heads")
    head_dim: int = Field(0, ge=0, description="width of a head; 0: hidden_size / num_heads")
    max_length: int = Field(2048, gt=0, description="longest text the model is meant for, in tokens")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="stretch of the rotary frequencies; none: as trained")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(False, description="whether the output head is the token embedding")
    attention_bias: bool = Field(False, description="biases on query, key, value and output projections")
    mlp_bias: bool = Field(False, description="biases on gate, up and down projections")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on residual branches and, unless that has its own, on attention"
    )
    attention_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout on attention probabilities; none: as dropout"
    )
    num_labels: int = Field(0, ge=0, description="classes of the classification head; 0: no such head")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    lora: LoraConfig | None = Field(None, description="low-rank adapters, which are then all that is trained")
    soft_tokens: int = Field(
        0, ge=0, description="trained vectors for prompts to begin with, which are then all that is trained"
    )
    compute: Compute = Field(Compute(), description="precision, rematerialisation, kernel")

    @field_validator("num_kv_heads", "head_dim", mode="before")
    @classmethod
    def _none_is_zero(cls, value: Any) -> Any:
        return 0 if value is None else value

    @model_validator(mode="after")
    def _resolve(self) -> LlamaConfig:
        """Replaces 0 in `num_kv_heads` and `head_dim` by the value it means, and checks that the sizes fit together."""
        values = self.__dict__  # the model is frozen for everyone else
        values["num_kv_heads"] = self.num_kv_heads or self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if not self.head_dim and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        values["head_dim"] = self.head_dim or self.hidden_size // self.num_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.soft_tokens > self.vocab_size:  # each starts as a word of its own
            raise ValueError(f"soft_tokens ({self.soft_tokens}) must be at most vocab_size ({self.vocab_size})")
        return self

    @property
    def dropout_rates(self) -> tuple[float, float]:
        """Dropout rates on residual branches and on attention probabilities."""
        return self.dropout, self.dropout if self.attention_dropout is None else self.attention_dropout


class LlamaAttention(nnx.Module):
    """The four projections of grouped-query attention."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        embed, depth = {"embed": c.hidden_size}, {"head_dim": c.head_dim}
        heads, kv_heads = {"heads": c.num_heads, **depth}, {"kv_heads": c.num_kv_heads, **depth}
        linear = partial(Linear, rngs, bias=c.attention_bias, compute=c.compute, layers=layers)
        lora = partial(adapter_for, c.lora)
        self.query = linear(embed, heads, std=c.init_std, unit="heads", lora=lora("query"))
        self.key = linear(embed, kv_heads, std=c.init_std, unit="heads", lora=lora("key"))
        self.value = linear(embed, kv_heads, std=c.init_std, unit="heads", lora=lora("value"))
        self.out = linear(heads, embed, std=_residual_std(c), unit="heads", lora=lora("out"))


class LlamaMlp(nnx.Module):
    """`down(silu(gate x) * up x)` (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        embed, mlp = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}
        linear = partial(Linear, rngs, bias=c.mlp_bias, compute=c.compute, layers=layers)
        lora = partial(adapter_for, c.lora)
        self.gate = linear(embed, mlp, std=c.init_std, unit="intermediate", lora=lora("gate"))
        self.up = linear(embed, mlp, std=c.init_std, unit="intermediate", lora=lora("up"))
        self.down = linear(mlp, embed, std=_residual_std(c), unit="output", lora=lora("down"))

    def __call__(self, x: Float[Array, "batch length embed"], gates: Gates | None) -> Array:
        """Feed-forward output, gated."""
        gated, up = (constrain(part(x), "batch", "length", "mlp") for part in (self.gate, self.up))

        @recomputed
        def rest(gated: Array, up: Array, factor: Array | None) -> Array:
            return self.down(gate(jax.nn.silu(gated) * up, factor, axis=2))

        if gates is None:
            return rest(gated, up, None)
        return gate(rest(gates.before_activation(gated), up, gates.after_activation), gates.output, axis=2)


class LlamaBlock(nnx.Module):
    """Pre-norm layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, layers: int) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, compute=config.compute, layers=layers)
        self.attention = LlamaAttention(config, rngs, layers)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, compute=config.compute, layers=layers)
        self.mlp = LlamaMlp(config, rngs, layers)

    def project(self, x: Float[Array, "batch length embed"], rotary: Rotary | None) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        if rotary is None:
            raise ValueError("rotary: expected the tables of a decoder's positions, got None")
        x = self.attention_norm(x)
        query, key = self.attention.query(x), self.attention.key(x)
        return rotate(query, rotary), rotate(key, rotary), self.attention.value(x)

    def complete(self, x: Array, attended: Array, gates: Gates | None, noise: Noise | None) -> Array:
        """Output projection, residual, feed-forward, residual."""
        update = self.attention.out(attended)
        x = x + (update if noise is None else noise.drop(update, 1))
        with jax.named_scope("mlp"):
            update = self.mlp(self.mlp_norm(x), gates)
        return x + (update if noise is None else noise.drop(update, 2))


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

    causal = True

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.config = c
        table = ("vocab", "embed")
        self.embed = Embedding(rngs, c.vocab_size, c.hidden_size, axes=table, std=c.init_std, compute=c.compute)
        self.blocks = LlamaBlock(c, rngs, c.num_layers)
        self.final_norm = RMSNorm(c.hidden_size, eps=c.norm_eps, compute=c.compute)
        embed, vocab = {"embed": c.hidden_size}, {"vocab": c.vocab_size}
        untied = not c.tie_embeddings
        self.head = Linear(rngs, embed, vocab, bias=False, std=c.init_std, compute=c.compute) if untied else None
        self.classifier = Classifier(c, rngs) if c.num_labels else None
        # Drawn last: the rest of the network is the same with and without them.
        self.soft_tokens = _soft_tokens(c, rngs) if c.soft_tokens else None

    def context(self, batch: Batch) -> Context:
        """Rotary tables and mask inputs of a batch."""
        c = self.config
        tables = rotary(batch.positions, frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        scale = c.head_dim**-0.5
        return Context(batch.segments, tables, self.causal, batch.packed, scale, c.compute.kernel)

    def start(self, batch: Batch, noise: Noise | None) -> Float[Array, "batch length embed"]:
        """Token embeddings; see `soft_tokens` for negative ids."""
        if self.soft_tokens is None:
            return self.embed(batch.tokens)
        soft = batch.tokens < 0
        words = self.embed(jnp.where(soft, 0, batch.tokens))
        return jnp.where(soft[..., None], self.soft_tokens(jnp.where(soft, soft_id(batch.tokens), 0)), words)

    def finish(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """The norm after the last layer."""
        return self.final_norm(x)

    def logits(self, states: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of the next token, float32."""
        if self.head is None:
            return self.embed.logits(states)
        return self.head.in_float32(states)

    def classify(self, states: Array, batch: Batch, noise: Noise | None) -> Float[Array, "batch labels"]:
        """Class scores from the last real token, float32."""
        if self.classifier is None:
            raise ValueError("classify: expected a config with num_labels > 0, got 0")
        index = jnp.arange(batch.segments.shape[1])
        last = jnp.max(jnp.where(batch.segments != 0, index, 0), axis=1)
        pooled = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return self.classifier.out.in_float32(pooled)


def _soft_tokens(config: LlamaConfig, rngs: nnx.Rngs) -> Embedding:
    """Float32, as adapters are: a step's changes are too small for bfloat16."""
    compute = config.compute.model_copy(update={"param_dtype": "float32"})
    sizes = config.soft_tokens, config.hidden_size
    return Embedding(rngs, *sizes, axes=(None, "embed"), std=config.init_std, compute=compute)


def _residual_std(config: LlamaConfig) -> float:
    """Each layer adds two branches to the residual stream; scaled so that depth does not widen their sum."""
    return config.init_std * (2 * config.num_layers) ** -0.5
