"""ModernBERT (arXiv 2412.13663): an encoder made of the decoder's parts, with LayerNorm and a masked-LM head.

The first layer's attention has no norm, since the embeddings are normalised. Layers are scanned, so that its norm has
a row for that layer, too, which nothing reads.

Axis names: batch, length, embed, vocab, layers.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, ValidationError, model_validator

from jaxcl.models.activation import ACTIVATIONS, Activation
from jaxcl.models.batch import Batch
from jaxcl.models.compute import Compute
from jaxcl.models.encoder_shape import EncoderShape
from jaxcl.models.gates import Gates
from jaxcl.models.layer import Context, LayerKind, Noise
from jaxcl.models.layers import Embedding, LayerNorm, Linear, constant
from jaxcl.models.llama import LlamaAttention, LlamaMlp
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.lora import LoraConfig
from jaxcl.models.quantised import Quantise
from jaxcl.models.rotary import rotary
from jaxcl.schema import Schema


class ModernBertConfig(EncoderShape, Schema):
    """Shape of a ModernBERT encoder. The defaults of its switches are those of the published models."""

    architecture: Literal["modernbert"] = Field(
        "modernbert", description="encoder with rotary positions, windows on both sides and gated units"
    )
    vocab_size: int = Field(gt=0, description="number of token ids")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward intermediate units per layer")
    num_layers: int = Field(gt=0, description="number of layers")
    num_heads: int = Field(gt=0, description="attention heads per layer")
    max_length: int = Field(8192, gt=0, description="longest text the model is meant for, in tokens")
    layer_types: tuple[Literal["full", "window"], ...] = Field(
        ("full", "window", "window"),
        min_length=1,
        description="what each layer attends to, repeated along the layers: all, or the window",
    )
    window: int = Field(
        65, ge=0, description="layers of type window see keys less than this many tokens away, on both sides"
    )
    rope_theta: float = Field(160000.0, gt=0, description="base of the rotary frequencies")
    window_rope_theta: float | None = Field(
        10000.0, gt=0, description="base of the frequencies in layers of type window; none: as in the others"
    )
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of LayerNorm")
    norm_bias: bool = Field(False, description="biases of LayerNorm")
    attention_bias: bool = Field(False, description="biases on query, key, value and output projections")
    mlp_bias: bool = Field(False, description="biases on gate, up and down projections")
    head_bias: bool = Field(False, description="bias on the head's dense layer")
    vocab_bias: bool = Field(True, description="bias on token scores")
    activation: Activation = Field("gelu", description="activation of the feed-forward gate")
    head_activation: Activation = Field("gelu", description="activation of the head's dense layer")
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="what the classification head reads: the state of the first token, or the mean of all"
    )
    hidden_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on embeddings, residual branches and the classifier's input"
    )
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention probabilities")
    num_labels: int = Field(0, ge=0, description="classes of the classification head; 0: no such head")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    lora: LoraConfig | None = Field(None, description="low-rank adapters, which are then all that is trained")
    compute: Compute = Field(Compute(), description="precision, rematerialisation, kernel")

    @model_validator(mode="after")
    def _resolve(self) -> ModernBertConfig:
        """Checks that the fields fit together, as in the decoder, and takes its shortest names of the same layers."""
        try:
            decoder = self.decoder
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        for name in ("layer_types", "window", "window_rope_theta"):
            self.__dict__[name] = getattr(decoder, name)  # the model is frozen for everyone else
        return self

    @property
    def decoder(self) -> LlamaConfig:
        """The decoder whose attention and feed-forward part each layer has."""
        shared = set(LlamaConfig.model_fields) & set(type(self).model_fields)
        own = {name: getattr(self, name) for name in shared - {"architecture", "num_labels"}}
        return LlamaConfig(**own, causal=False)

    @property
    def family(self) -> str:
        """The `model_type` of the checkpoints that the model is read from and exported as."""
        return "modernbert"

    @property
    def quantise(self) -> Quantise:
        """Kernels are held as they are."""
        return "none"

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Which layers attend to the window only."""
        return self.decoder.windowed


def _norm(config: ModernBertConfig, layers: int | None = None) -> LayerNorm:
    c = config
    return LayerNorm(c.hidden_size, eps=c.norm_eps, compute=c.compute, layers=layers, bias=c.norm_bias)


