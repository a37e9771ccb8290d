"""What is compiled: nothing for features that are not asked for, and the same for two layers as for eight."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import layer
from jaxcl.models import network as network_module
from jaxcl.models.attention import attention
from jaxcl.models.compute import recomputed
from jaxcl.models.layers import RMSNorm
from jaxcl.models.llama import Llama, LlamaBlock, LlamaMlp
from jaxcl.models.network import Network
from jaxcl.models.probe import Probe, Tap
from jaxcl.models.roberta import RobertaMlp
from jaxcl.models.rotary import rotary, rotate
from tests.tiny.batches import batch_of
from tests.tiny.networks import ARCHITECTURES, BUILDERS, params_of, row_losses

pytestmark = pytest.mark.optimised  # compiled programs are read

SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]


def program(network: Network, **arguments: Any) -> str:
    """Loss and gradient as handed to the compiler, without the names of functions.

    Before optimisation: the compiler would fold factors that are constantly 1, and hide what this looks for.
    """
    batch = batch_of(SEGMENTS)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(row_losses(network, params, batch, **arguments))

    text = jax.jit(jax.value_and_grad(loss)).lower(network.shapes()).as_text()
    return re.sub(r"@\w+", "@function", text)


def without_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces every function that knows of gates, taps, probes, dropout or switches by one that does not."""

    def apply_block(block: Any, x: jax.Array, context: Any, **_: Any) -> tuple[jax.Array, None]:
        query, key, value = block.project(x, context)
        context = context._asdict()
        for name in ("rotary", "first", "distances"):
            context.pop(name)
        return block.complete(x, attention(query, key, value, **context), None, None), None

    def llama_mlp(self: LlamaMlp, x: jax.Array, *_: None) -> jax.Array:
        return recomputed(lambda gated, up: self.down(jax.nn.silu(gated) * up))(self.gate(x), self.up(x))

    def llama_project(self: LlamaBlock, x: jax.Array, context: layer.Context) -> tuple[jax.Array, ...]:
        x, parts = self.attention_norm(x), self.attention
        query, key = parts.query(x), parts.key(x)
        return rotate(query, context.rotary), rotate(key, context.rotary), parts.value(x)

    def llama_complete(self: LlamaBlock, x: jax.Array, attended: jax.Array, *_: None) -> jax.Array:
        x = x + self.attention.out(attended)
        return x + llama_mlp(self.mlp, self.mlp_norm(x))

    def llama_context(self: Llama, batch: Any) -> layer.Context:
        c = self.config
        tables = rotary(batch.positions, c.head_dim, c.rope_theta, c.rope_scaling)
        return layer.Context(batch.segments, tables, True, batch.packed, c.head_dim**-0.5, c.compute.kernel)

    def rms_norm(self: RMSNorm, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array, scale: jax.Array, eps: jax.Array) -> jax.Array:
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
            return x * scale

        return recomputed(norm)(x, self.scale[...], jnp.float32(self.eps))

    def roberta_mlp(self: RobertaMlp, x: jax.Array, gates: None) -> jax.Array:
        return recomputed(lambda up: self.down(jax.nn.gelu(up, approximate=False)))(self.up(x))

    def hidden(self: Network, params: Any, batch: Any) -> Any:
        context = self.context(batch)

        def one(x: jax.Array, layer_params: Any) -> tuple[jax.Array, None]:
            return apply_block(self.layer(layer_params), x, context)

        x, _ = jax.lax.scan(one, self.embed(params, batch), params["blocks"])
        return network_module.Hidden(self.finish(params, x), None)

    monkeypatch.setattr(LlamaMlp, "__call__", llama_mlp)
    monkeypatch.setattr(LlamaBlock, "project", llama_project)
    monkeypatch.setattr(LlamaBlock, "complete", llama_complete)
    monkeypatch.setattr(Llama, "context", llama_context)
    monkeypatch.setattr(Llama, "start", lambda self, batch, *_: self.embed(batch.tokens))
    monkeypatch.setattr(Llama, "logits", lambda self, states: self.head.in_float32(states))
    monkeypatch.setattr(RMSNorm, "__call__", rms_norm)
    monkeypatch.setattr(RobertaMlp, "__call__", roberta_mlp)
    monkeypatch.setattr(layer, "apply_block", apply_block)
    monkeypatch.setattr(Network, "hidden", hidden)


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_features_that_are_not_asked_for_leave_no_trace(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = BUILDERS[architecture]()
    with_features = program(network)
    with_gates = program(network, gates=network.gates())
    without_features(monkeypatch)
    stripped = program(network)
    assert with_features == stripped
    assert with_gates != stripped  # the comparison sees what it should see


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eight_layers_are_as_much_program_as_two(architecture: str) -> None:
    def instructions(layers: int) -> int:
        return program(BUILDERS[architecture](num_layers=layers)).count(" = ")

    assert instructions(8) == instructions(2) > 200


@pytest.mark.parametrize("architecture", ["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def test_rematerialisation_changes_no_gradient(architecture: str) -> None:
    batch = batch_of(SEGMENTS)
    params = params_of(BUILDERS[architecture](num_layers=3))
    gradients, temporary = {}, {}
    for remat in ("none", "dots", "full"):
        network = BUILDERS[architecture](compute={"remat": remat}, num_layers=3)

        def loss(params: Any, network: Network = network) -> jax.Array:
            return jnp.sum(row_losses(network, params, batch, dropout_key=jax.random.key(3), dropout_rate=0.2))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        gradients[remat], temporary[remat] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), gradients[remat], gradients["none"]
        )
    assert temporary["full"] < temporary["dots"] < temporary["none"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_walking_the_layers_equals_the_whole(architecture: str) -> None:
    network = BUILDERS[architecture]()
    params, batch, gates = params_of(network), batch_of(SEGMENTS), network.gates()
    gates = jax.tree.map(lambda x: x * 0.7, gates)
    probe = Probe(lambda view, inputs: view.query.sum() * inputs, jnp.asarray([2.0, 3.0]))
    tap = Tap(lambda probs, visible, inputs: probs * inputs, jnp.asarray([0.5, 0.9]))

    def walk(params: Any) -> Any:
        x, probed = network.embed(params, batch), []
        for index in range(network.num_layers):
            own, own_gates = jax.tree.map(lambda leaf, index=index: leaf[index], (network.blocks(params), gates))
            own_probe, own_tap = Probe(probe.function, probe.inputs[index]), Tap(tap.function, tap.inputs[index])
            x, seen = network.block(own, x, batch, gates=own_gates, probe=own_probe, tap=own_tap)
            probed.append(seen)
        return network.finish(params, x), jnp.stack(probed)

    got = jax.jit(walk)(params)
    want = jax.jit(lambda params: network.hidden(params, batch, gates=gates, probe=probe, tap=tap))(params)
    np.testing.assert_allclose(got[0], want.states, atol=1e-5)
    np.testing.assert_allclose(got[1], want.probed, rtol=1e-4)


def test_a_network_compiles_once() -> None:
    """Equal networks are one static argument, and params and batches of equal shapes are no new program."""
    traced = []

    def states(network: Network, params: Any, batch: Any) -> jax.Array:
        traced.append(network)
        return network.hidden(params, batch).states

    compiled = jax.jit(states, static_argnums=0)
    for seed in range(2):
        network = BUILDERS["llama"]()
        compiled(network, params_of(network, seed), batch_of(SEGMENTS))
    assert len(traced) == 1
