"""Which unit a param belongs to is declared where the param is made, and nothing else has to know."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional import LAYER, Unit, soft_mask, soft_masks
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.models import llama
from jaxcl.models.layers import constant
from jaxcl.models.network import LlamaConfig, Network

pytestmark = pytest.mark.optimised  # bits are compared

SIZES: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2}
CONFIG = LlamaConfig(**SIZES, num_heads=4, num_kv_heads=2, attention_bias=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A layer as a model in the style of Equinox has it: an object with arrays, without a leading layer axis."""

    query: Any
    key: Any
    out: Any
    up: Any
    norm: Any


def layer_of(blocks: Any, index: int) -> Layer:
    attention = blocks["attention"]
    leaves = [attention[name]["kernel"] for name in ("query", "key", "out")]
    leaves += [blocks["mlp"]["up"]["kernel"], blocks["mlp_norm"]["scale"]]
    return Layer(*(leaf[index] for leaf in leaves))


@pytest.mark.parametrize("shared", ["free", "mean", "frozen"])
def test_a_tree_written_by_hand_moves_as_the_networks_own_to_the_bit(shared: Any) -> None:
    network = Network.create(CONFIG)
    params = jax.jit(network.init)(jax.random.key(0))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    importance = {
        name: jax.random.uniform(jax.random.key(number), ones.shape)
        for number, (name, ones) in enumerate(vars(network.gates()).items())
    }
    # A norm belongs to its layer, a key head to a group of two query heads.
    units = [
        Layer(
            Unit("heads", 1, n), Unit("heads", 1, n), Unit("heads", 0, n), Unit("intermediate", 1, n), Unit(LAYER, 0, n)
        )
        for n in range(2)
    ]
    transform = optax.chain(optax.scale_by_adam(), soft_mask(), optax.scale(-0.1))

    def updated(units: Any, params: Any, gradients: Any) -> Any:
        masks = soft_masks(units, params, importance, shared)
        updates, _ = transform.update(gradients, transform.init(params), params, masks=masks)
        return optax.apply_updates(params, updates)

    whole = jax.jit(lambda params, gradients: updated(network.units(), params, gradients))(params, gradients)["blocks"]
    parts = [layer_of(params["blocks"], n) for n in range(2)], [layer_of(gradients["blocks"], n) for n in range(2)]
    by_hand = jax.jit(lambda params, gradients: updated(units, params, gradients))(*parts)
    for n in range(2):
        for one, other in zip(jax.tree.leaves(layer_of(whole, n)), jax.tree.leaves(by_hand[n]), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_new_param_is_masked_by_the_unit_that_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the decoder with one param more per intermediate unit; no method knows of it."""

    class ScaledMlp(llama.LlamaMlp):
        def __init__(self, config: LlamaConfig, rngs: Any, layers: int) -> None:
            super().__init__(config, rngs, layers)
            size = (config.intermediate_size,)
            self.gain = constant(1.0, size, ("mlp",), config.compute, layers, unit="intermediate")

    monkeypatch.setattr(llama, "LlamaMlp", ScaledMlp)
    network = Network.create(LlamaConfig(**SIZES, num_heads=2, init_std=0.03))  # a configuration of its own: not cached
    assert network.units()["blocks"]["mlp"]["gain"] == Unit("intermediate", 1)
    method = DasPaper(DasPaperOptions(contrast_weight=0.0), network, 1)
    state = method.init(jax.jit(network.init)(jax.random.key(0)))
    state["importance"] = dataclasses.replace(state["importance"], intermediate=jnp.full((2, 12), 0.25).at[1, 3].set(1))
    masks = method.update_args({}, state, None, jax.random.key(0))["masks"]  # type: ignore[arg-type]
    assert masks["blocks"]["mlp"]["gain"].tolist() == [[0.75] * 12, [0.75] * 3 + [0.0] + [0.75] * 8]


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "gate", "up", "down"])
def test_every_projection_declares_its_units(name: str) -> None:
    config = LlamaConfig(
        **SIZES, num_heads=4, num_kv_heads=2, attention_bias=True, mlp_bias=True, lora={"targets": [name]}
    )
    units = Network.create(config).units()
    part = "attention" if name in ("query", "key", "value", "out") else "mlp"
    found = units["blocks"][part][name]
    kind, axis = {"out": ("heads", 1), "down": ("output", 2)}.get(
        name, ("heads" if part == "attention" else "intermediate", 2)
    )
    assert found["kernel"] == Unit(kind, axis)
    # The bias of an output projection belongs to no head; one side of an adapter belongs to no unit.
    assert found["bias"] == (Unit(LAYER, 0) if name == "out" else Unit(kind, 1))
    adapter = {"lora_a": Unit(LAYER, 0), "lora_b": Unit(kind, 2)}
    assert {side: found[side] for side in adapter} == (
        {"lora_a": Unit("heads", 1), "lora_b": Unit(LAYER, 0)} if name == "out" else adapter
    )
    assert units["embed"]["embedding"] is None
    assert units["blocks"]["mlp_norm"]["scale"] == Unit(LAYER, 0)
