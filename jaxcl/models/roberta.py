"""RoBERTa-style encoder with a masked-LM head; BERT by other values of the same fields.

Axis names: batch, length, heads, head_dim, embed, mlp, vocab, layers.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, model_validator

from jaxcl.models.activation import ACTIVATIONS, Activation
from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.compute import Compute, recomputed
from jaxcl.models.encoder_shape import UnwindowedShape
from jaxcl.models.gates import Gates, gate
from jaxcl.models.layer import Context, LayerKind, Noise
from jaxcl.models.layers import Embedding, LayerNorm, Linear, constant
from jaxcl.models.lora import VISION_TARGETS, LoraConfig, adapter_for, check_targets
from jaxcl.models.quantised import Quantise, check_quantise
from jaxcl.schema import Schema


class RobertaConfig(UnwindowedShape, Schema):
    """Shape of a RoBERTa-style encoder. BERT: position_offset 0, type_vocab_size 2, pad_id 0, layer_norm_eps 1e-12."""

    architecture: Literal["roberta"] = Field("roberta", description="encoder with learned positions and post-norm")
    family: Literal["roberta", "bert", "xlm-roberta"] | None = Field(
        None, description="model_type of exports; none: bert if position_offset is 0, otherwise roberta"
    )
    vocab_size: int = Field(gt=0, description="number of token ids")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward intermediate units per layer")
    num_layers: int = Field(gt=0, description="number of layers")
    num_heads: int = Field(gt=0, description="attention heads per layer")
    max_length: int = Field(
        512, gt=0, description="longest text in tokens; the position table has position_offset more"
    )
    position_offset: int = Field(2, ge=0, description="row of the position table that position 0 reads; BERT: 0")
    type_vocab_size: int = Field(1, gt=0, description="number of token types; BERT: 2")
    pad_id: int = Field(1, ge=0, description="token id of padding; BERT: 0")
    layer_norm_eps: float = Field(1e-5, gt=0, description="epsilon of LayerNorm; BERT: 1e-12")
    activation: Activation = Field("gelu", description="activation of the feed-forward units")
    head_activation: Activation = Field("gelu", description="activation of the masked-LM head's dense layer")
    hidden_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on embeddings and residual branches")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on attention probabilities")
    num_labels: int = Field(0, ge=0, description="classes of the classification head; 0: no such head")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    lora: LoraConfig | None = Field(None, description="low-rank adapters, which are then all that is trained")
    quantise: Quantise = Field(
        "none",
        description="how kernels of the layers are held beside adapters; int8: 8 bits, a scale per output channel; "
        "nf4: 4 bits, a scale per block of 64",
    )
    compute: Compute = Field(Compute(), description="precision, rematerialisation, kernel")

    @model_validator(mode="after")
    def _check(self) -> RobertaConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        check_targets(self.lora, "an encoder", ("gate", *VISION_TARGETS))
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        check_quantise(self.quantise, self.lora, **sizes, head_dim=self.head_dim)
        return self


class RobertaEmbeddings(nnx.Module):
    """Sum of word, position and type vectors, normalised."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs) -> None:
        c = config
        std, compute = c.init_std, c.compute
        self.word = Embedding(rngs, c.vocab_size, c.hidden_size, axes=("vocab", "embed"), std=std, compute=compute)
        rows = c.max_length + c.position_offset
        self.position = Embedding(rngs, rows, c.hidden_size, axes=(None, "embed"), std=std, compute=compute)
        self.type = Embedding(rngs, c.type_vocab_size, c.hidden_size, axes=(None, "embed"), std=std, compute=compute)
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps, compute=compute)
        self.offset = c.position_offset

    def __call__(self, batch: Batch) -> Float[Array, "batch length embed"]:
        """Embeddings of a batch's tokens."""
        types = jnp.zeros_like(batch.tokens) if batch.types is None else batch.types
        return self.norm(self.word(batch.tokens) + self.type(types) + self.position(batch.positions + self.offset))


