"""A model split once into what is static and what is a pytree: pure functions of params."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.deberta import Deberta, DebertaConfig
from jaxcl.models.experts import Load
from jaxcl.models.gates import Gates, SeeingGates, VisionGates
from jaxcl.models.layer import Context, LayerKind, Noise, apply_block
from jaxcl.models.layers import derive
from jaxcl.models.llama import Llama, LlamaConfig
from jaxcl.models.modernbert import ModernBert, ModernBertConfig
from jaxcl.models.probe import Probe, Tap
from jaxcl.models.product import rematerialised
from jaxcl.models.roberta import Roberta, RobertaConfig
from jaxcl.models.trainable import Params
from jaxcl.models.vision_config import vision_of

AnyConfig = LlamaConfig | RobertaConfig | ModernBertConfig | DebertaConfig
ModelConfig = Annotated[AnyConfig, Field(discriminator="architecture")]

Model = Llama | Roberta | ModernBert | Deberta


class Hidden(NamedTuple):
    """What the layers give.

    Attributes:
      states: output of the last layer (and the final norm), compute dtype.
      probed: the probe's results, leaves `[layers, ...]`; `None` without a probe.
      load: how evenly each layer's router spreads tokens, leaves `[layers, experts]`; `None` if routers have no loss.
    """

    states: Float[Array, "batch length embed"]
    probed: Any
    load: Load | None = None


class Layer(NamedTuple):
    """One layer, or all of them along a leading axis.

    Attributes:
      params: the layer's params.
      kind: what it has and others have not; `None` where all layers are alike.
    """

    params: Params
    kind: LayerKind | None


class _PerLayer(NamedTuple):
    """What is scanned along with the layers; `None` where absent."""

    layer: Layer
    gates: Gates | None
    tap: Any
    probe: Any
    key: Array | None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of a given configuration, without its params. Hashable; close over it in jitted functions.

    Params are plain nested dicts of arrays. Those of the layers carry a leading `layers` axis, and the forward pass
    is a scan over it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2)
      >>> network = Network.create(config)
      >>> params = network.init(jax.random.key(0))
      >>> params["blocks"]["mlp"]["up"]["kernel"].shape, network.axes()["blocks"]["mlp"]["up"]["kernel"]
      ((2, 8, 12), ('layers', 'embed', 'mlp'))

    Attributes:
      config: shape and runtime options.
    """

    config: AnyConfig

    @classmethod
    def create(cls, config: AnyConfig) -> Network:
        """The network that `config` describes."""
        return cls(config)

    @property
    def causal(self) -> bool:
        """Whether a position sees only earlier ones."""
        return self.config.causal

    def windowed(self, length: int) -> tuple[bool, ...]:
        """Which layers have a window that is shorter than rows of `length` tokens."""
        return tuple(own and self.config.window < length for own in self.config.windowed)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.config.num_layers

    @property
    def num_heads(self) -> int:
        """Attention (query) heads per layer."""
        return self.config.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads per layer."""
        return self.config.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.config.head_dim

    @property
    def intermediate_size(self) -> int:
        """Feed-forward intermediate units per layer, those of all experts together."""
        return self.config.mlp_units if isinstance(self.config, LlamaConfig) else self.config.intermediate_size

    @property
    def num_experts(self) -> int:
        """Feed-forward experts per layer; 0 for networks without."""
        return self.config.num_experts if isinstance(self.config, LlamaConfig) else 0

    @property
    def active_units(self) -> int:
        """Feed-forward intermediate units per layer that a token goes through."""
        c = self.config
        return (
            c.experts_per_token * c.expert_size if isinstance(c, LlamaConfig) and c.num_experts else c.intermediate_size
        )

    @property
    def router_loss_weight(self) -> float:
        """Factor on the routers' load-balancing loss; 0 for networks without such a loss."""
        return self.config.router_loss_weight if isinstance(self.config, LlamaConfig) else 0.0

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def num_soft_tokens(self) -> int:
        """Number of soft tokens, see `jaxcl.models.soft_tokens`."""
        return self.config.soft_tokens if isinstance(self.config, LlamaConfig) else 0

    @property
    def num_token_types(self) -> int:
        """Number of token types; 1 for models that know none."""
        return self.config.type_vocab_size if isinstance(self.config, RobertaConfig) else 1

    @property
    def num_params(self) -> int:
        """Number of params, adapters included; those of kernels, however they are held."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.unquantised.shapes()))

    @property
    def unquantised(self) -> Network:
        """The network whose kernels are not quantised; itself if they are not. `dequantised` makes its params."""
        if self.config.quantise == "none":
            return self
        return Network.create(self.config.model_copy(update={"quantise": "none"}))

    @property
    def num_active_params(self) -> int:
        """Number of params that one token is computed with: all but those of the experts that it does not go to."""
        spare = self.num_layers * (self.intermediate_size - self.active_units)
        return self.num_params - 3 * spare * self.hidden_size

    def init(self, key: Array) -> Params:
        """Fresh params; can be jitted."""
        # Adapters have a stream of their own, a fixed way from the key.
        rngs = nnx.Rngs(key) if self.config.lora is None else nnx.Rngs(key, lora=jax.random.fold_in(key, 1 << 31))
        return nnx.to_pure_dict(nnx.state(_build(self.config, rngs), nnx.Param))

    def shapes(self) -> Params:
        """The params' tree with a `jax.ShapeDtypeStruct` for each leaf; computes nothing."""
        return nnx.to_pure_dict(_abstract(self.config).state)

    def axes(self) -> Params:
        """The params' tree with tuples of logical axis names as leaves, `None` for an axis never to be split."""
        return self._metadata("axes")

    def units(self) -> Params:
        """The params' tree with the `jaxcl.functional.Unit` of each param as leaf, `None` for those outside layers."""
        return self._metadata("unit")

    def sides(self) -> Params:
        """The params' tree with the `jaxcl.functional.Sides` of each param as leaf."""
        return self._metadata("sides")

    def gates(self, batch: int | None = None) -> Gates:
        """Gates of 1; see `Gates.ones`. Those of a model that sees are `SeeingGates`."""
        c, vision = self.config, vision_of(self.config)
        sizes = {"heads": c.num_heads, "intermediate": self.intermediate_size, "output": c.hidden_size}
        own = Gates.ones(layers=c.num_layers, batch=batch, **sizes)
        if vision is None:
            return own
        sizes = {"heads": vision.num_heads, "intermediate": vision.intermediate_size, "output": vision.hidden_size}
        tower = Gates.ones(layers=vision.num_layers, batch=batch, **sizes)
        return SeeingGates.around(own, VisionGates(tower, jnp.ones_like(own.output[:1])))

    def _metadata(self, name: str) -> Params:
        state = nnx.to_flat_state(_abstract(self.config).state)
        return _nest({path: variable.get_metadata()[name] for path, variable in state})

    def hidden(
        self,
        params: Params,
        batch: Batch,
        *,
        gates: Gates | None = None,
        tap: Tap | None = None,
        probe: Probe | None = None,
        dropout_key: Array | None = None,
        dropout_rate: float | None = None,
    ) -> Hidden:
        """The forward pass up to the states that the heads read.

        An argument that is `None` leaves no trace in the compiled program.

        Args:
          params: as from `init`.
          batch: token rows.
          gates: factors on units, see `Gates`.
          tap: a function on every layer's attention probabilities, on the explicit path.
          probe: reads every layer's queries and keys; attention stays on the fast kernel.
          dropout_key: key to draw dropout from, or one per row, `[batch]`, so that what a row draws does not depend on
            other rows (`Batch.keys`); `None`: nothing is dropped.
          dropout_rate: noise for models without dropout, in place of the configuration's rates: the rate on hidden
            states. Attention probabilities are left alone, so that attention stays on the fast kernel. Static.

        Returns:
          Final states and what the probe computed.
        """
        keys = None if dropout_key is None else _split(dropout_key, self.num_layers + 1)
        context = self.context(batch)
        first = None if keys is None else keys[0]
        x = self.embed(params, batch, gates=gates, dropout_key=first, dropout_rate=dropout_rate)

        def body(x: Array, layer: _PerLayer) -> tuple[Array, Any]:
            return self._block(
                layer.layer,
                x,
                context=context,
                gates=layer.gates,
                tap=None if tap is None else dataclasses.replace(tap, inputs=layer.tap),
                probe=None if probe is None else dataclasses.replace(probe, inputs=layer.probe),
                dropout_key=layer.key,
                dropout_rate=dropout_rate,
            )

        layers = _PerLayer(
            layer=self.blocks(params),
            gates=None if gates is None else gates.decoder,
            tap=None if tap is None else tap.inputs,
            probe=None if probe is None else probe.inputs,
            key=None if keys is None else keys[1:],
        )
        x, (probed, load) = jax.lax.scan(self.remat(body), x, layers)
        return Hidden(self._merge(params).finish(x), probed, load)

    def remat(self, body: Any) -> Any:
        """`body` of a scan over layers, recomputed in the backward pass as the configuration says."""
        return rematerialised(body, self.config.compute.remat)

    @jax.named_scope("logits")
    def logits(self, params: Params, states: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Token scores of `states` under `params`, float32: decoders score the next token, encoders the token."""
        return self._merge(params).logits(states)

    def classify(
        self, params: Params, states: Float[Array, "batch length embed"], batch: Batch, dropout_key: Array | None = None
    ) -> Float[Array, "batch labels"]:
        """Class scores of each row, float32. Encoders read the first token, decoders the last real one.

        Args:
          params: as from `init`.
          states: what `hidden` gave for the batch.
          batch: token rows.
          dropout_key: as in `hidden`.

        Raises:
          ValueError: the configuration has no classes.
        """
        return self._merge(params).classify(states, batch, self._noise(dropout_key, None))

    def context(self, batch: Batch) -> Context:
        """What all layers need to know of the batch: mask inputs and rotary tables."""
        return _abstract(self.config).model.context(batch)

    @jax.named_scope("embed")
    def embed(
        self,
        params: Params,
        batch: Batch,
        *,
        gates: Gates | None = None,
        dropout_key: Array | None = None,
        dropout_rate: float | None = None,
    ) -> Float[Array, "batch length embed"]:
        """The input of the first layer, compute dtype; arguments as in `hidden`, see `Network.hidden`."""
        noise = self._noise(dropout_key, dropout_rate)
        match self._merge(params):
            case Llama() as model:
                x = model.start(batch, noise, None if gates is None else gates.vision)
            case model:
                x = model.start(batch, noise)
        return constrain(x, "batch", "length", "embed")

    def blocks(self, params: Params) -> Layer:
        """All layers, leaves `[layers, ...]`: what a scan over layers runs along."""
        return Layer(params["blocks"], self._merge(params).kinds())

    def block(
        self,
        layer: Layer,
        x: Float[Array, "batch length embed"],
        batch: Batch,
        *,
        context: Context | None = None,
        gates: Gates | None = None,
        tap: Tap | None = None,
        probe: Probe | None = None,
        dropout_key: Array | None = None,
        dropout_rate: float | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """One layer, for callers that walk the layers themselves.

        Args:
          layer: `blocks(params)` at one layer, without the layer axis.
          x: the layer's input.
          batch: token rows.
          context: `context(batch)`, to compute it once for all layers.
          gates: this layer's gates, without the layer axis.
          tap: with this layer's inputs.
          probe: with this layer's inputs.
          dropout_key: as in `hidden`, a new one for each layer.
          dropout_rate: as in `hidden`.

        Returns:
          The layer's output, and the probe's.
        """
        context = self.context(batch) if context is None else context
        x, (probed, _) = self._block(
            layer,
            x,
            context=context,
            gates=gates,
            tap=tap,
            probe=probe,
            dropout_key=dropout_key,
            dropout_rate=dropout_rate,
        )
        return x, probed

    def _block(
        self,
        layer: Layer,
        x: Array,
        *,
        context: Context,
        dropout_key: Array | None,
        dropout_rate: float | None,
        **seen: Any,
    ) -> tuple[Array, tuple[Any, Load | None]]:
        """One layer's output, the probe's, and the load of its experts."""
        block, noise = self.layer(layer.params), self._noise(dropout_key, dropout_rate)
        x, probed = apply_block(block, x, context.at(layer.kind), noise=noise, **seen)
        return x, (probed, block.mlp.load(context.segments != 0) if self.router_loss_weight else None)

    def layer(self, layer_params: Params) -> Any:
        """The `Block` of one layer's params, whose `project` and `complete` come before and after attention."""
        return nnx.merge(_abstract(self.config).block, nnx.State(layer_params))

    def finish(self, params: Params, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """From the last layer's output `x` to `Hidden.states`: the final norm of decoders, with its `params`."""
        return self._merge(params).finish(x)

    def _merge(self, params: Params) -> Model:
        return nnx.merge(_abstract(self.config).graph, nnx.State(params))

    def _noise(self, key: Array | None, rate: float | None) -> Noise | None:
        if key is None:
            return None
        hidden, attention = self.config.dropout_rates if rate is None else (rate, 0.0)
        return Noise(key, hidden, attention) if hidden > 0 or attention > 0 else None


def _split(key: Array, count: int) -> Array:
    """`count` keys of one key; of one key per row, `[count, rows]`."""
    keys = derive(lambda one: jax.random.split(one, count), key)
    return jnp.moveaxis(keys, -1, 0)


class _Abstract(NamedTuple):
    """A module without arrays, and its parts."""

    model: Any
    graph: Any
    state: Any
    block: Any


def _build(config: AnyConfig, rngs: nnx.Rngs) -> Model:
    match config:
        case LlamaConfig():
            return Llama(config, rngs)
        case RobertaConfig():
            return Roberta(config, rngs)
        case ModernBertConfig():
            return ModernBert(config, rngs)
        case DebertaConfig():
            return Deberta(config, rngs)


@functools.cache
def _abstract(config: AnyConfig) -> _Abstract:
    model = nnx.eval_shape(lambda: _build(config, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return _Abstract(model, graph, state, nnx.split(model.blocks)[0])


def _nest(flat: dict[tuple[Any, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
