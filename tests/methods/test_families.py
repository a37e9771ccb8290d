"""DAS and SEEKR for two tasks on a tiny model of every family.

What they compute is tested elsewhere, on LLaMA; here it is compared with what the network itself does
under the switches of the other families: norms after branches, caps, windows, layers that differ.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional import gate_gradients, soft_mask
from jaxcl.methods.base import OptimizerParts
from jaxcl.methods.das import Das, DasOptions
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network
from jaxcl.models.probe import Tap
from jaxcl.training.optimizer import scale_by_given_learning_rate
from tests.tiny.batches import StandInTask, batch_of
from tests.tiny.families import DECODERS, ENCODERS, network_of
from tests.tiny.networks import params_of, row_losses

# All switches at once, in one model; the families, which set some of them each, repeat it.
MIXED: dict[str, Any] = {
    "layer_types": ("window", "full"),
    "window": 5,
    "window_rope_theta": 50.0,
    "rotary_layers": (True, True, False),
    "rotary_share": 0.5,
    "norm_placement": "sandwich",
    "norm_scale": "one_plus",
    "qk_norm": "flat",
    "attention_bias": True,
    "attention_out_bias": False,
    "embedding_scale": 3.0,
    "attention_scale": 0.3,
    "residual_scale": 0.7,
    "logit_divisor": 1.5,
    "attention_cap": 3.0,
    "logit_cap": 5.0,
    "activation": "gelu_tanh",
}
_SLOW = ["modernbert", "deberta-v2", *DECODERS, *ENCODERS]
ALL = ["all switches", *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW)]
SEGMENTS = [[1] * 9, [1] * 7 + [0] * 2, [1] * 8 + [0]]  # longer than the windows, which are 5


@dataclasses.dataclass
class Model:
    network: Network
    params: Any
    batch: Batch


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest) -> Model:
    network = network_of("llama", **MIXED) if request.param == "all switches" else network_of(request.param)
    # What is compared is the same with and without a pass's own dropout only where there is none.
    drops = [name for name in ("dropout", "hidden_dropout", "attention_dropout") if getattr(network.config, name, None)]
    network = Network.create(network.config.model_copy(update=dict.fromkeys(drops, 0.0)))
    tokens = np.random.default_rng(0).integers(4, 50, (3, 9))
    batch = dataclasses.replace(batch_of(SEGMENTS, tokens, packed=False), example=jnp.arange(3))
    return Model(network, params_of(network), batch)


def test_gate_gradients_are_slopes(model: Model) -> None:
    """Along a random direction of all gates at once, against finite differences."""
    ones = model.network.gates(3)
    leaves = jax.tree.leaves(ones)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    directions = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    direction = jax.tree.unflatten(jax.tree.structure(ones), directions)

    def losses(gates: Gates) -> jax.Array:
        return row_losses(model.network, model.params, model.batch, gates=gates)

    slopes = jax.jit(lambda gates: gate_gradients(losses, gates))(ones)
    # Importance is measured of every unit of every layer.
    assert all(np.all(np.any(np.asarray(leaf) != 0, axis=1)) for leaf in jax.tree.leaves(slopes))
    step = 1e-3
    moved = jax.jit(lambda h: losses(jax.tree.map(lambda one, way: one + h * way, ones, direction)))
    found = (moved(step) - moved(-step)) / (2 * step)
    want = sum(jnp.sum(s * d, axis=(0, 2)) for s, d in zip(jax.tree.leaves(slopes), directions, strict=True))
    np.testing.assert_allclose(found, want, rtol=0.02, atol=0.05)


def test_das_paper_learns_two_domains(model: Model) -> None:
    method = DasPaper(DasPaperOptions(contrast_weight=0.0, proxy="pooled"), model.network, 2)
    optimizer = optax.chain(optax.scale_by_adam(), soft_mask(), optax.scale(-1e-2))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            terms = method.loss(params, state, model.batch, jax.random.key(0))
            return sum(term.weight * term.sum / jnp.maximum(term.count, 1) for term in terms.values())

        gradient = jax.grad(loss)(params)
        masks = method.update_args(params, state, model.batch, jax.random.key(0))["masks"]
        return optax.apply_updates(params, optimizer.update(gradient, optimizer.init(params), params, masks=masks)[0])

    params, state = model.params, method.init(model.params)
    for index in range(2):
        task = StandInTask([model.batch], index=index)
        state = method.prepare(params, state, task)
        before, params = params, step(params, state)
        state = method.consolidate(params, state, task)
    for importance in vars(state["importance"]).values():
        assert np.all(np.isfinite(importance))
        assert np.all((np.asarray(importance) >= 0) & (np.asarray(importance) <= 1))
        assert np.all(np.max(importance, axis=1) > 0.5)
    assert all(np.any(np.asarray(new != old)) for new, old in zip(*map(jax.tree.leaves, (params, before)), strict=True))
    # Fully important units stay to the bit, whatever else the family hangs on them.
    frozen = step(params, state | {"importance": jax.tree.map(jnp.ones_like, state["importance"])})
    blocks, kept = params["blocks"], frozen["blocks"]
    for part in ("query", "key", "value"):
        np.testing.assert_array_equal(blocks["attention"][part]["kernel"], kept["attention"][part]["kernel"])
    for part in blocks["mlp"]:
        np.testing.assert_array_equal(blocks["mlp"][part]["kernel"], kept["mlp"][part]["kernel"])
    if "mlp_post_norm" in blocks:
        np.testing.assert_array_equal(blocks["mlp_post_norm"]["scale"], kept["mlp_post_norm"]["scale"])


def test_das_holds_what_it_measured(model: Model) -> None:
    """Every param has importance, and a great one brings it back to where it was, whatever the family hangs on it."""
    method = Das(DasOptions(hold="both"), model.network, 2)
    parts = OptimizerParts(optax.identity(), optax.scale_by_adam(), optax.identity(), scale_by_given_learning_rate())
    optimizer = method.transform(parts)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            term = method.loss(params, state, model.batch, jax.random.key(0))["loss"]
            return term.sum / term.count

        extra = method.update_args(params, state, model.batch, jax.random.key(0))
        updates, _ = optimizer.update(
            jax.grad(loss)(params), optimizer.init(params), params, learning_rate=1e-2, **extra
        )
        return optax.apply_updates(params, updates)

    state = jax.jit(method.init)(model.params)
    free = step(model.params, state)
    task = StandInTask([model.batch])
    state = method.prepare(model.params, state, task)
    for leaf in jax.tree.leaves(jax.jit(lambda known: known.full(method.sides()))(state["importance"])):
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf) > 0)
    full = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e12, leaf.dtype), state["importance"])
    held = step(model.params, state | {"importance": full})
    for before, moved, after in zip(*map(jax.tree.leaves, (model.params, free, held)), strict=True):
        assert np.any(np.asarray(moved != before))
        np.testing.assert_allclose(after, before, atol=1e-6)
    learned = method.consolidate(held, state, task)
    for table in jax.jit(method.tables)(learned).values():
        assert np.all((np.asarray(table) >= 0) & (np.asarray(table) < 1))


@functools.partial(jax.jit, static_argnums=0)
def attention_maps(network: Network, params: Any, batch: Batch) -> jax.Array:
    """The probabilities that attention uses, `[layers, batch, heads, length, length]`."""
    found = []

    def keep(probs: jax.Array, visible: jax.Array, _: Any) -> jax.Array:
        found.append(jnp.where(visible, probs, 0))
        return probs

    x = network.embed(params, batch)
    for number in range(network.num_layers):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], network.blocks(params))
        x = network.block(layer, x, batch, tap=Tap(keep))[0]
    return jnp.stack(found)


def test_seekr_learns_two_tasks(model: Model) -> None:
    network = model.network
    options = SeekrOptions(
        layer_budget=2,
        head_budget=3,
        query_budget=4,
        store_attention="float32",
        distil_heads="rows",
        attention_weight=1,
    )
    method = Seekr(options, network, 2)
    params, state = model.params, method.init(model.params)
    moved = jax.tree.map(lambda leaf: leaf * 1.1, params)
    state = method.consolidate(moved, state, StandInTask([model.batch], before=params, memory=[model.batch]))
    assert np.all(np.asarray(state["heads"][0]) >= 0)
    # Mean squares over visible pairs: of layers with a window, those within it.
    maps, before = (np.asarray(attention_maps(network, one, model.batch)) for one in (moved, params))
    for layer, windowed in enumerate(network.windowed(9)):
        reach = network.config.window if windowed else 9
        pairs = sum(
            abs(query - key) < reach and (key <= query or not network.causal)
            for length in (9, 7, 8)
            for query in range(length)
            for key in range(length)
        )
        change = np.square(maps[layer] - before[layer]).sum((0, 2, 3))
        np.testing.assert_allclose(state["forgettability"][0, layer], change / pairs, rtol=1e-3)
        assert change.min() > 0
    np.testing.assert_allclose(np.sum(state["sensitivity"][0], axis=1), 1, rtol=1e-5)
    # What is stored is what attention does, and a model does not differ from itself.
    stored = jax.jit(method.signals)(moved, state, model.batch, jax.random.key(2))
    for row in range(3):
        for number, (layer, head) in enumerate(np.asarray(stored["heads"][row])):
            for place, query in enumerate(np.asarray(stored["queries"][row])):
                want = maps[layer, row, head, query] if query >= 0 else 0
                np.testing.assert_allclose(stored["rows"][row, number, place], want, atol=1e-5)
    remembered = dataclasses.replace(model.batch, origin="memory", teacher=stored)

    @jax.jit
    def attention(params: Any) -> Any:
        term = method.loss(params, state, remembered, jax.random.key(3))["attention"]
        return term.sum / term.count

    assert abs(attention(moved)) < 1e-5 < 1e-4 < attention(params)
    slope = jax.jit(jax.grad(attention))(params)
    direction = jax.tree.map(lambda a, b: a - b, moved, params)
    want = sum(jnp.sum(s * d) for s, d in zip(*map(jax.tree.leaves, (slope, direction)), strict=True))
    near = lambda h: jax.tree.map(lambda p, d: p + h * d, params, direction)  # noqa: E731
    np.testing.assert_allclose((attention(near(0.02)) - attention(near(-0.02))) / 0.04, want, rtol=0.05, atol=1e-4)
