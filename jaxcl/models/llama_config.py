"""The configuration of the decoder: shape, switches by which families of models differ, runtime options."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from jaxcl.models.activation import Activation
from jaxcl.models.compute import Compute
from jaxcl.models.lora import VISION_TARGETS, LoraConfig, check_targets
from jaxcl.models.quantised import Quantise, check_quantise
from jaxcl.models.rotary import RopeScaling
from jaxcl.models.vision_config import VisionConfig
from jaxcl.schema import Schema


class Rope(NamedTuple):
    """Rotary positions of a kind of layer."""

    theta: float
    scaling: RopeScaling | None


class LlamaConfig(Schema):
    """Shape of a decoder. The defaults of its switches are LLaMA; other families are other values of them."""

    architecture: Literal["llama"] = Field(
        "llama", description="decoder with rotary positions, RMSNorm and gated units"
    )
    family: str = Field(
        "llama", description="model_type of the checkpoints that the model is read from and exported as; see the docs"
    )
    vocab_size: int = Field(gt=0, description="number of token ids")
    hidden_size: int = Field(gt=0, le=2**31 - 1, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward intermediate units per layer")
    num_layers: int = Field(gt=0, le=1024, description="number of layers")
    num_experts: int = Field(
        0, ge=0, description="feed-forward experts per layer, of which each token goes to a few; 0: one for all"
    )
    experts_per_token: int = Field(0, ge=0, description="experts that each token goes to")
    expert_size: int = Field(0, ge=0, description="intermediate units of an expert; 0: as intermediate_size")
    normalise_top_k: bool = Field(False, description="whether the factors of a token's experts are made to sum up to 1")
    router_loss_weight: float = Field(
        0.0, ge=0, description="factor on the loss that spreads tokens evenly over experts; 0: no such loss"
    )
    num_heads: int = Field(gt=0, description="attention (query) heads per layer")
    num_kv_heads: int = Field(0, ge=0, description="key/value heads per layer; 0: as many as num_heads")
    head_dim: int = Field(0, ge=0, le=2**31 - 1, description="width of a head; 0: hidden_size / num_heads")
    causal: bool = Field(True, description="whether positions see only earlier ones; false: an encoder (EuroBERT)")
    max_length: int = Field(2048, gt=0, description="longest text the model is meant for, in tokens")
    layer_types: tuple[Literal["full", "window"], ...] = Field(
        ("full",), min_length=1, description="what each layer attends to, repeated along the layers: all, or the window"
    )
    window: int = Field(
        0,
        ge=0,
        description="layers of type window see keys less than this many tokens away; 0: no such layers",
    )
    rotary_layers: tuple[bool, ...] = Field(
        (True,), min_length=1, description="which layers have rotary positions, repeated along the layers"
    )
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="stretch of the rotary frequencies; none: as trained")
    window_rope_theta: float | None = Field(
        None, gt=0, description="base of the (unstretched) frequencies in layers of type window; none: as in the others"
    )
    rotary_share: float = Field(1.0, gt=0, le=1, description="share of a head's coordinates that are rotated")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")
    norm_placement: Literal["pre", "post", "sandwich"] = Field(
        "pre", description="where norms are: before each branch, after it (before the residual sum), or both"
    )
    norm_scale: Literal["weight", "one_plus", "cast"] = Field(
        "weight",
        description="scale of RMSNorm; weight: w, multiplied in float32; one_plus: 1 + w, likewise; "
        "cast: w, multiplied after the cast to compute.dtype, as transformers does for LLaMA",
    )
    qk_norm: Literal["none", "head", "flat"] = Field(
        "none", description="RMSNorm on queries and keys: none, on each head, or over all heads at once"
    )
    activation: Activation = Field("silu", description="activation of the feed-forward gate")
    tie_embeddings: bool = Field(False, description="whether the output head is the token embedding")
    attention_bias: bool = Field(False, description="biases on query, key, value and output projections")
    attention_out_bias: bool | None = Field(
        None, description="bias on the output projection of attention; none: as attention_bias"
    )
    mlp_bias: bool = Field(False, description="biases on gate, up and down projections")
    embedding_scale: float = Field(1.0, gt=0, description="factor on token embeddings, rounded to compute.dtype")
    attention_scale: float | None = Field(
        None, gt=0, description="factor on products of queries and keys; none: head_dim^-0.5"
    )
    residual_scale: float = Field(1.0, gt=0, description="factor on each branch before the residual sum")
    logit_divisor: float = Field(1.0, gt=0, description="what token scores are divided by")
    attention_cap: float | None = Field(None, gt=0, description="soft cap of attention scores; none: no cap")
    logit_cap: float | None = Field(None, gt=0, description="soft cap of token scores; none: no cap")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on residual branches and, unless that has its own, on attention"
    )
    attention_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout on attention probabilities; none: as dropout"
    )
    num_labels: int = Field(0, ge=0, description="classes of the classification head; 0: no such head")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    lora: LoraConfig | None = Field(None, description="low-rank adapters, which are then all that is trained")
    quantise: Quantise = Field(
        "none",
        description="how kernels of the layers are held beside adapters; int8: 8 bits, a scale per output channel; "
        "nf4: 4 bits, a scale per block of 64",
    )
    soft_tokens: int = Field(
        0, ge=0, description="trained vectors for prompts to begin with, which are then all that is trained"
    )
    vision: VisionConfig | None = Field(None, description="tower and connector of a model that sees images; none: text")
    compute: Compute = Field(Compute(), description="precision, rematerialisation, kernel")

    @field_validator("num_kv_heads", "head_dim", mode="before")
    @classmethod
    def _none_is_zero(cls, value: Any) -> Any:
        return 0 if value is None else value

    @model_validator(mode="after")
    def _resolve(self) -> LlamaConfig:
        """Puts values in place of those that stand for others, and checks that the fields fit together."""
        values = self.__dict__  # the model is frozen for everyone else
        values["num_kv_heads"] = self.num_kv_heads or self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if not self.head_dim and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        values["head_dim"] = self.head_dim or self.hidden_size // self.num_heads
        if self.rotary_width % 2 or not self.rotary_width:
            share = "" if self.rotary_share == 1 else f" times rotary_share ({self.rotary_share})"
            raise ValueError(f"head_dim{share} must be even for rotary positions, got {self.rotary_width}")
        if self.soft_tokens > self.vocab_size:  # each starts as a word of its own
            raise ValueError(f"soft_tokens ({self.soft_tokens}) must be at most vocab_size ({self.vocab_size})")
        self._resolve_experts()
        if self.vision is None:
            check_targets(self.lora, "a model without vision", VISION_TARGETS)
        sizes = {name: getattr(self, name) for name in ("hidden_size", "head_dim", "intermediate_size")}
        check_quantise(self.quantise, self.lora, **sizes)
        if self.attention_out_bias == self.attention_bias:
            values["attention_out_bias"] = None
        if self.attention_scale == self.head_dim**-0.5:
            values["attention_scale"] = None
        for name in ("layer_types", "rotary_layers"):
            values[name] = _shortest(along(getattr(self, name), self.num_layers))
        if not any(self.rotary_layers):
            raise ValueError("rotary_layers: expected at least one layer with rotary positions")
        if self.window_rope_theta == self.rope_theta and self.rope_scaling is None:
            values["window_rope_theta"] = None
        if "window" not in self.layer_types:
            values["window"], values["window_rope_theta"] = 0, None
        elif not self.window:
            raise ValueError("window: expected at least 1 where layer_types has window, got 0")
        scaling = self.rope_scaling
        if scaling is not None and scaling.type == "longrope" and 2 * len(scaling.long_factors) != self.rotary_width:
            raise ValueError(
                f"rope_scaling: longrope needs a factor for each of {self.rotary_width // 2} pairs of coordinates, got "
                f"{len(scaling.long_factors)}"
            )
        return self

    def _resolve_experts(self) -> None:
        values = self.__dict__
        if not self.num_experts:
            values |= {"experts_per_token": 0, "expert_size": 0, "normalise_top_k": False, "router_loss_weight": 0.0}
            return
        values["expert_size"] = self.expert_size or self.intermediate_size
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token: expected 1 to num_experts ({self.num_experts}), got {self.experts_per_token}"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias: experts (num_experts above 0) have no biases; allowed is false")
        if self.quantise != "none":
            raise ValueError(
                f"quantise: experts (num_experts above 0) are not quantised; allowed is none, got {self.quantise}"
            )
        if self.lora is not None and (found := sorted({"gate", "up", "down"} & set(self.lora.targets))):
            raise ValueError(
                f"lora.targets: experts (num_experts above 0) have no adapters, got {', '.join(found)}; allowed are "
                "query, key, value, out"
            )

    @property
    def mlp_units(self) -> int:
        """Feed-forward intermediate units per layer, those of all experts together."""
        return self.num_experts * self.expert_size or self.intermediate_size

    @property
    def dropout_rates(self) -> tuple[float, float]:
        """Dropout rates on residual branches and on attention probabilities."""
        return self.dropout, self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def rotary_width(self) -> int:
        """Coordinates of a head that are rotated."""
        return int(self.head_dim * self.rotary_share)

    @property
    def scale(self) -> float:
        """Factor on products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Which layers attend to the window only."""
        return tuple(kind == "window" for kind in along(self.layer_types, self.num_layers))

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Rotary positions of each layer, `None` where it has none."""
        full = Rope(self.rope_theta, self.rope_scaling)
        local = full if self.window_rope_theta is None else Rope(self.window_rope_theta, None)
        rotated = along(self.rotary_layers, self.num_layers)
        return tuple((local if w else full) if r else None for w, r in zip(self.windowed, rotated, strict=True))


def along(pattern: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """A pattern repeated, or cut, to the number of layers.

    >>> along(("window", "full"), 3)
    ('window', 'full', 'window')
    """
    return tuple(pattern[layer % len(pattern)] for layer in range(layers))


def _shortest(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shortest pattern that gives the values.

    >>> _shortest((1, 0, 1, 0, 1)), _shortest((1, 1, 0))
    ((1, 0), (1, 1, 0))
    """
    sizes = range(1, len(values) + 1)
    return next(values[:size] for size in sizes if along(values[:size], len(values)) == values)