class RobertaAttention(nnx.Module):
    """The four projections of multi-head attention."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        embed, heads = {"embed": c.hidden_size}, {"heads": c.num_heads, "head_dim": c.head_dim}
        linear = partial(
            Linear, rngs, bias=True, std=c.init_std, compute=c.compute, layers=layers, quantised=c.quantise
        )
        lora = partial(adapter_for, c.lora)
        self.query = linear(embed, heads, unit="heads", lora=lora("query"))
        self.key = linear(embed, heads, unit="heads", lora=lora("key"))
        self.value = linear(embed, heads, unit="heads", lora=lora("value"))
        self.out = linear(heads, embed, unit="heads", lora=lora("out"))


class RobertaMlp(nnx.Module):
    """`down(activation(up x))`."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        embed, mlp = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}
        linear = partial(
            Linear, rngs, bias=True, std=c.init_std, compute=c.compute, layers=layers, quantised=c.quantise
        )
        lora = partial(adapter_for, c.lora)
        self.up = linear(embed, mlp, unit="intermediate", lora=lora("up"))
        self.down = linear(mlp, embed, unit="output", lora=lora("down"))
        self.activation = c.activation

    def __call__(self, x: Float[Array, "batch length embed"], gates: Gates | None) -> Array:
        """Feed-forward output, gated."""
        up = constrain(self.up(x), "batch", "length", "mlp")

        @recomputed
        def rest(up: Array, factor: Array | None) -> Array:
            return self.down(gate(ACTIVATIONS[self.activation](up), factor, axis=2))

        if gates is None:
            return rest(up, None)
        return gate(rest(gates.before_activation(up), gates.after_activation), gates.output, axis=2)


class RobertaBlock(nnx.Module):
    """Post-norm layer: `norm(x + attention(x))`, then `norm(x + mlp(x))`."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs, layers: int) -> None:
        c = config
        norm = partial(LayerNorm, c.hidden_size, eps=c.layer_norm_eps, compute=c.compute, layers=layers)
        self.attention = RobertaAttention(c, rngs, layers)
        self.attention_norm = norm()
        self.mlp = RobertaMlp(c, rngs, layers)
        self.mlp_norm = norm()

    def project(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Array, Array]:
        """Queries, keys and values; `context` is not used."""
        return self.attention.query(x), self.attention.key(x), self.attention.value(x)

    def complete(self, x: Array, attended: Array, gates: Gates | None, noise: Noise | None) -> Array:
        """Output projection, residual and norm, feed-forward, residual and norm."""
        update = self.attention.out(attended)
        x = self.attention_norm(x + (update if noise is None else noise.drop(update, 1)))
        with jax.named_scope("mlp"):
            update = self.mlp(x, gates)
        return self.mlp_norm(x + (update if noise is None else noise.drop(update, 2)))


class MaskedHead(nnx.Module):
    """Dense layer, activation and norm before the product with the word embedding; a bias after it."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.dense = _square(c, rngs)
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps, compute=c.compute)
        self.bias = constant(0.0, (c.vocab_size,), ("vocab",), c.compute, None)
        self.activation = c.head_activation


class Classifier(nnx.Module):
    """`out(tanh(dense x))` on the state of the first token."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.dense = _square(c, rngs)
        inputs, outputs = {"embed": c.hidden_size}, {"labels": c.num_labels}
        axes = ("embed", None)
        self.out = Linear(rngs, inputs, outputs, bias=True, std=c.init_std, compute=c.compute, kernel_axes=axes)


class Roberta(nnx.Module):
    """The whole encoder; `Network` runs its stages."""

    causal = False

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = RobertaEmbeddings(config, rngs)
        self.blocks = RobertaBlock(config, rngs, config.num_layers)
        self.head = MaskedHead(config, rngs)
        self.classifier = Classifier(config, rngs) if config.num_labels else None

    def context(self, batch: Batch) -> Context:
        """Mask inputs of a batch."""
        c = self.config
        return Context(batch.segments, None, self.causal, batch.packed, c.head_dim**-0.5, c.compute.kernel)

    def kinds(self) -> LayerKind | None:
        """Nothing: the layers are alike."""
        return None

    def start(self, batch: Batch, noise: Noise | None) -> Float[Array, "batch length embed"]:
        """Embeddings of tokens, positions and types."""
        x = self.embed(batch)
        return x if noise is None else noise.drop(x, 0)

    def finish(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """Nothing: each layer ends with its norm."""
        return x

    def logits(self, states: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of the token at each position, float32."""
        x = self.head.norm(ACTIVATIONS[self.head.activation](self.head.dense(states)))
        return self.embed.word.logits(x) + self.head.bias[...].astype(jnp.float32)

    def classify(self, states: Array, batch: Batch, noise: Noise | None) -> Float[Array, "batch labels"]:
        """Class scores from the first token, float32."""
        if self.classifier is None:
            raise ValueError("classify: expected a config with num_labels > 0, got 0")
        x = states[:, 0]
        x = x if noise is None else noise.drop(x, 1)
        x = jnp.tanh(self.classifier.dense(x))
        x = x if noise is None else noise.drop(x, 2)
        return self.classifier.out.in_float32(x)


def _square(config: RobertaConfig, rngs: nnx.Rngs) -> Linear:
    """From `embed` to `embed`; one of the two stays whole, since a mesh axis can split an array only once."""
    width = config.hidden_size
    inputs, outputs, axes = {"embed": width}, {"features": width}, ("embed", None)
    return Linear(rngs, inputs, outputs, bias=True, std=config.init_std, compute=config.compute, kernel_axes=axes)
