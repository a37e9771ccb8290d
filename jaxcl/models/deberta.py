r"""DeBERTa-v3 (arXiv 2111.09543): RoBERTa's layers, whose attention also reads how far apart tokens are.

Scores of query i and key j are $(Q_i \cdot K_j + Q_i \cdot K'_{b(i-j)} + K_j \cdot Q'_{b(i-j)}) / \sqrt{3 d}$ (DeBERTa,
arXiv 2006.03654, equation 4): K' and Q' are the layer's own projections of vectors of distances, which all layers
share, and b puts distances into buckets that grow with them. Attention runs on XLA, with an array of all scores.
Dropout leaves the vectors of distances alone.

Axis names: batch, length, heads, head_dim, embed, vocab, layers, places (of distances).
"""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxcl.models.activation import ACTIVATIONS, Activation
from jaxcl.models.batch import Batch
from jaxcl.models.compute import Compute
from jaxcl.models.encoder_shape import UnwindowedShape
from jaxcl.models.layer import Context, LayerKind, Noise
from jaxcl.models.layers import Embedding, LayerNorm
from jaxcl.models.lora import VISION_TARGETS, LoraConfig, check_targets
from jaxcl.models.quantised import Quantise
from jaxcl.models.roberta import Classifier, MaskedHead, RobertaBlock, RobertaConfig
from jaxcl.schema import Schema


class DebertaConfig(UnwindowedShape, Schema):
    """Shape of a DeBERTa-v3 encoder."""

    architecture: Literal["deberta"] = Field("deberta", description="encoder with attention by relative distance")
    vocab_size: int = Field(gt=0, description="number of token ids")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward intermediate units per layer")
    num_layers: int = Field(gt=0, description="number of layers")
    num_heads: int = Field(gt=0, description="attention heads per layer")
    max_length: int = Field(512, gt=0, description="longest text the model is meant for, in tokens")
    position_buckets: int = Field(
        256, ge=0, description="buckets of distances on either side, half of them of one distance each; 0: no buckets"
    )
    max_distance: int = Field(512, gt=1, description="distance from which on all fall into the last bucket, in tokens")
    layer_norm_eps: float = Field(1e-7, gt=0, description="epsilon of LayerNorm")
    activation: Activation = Field("gelu", description="activation of the feed-forward units and the masked-LM head")
    pooler_activation: Activation = Field("gelu", description="activation of the classification head's dense layer")
    hidden_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on embeddings and residual branches")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on attention probabilities")
    num_labels: int = Field(0, ge=0, description="classes of the classification head; 0: no such head")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    lora: LoraConfig | None = Field(None, description="low-rank adapters, which are then all that is trained")
    compute: Compute = Field(Compute(), description="precision, rematerialisation, kernel")

    @model_validator(mode="after")
    def _check(self) -> DebertaConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        check_targets(self.lora, "an encoder", ("gate", *VISION_TARGETS))
        if self.position_buckets % 2 or 0 < self.position_buckets < 4:
            raise ValueError(f"position_buckets must be 0 or an even number from 4 on, got {self.position_buckets}")
        return self

    @property
    def encoder(self) -> RobertaConfig:
        """The encoder whose layers and masked-LM head these are."""
        shared = set(RobertaConfig.model_fields) & set(type(self).model_fields)
        own = {name: getattr(self, name) for name in shared - {"architecture"}}
        return RobertaConfig(**own, head_activation=self.activation)

    @property
    def family(self) -> str:
        """The `model_type` of the checkpoints that the model is read from and exported as."""
        return "deberta-v2"

    @property
    def span(self) -> int:
        """Vectors of distances on either side."""
        return self.position_buckets or self.max_distance

    @property
    def quantise(self) -> Quantise:
        """Kernels are held as they are."""
        return "none"