class ModernBertBlock(nnx.Module):
    """Pre-norm layer: `x + attention(norm(x))`, in the first layer `x + attention(x)`, then `x + mlp(norm(x))`."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs, layers: int) -> None:
        decoder = config.decoder
        self.attention_norm = _norm(config, layers)
        self.attention = LlamaAttention(decoder, rngs, layers)
        self.mlp_norm = _norm(config, layers)
        self.mlp = LlamaMlp(decoder, rngs, layers)

    def project(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        normed = self.attention_norm(x)
        if context.first is not None:
            normed = jnp.where(context.first, x, normed)
        return self.attention.project(normed, context.tables)

    def complete(self, x: Array, attended: Array, gates: Gates | None, noise: Noise | None) -> Array:
        """Output projection, residual, feed-forward, residual."""
        update = self.attention.out(attended)
        x = x + (update if noise is None else noise.drop(update, 1))
        with jax.named_scope("mlp"):
            update = self.mlp(self.mlp_norm(x), gates)
        return x + (update if noise is None else noise.drop(update, 2))


class ModernBertHead(nnx.Module):
    """Dense layer, activation and norm, which both heads begin with; the bias of token scores."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs) -> None:
        c = config
        inputs, outputs = {"embed": c.hidden_size}, {"features": c.hidden_size}
        axes = ("embed", None)  # a mesh axis can split an array only once
        linear = partial(Linear, rngs, std=c.init_std, compute=c.compute, kernel_axes=axes)
        self.dense = linear(inputs, outputs, bias=c.head_bias)
        self.norm = _norm(c)
        self.bias = constant(0.0, (c.vocab_size,), ("vocab",), c.compute, None) if c.vocab_bias else None
        self.activation = c.head_activation

    def __call__(self, states: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """What is scored, of states or of what was pooled from them."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(states)))


class ModernBertClassifier(nnx.Module):
    """A linear layer on what the head makes of the pooled states."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs) -> None:
        c = config
        inputs, outputs, axes = {"embed": c.hidden_size}, {"labels": c.num_labels}, ("embed", None)
        self.out = Linear(rngs, inputs, outputs, bias=True, std=c.init_std, compute=c.compute, kernel_axes=axes)


class ModernBert(nnx.Module):
    """The whole encoder; `Network` runs its stages."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.config = c
        table = ("vocab", "embed")
        self.embed = Embedding(rngs, c.vocab_size, c.hidden_size, axes=table, std=c.init_std, compute=c.compute)
        self.embed_norm = _norm(c)
        self.blocks = ModernBertBlock(c, rngs, c.num_layers)
        self.final_norm = _norm(c)
        self.head = ModernBertHead(c, rngs)
        self.classifier = ModernBertClassifier(c, rngs) if c.num_labels else None

    def context(self, batch: Batch) -> Context:
        """Rotary tables and mask inputs of a batch."""
        c = self.config
        kinds = [rotary(batch.positions, c.head_dim, theta) for theta in _kinds(c)]
        tables = kinds[0] if len(kinds) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *kinds)
        window = c.window or None
        return Context(batch.segments, tables, c.causal, batch.packed, c.head_dim**-0.5, c.compute.kernel, window)

    def kinds(self) -> LayerKind:
        """What tells the layers apart, leaves `[layers]`: the first has no norm."""
        c = self.config
        kinds, mixed = _kinds(c), len(set(c.windowed)) > 1
        rotary = jnp.array([kinds.index(theta) for theta in _thetas(c)], jnp.int32) if len(kinds) > 1 else None
        return LayerKind(rotary, jnp.array(c.windowed) if mixed else None, jnp.arange(c.num_layers) == 0)

    def start(self, batch: Batch, noise: Noise | None) -> Float[Array, "batch length embed"]:
        """Normalised token embeddings."""
        x = self.embed_norm(self.embed(batch.tokens))
        return x if noise is None else noise.drop(x, 0)

    def finish(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """The norm after the last layer."""
        return self.final_norm(x)

    def logits(self, states: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of the token at each position, float32."""
        logits = self.embed.logits(self.head(states))
        return logits if self.head.bias is None else logits + self.head.bias[...].astype(jnp.float32)

    def classify(self, states: Array, batch: Batch, noise: Noise | None) -> Float[Array, "batch labels"]:
        """Class scores from the first token, or from the mean of the real ones, float32."""
        if self.classifier is None:
            raise ValueError("classify: expected a config with num_labels > 0, got 0")
        x = states[:, 0]
        if self.config.pooling == "mean":
            real = (batch.segments != 0)[..., None].astype(jnp.float32)
            x = jnp.sum(states * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
        x = self.head(x.astype(states.dtype))
        return self.classifier.out.in_float32(x if noise is None else noise.drop(x, 1))


def _thetas(config: ModernBertConfig) -> list[float]:
    """The base of each layer's frequencies."""
    return [rope.theta for rope in config.decoder.ropes if rope is not None]


def _kinds(config: ModernBertConfig) -> list[float]:
    """Those that differ, in the order of the layers."""
    return list(dict.fromkeys(_thetas(config)))