def bucket(distance: Int[np.ndarray, "..."], buckets: int, max_distance: int) -> Int[np.ndarray, "..."]:
    """Distances in buckets: those within half the number of buckets have one each, the others logarithmically.

    In float32, as transformers computes it.

    >>> bucket(np.array([-9, -2, 0, 3, 4, 9, 16]), 8, 16).tolist()
    [-6, -2, 0, 3, 4, 6, 8]
    """
    middle = buckets // 2
    size = np.maximum(np.abs(distance), middle).astype(np.float32)
    share = np.log(size / np.float32(middle)) / np.log(np.float32((max_distance - 1) / middle))
    far = np.ceil(share * np.float32(middle - 1)) + middle
    return np.where(np.abs(distance) <= middle, distance, far * np.sign(distance)).astype(np.int32)


@functools.cache
def places(length: int, config: DebertaConfig) -> Int[np.ndarray, "length length"]:
    """The place in the table of distances, for each query and key of a row."""
    index = np.arange(length)
    distance = index[:, None] - index[None, :]
    if config.position_buckets:
        distance = bucket(distance, config.position_buckets, config.max_distance)
    return np.clip(distance + config.span, 0, 2 * config.span - 1).astype(np.int32)


class DebertaEmbeddings(nnx.Module):
    """Normalised word vectors, and normalised vectors of distances."""

    def __init__(self, config: DebertaConfig, rngs: nnx.Rngs) -> None:
        c = config
        std, compute = c.init_std, c.compute
        self.word = Embedding(rngs, c.vocab_size, c.hidden_size, axes=("vocab", "embed"), std=std, compute=compute)
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps, compute=compute)
        self.distance = Embedding(rngs, 2 * c.span, c.hidden_size, axes=(None, "embed"), std=std, compute=compute)
        self.distance_norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps, compute=compute)

    def distances(self) -> Float[Array, "places embed"]:
        """The vectors of distances, compute dtype."""
        return self.distance_norm(self.distance(jnp.arange(len(self.distance.embedding[...]))))


class DebertaBlock(RobertaBlock):
    """RobertaBlock, whose projections of queries and keys also serve the vectors of distances."""

    def __init__(self, config: DebertaConfig, rngs: nnx.Rngs, layers: int) -> None:
        super().__init__(config.encoder, rngs, layers)
        self.config = config

    def relative(self, query: Array, key: Array, context: Context) -> Float[Array, "batch heads length length"]:
        """Products of queries with keys of distances, and of keys with queries of distances, float32."""
        if context.distances is None:
            raise ValueError("distances: expected the vectors of distances, got None")
        own_query, own_key = self.attention.query(context.distances), self.attention.key(context.distances)
        index = places(query.shape[1], self.config)
        product = functools.partial(jnp.einsum, "blhd,phd->bhlp", preferred_element_type=jnp.float32)
        of_query = jnp.take_along_axis(product(query, own_key), index[None, None], axis=-1)
        of_key = jnp.take_along_axis(product(key, own_query), index.T[None, None], axis=-1)
        return of_query + of_key.swapaxes(2, 3)


class Deberta(nnx.Module):
    """The whole encoder; `Network` runs its stages."""

    def __init__(self, config: DebertaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = DebertaEmbeddings(config, rngs)
        self.blocks = DebertaBlock(config, rngs, config.num_layers)
        self.head = MaskedHead(config.encoder, rngs)
        self.classifier = Classifier(config.encoder, rngs) if config.num_labels else None

    def context(self, batch: Batch) -> Context:
        """Mask inputs of a batch."""
        c = self.config
        return Context(batch.segments, None, c.causal, batch.packed, (3 * c.head_dim) ** -0.5, c.compute.kernel)

    def kinds(self) -> LayerKind:
        """The vectors of distances, the same for each layer."""
        own = self.embed.distances()
        return LayerKind(None, None, distances=jnp.broadcast_to(own, (self.config.num_layers, *own.shape)))

    def start(self, batch: Batch, noise: Noise | None) -> Float[Array, "batch length embed"]:
        """Normalised word vectors."""
        x = self.embed.norm(self.embed.word(batch.tokens))
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
        x = ACTIVATIONS[self.config.pooler_activation](self.classifier.dense(states[:, 0]))
        return self.classifier.out.in_float32(x if noise is None else noise.drop(x, 1))
