"""DAS against torch: the paper's formulas (arXiv 2302.03241) on transformers' own models, one example at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxcl.functional.contrastive import contrast
from jaxcl.functional.importance import ImportanceSums, gate_gradients
from jaxcl.functional.soft_masks import soft_mask, soft_masks
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.passes.importance import add_domain_importance, add_general_importance
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer
from tests.parity.methods.torch_twins import (
    Example,
    assert_close,
    by_torch_names,
    make_examples,
    make_network,
    random_params,
    to_batch,
    to_torch,
)

KINDS = ("heads", "intermediate", "output")
EXAMPLES = make_examples((6, 4, 5))
RATE = 0.3


class Twins(NamedTuple):
    network: Network
    params: Any
    model: torch.nn.Module


@pytest.fixture(scope="module", params=["llama", "roberta"])
def twins(request: pytest.FixtureRequest) -> Twins:
    network = make_network(request.param)
    params = random_params(network)
    return Twins(network, params, to_torch(network, params))


class Units(NamedTuple):
    """Numbers of units, each `[layers, units]`."""

    heads: torch.Tensor
    intermediate: torch.Tensor
    output: torch.Tensor


def layers_of(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Of each layer the attention's output projection and the feed-forward's last one."""
    if model.config.model_type == "roberta":
        return [(layer.attention.output.dense, layer.output.dense) for layer in model.roberta.encoder.layer]
    return [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]


def ones(model: torch.nn.Module) -> Units:
    c = model.config
    sizes = (c.num_attention_heads, c.intermediate_size, c.hidden_size)
    return Units(*(torch.ones(c.num_hidden_layers, n, dtype=torch.float64, requires_grad=True) for n in sizes))


@contextlib.contextmanager
def gated(model: torch.nn.Module, gates: Units) -> Iterator[None]:
    """Gates on head outputs, intermediate activations and feed-forward outputs."""

    def on_input(factor: torch.Tensor) -> Callable[..., Any]:
        return lambda module, args: (args[0] * factor.repeat_interleave(args[0].shape[-1] // len(factor)),)

    def on_output(factor: torch.Tensor) -> Callable[..., Any]:
        return lambda module, args, out: out * factor

    handles = []
    for layer, (out, down) in enumerate(layers_of(model)):
        handles.append(out.register_forward_pre_hook(on_input(gates.heads[layer])))
        handles.append(down.register_forward_pre_hook(on_input(gates.intermediate[layer])))
        handles.append(down.register_forward_hook(on_output(gates.output[layer])))
    yield
    for handle in handles:
        handle.remove()


def logits_of(model: torch.nn.Module, example: Example, times: int = 1) -> torch.Tensor:
    """Scores at the example's scored positions, `[times, scored, vocab]`."""
    rows = torch.as_tensor(np.tile(example.tokens, (times, 1)))
    return model(input_ids=rows).logits[:, example.scored]


def loss_of(model: torch.nn.Module, example: Example) -> torch.Tensor:
    return functional.cross_entropy(logits_of(model, example)[0], torch.as_tensor(example.targets))


def importance_of(model: torch.nn.Module, examples: list[Example]) -> Units:
    """`1/N sum_n |d L(x_n) / d g|`."""
    singles = []
    for example in examples:
        gates = ones(model)
        with gated(model, gates):
            singles.append(torch.autograd.grad(loss_of(model, example), gates))
    return Units(*(torch.stack(kind).abs().mean(0) for kind in zip(*singles, strict=True)))


def normalised(importance: Units) -> Units:
    """`|tanh(Norm(I))|`, by layer and kind of unit."""
    return Units(*(((x - x.mean(1, True)) / x.std(1, correction=0, keepdim=True)).tanh().abs() for x in importance))


def assert_units(found: Gates, expected: Units, tolerance: float = 1e-4) -> None:
    for kind in KINDS:
        assert_close(getattr(found, kind), getattr(expected, kind), tolerance, kind)


def test_gate_gradients_of_each_example(twins: Twins) -> None:
    network, params, model = twins
    batch = to_batch(EXAMPLES, length=8, fillers=1)

    def losses(gates: Gates) -> jax.Array:
        return example_losses(network, params, network.hidden(params, batch, gates=gates).states, batch, 0)

    found = jax.jit(lambda: gate_gradients(losses, network.gates(batch.size)))()
    for row, example in enumerate(EXAMPLES):
        gates = ones(model)
        with gated(model, gates):
            expected = Units(*torch.autograd.grad(loss_of(model, example), gates))
        assert_units(jax.tree.map(lambda leaf, row=row: leaf[:, row], found), expected)
    assert not any(np.any(leaf[:, len(EXAMPLES)]) for leaf in jax.tree.leaves(found))


def test_domain_importance(twins: Twins) -> None:
    network, params, model = twins
    add = jax.jit(lambda sums, batch: add_domain_importance(network, sums, params, batch, 0))
    sums = ImportanceSums.zero(network.gates())
    for part in (EXAMPLES[:2], EXAMPLES[2:]):
        sums = add(sums, to_batch(part, length=8, fillers=3 - len(part)))
    assert sums.examples == len(EXAMPLES)
    assert_units(sums.mean(), importance_of(model, EXAMPLES))


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Stands in for dropout's factors in both libraries; the two rows of a pair are noised differently."""
    count = int(np.prod(shape))
    return ((np.random.default_rng(count).random(count) >= RATE) / (1 - RATE)).reshape(shape)


def test_general_importance_under_equal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """`KL(f1(x) || f2(x))` of two passes under different dropout, which is replaced by known factors."""
    network = make_network("roberta", hidden_dropout=RATE, attention_dropout=RATE)
    params = random_params(network)
    model = to_torch(network, params)
    monkeypatch.setattr("jaxcl.models.layer.dropout", lambda x, rate, key: x * noise(x.shape).astype(x.dtype))
    monkeypatch.setattr(functional, "dropout", lambda x, p, training, *_: x * torch.as_tensor(noise(tuple(x.shape))))

    singles, sums = [], ImportanceSums.zero(network.gates())
    for example in EXAMPLES[:2]:
        gates = ones(model)
        with gated(model.train(), gates):
            first, second = logits_of(model, example, times=2).log_softmax(-1)
        divergence = (first.exp() * (first - second)).sum(-1).mean()
        assert divergence > 0.01
        singles.append(torch.autograd.grad(divergence, gates))
        # A batch of one: its two passes are two rows.
        add = jax.jit(lambda sums, batch: add_general_importance(network, sums, params, batch, KEY, None, 0))
        sums = add(sums, to_batch([example]))
    assert sums.examples == 2
    assert_units(sums.mean(), Units(*(torch.stack(kind).abs().mean(0) for kind in zip(*singles, strict=True))))


KEY = jax.random.key(0)


class OneDomain:
    """What `DasPaper.consolidate` needs of a task."""

    name, count, key = "domain", 2, KEY
    compile = staticmethod(jax.jit)

    def __init__(self, index: int, examples: list[Example]) -> None:
        self.index, self._examples = index, examples

    def fold(self, add: Any, start: Any, *, limit: int) -> Any:
        assert limit >= len(self._examples)
        return add(start, to_batch(self._examples))


def test_normalised_and_accumulated_over_two_domains(twins: Twins) -> None:
    network, _, _ = twins
    method = DasPaper(DasPaperOptions(), network, 2)
    state = method.init(twins.params)
    expected = None
    for index in range(2):
        params, examples = random_params(network, seed=index), make_examples((5, 6, 4, 3), seed=index)
        state = method.consolidate(params, state, OneDomain(index, examples))
        now = normalised(importance_of(to_torch(network, params), examples))
        expected = now if expected is None else Units(*map(torch.maximum, expected, now))
        assert_units(state["importance"], expected, 2e-3)  # standardising magnifies rounding
        assert_units(jax.tree.map(lambda leaf, index=index: leaf[index + 1], state["history"]), now, 2e-3)


def random_importance(network: Network) -> tuple[Gates, Units]:
    rng = np.random.default_rng(3)
    leaves = [rng.random(leaf.shape).astype(np.float32) for leaf in jax.tree.leaves(network.gates())]
    return Gates(*map(jnp.asarray, leaves)), Units(*(torch.as_tensor(leaf, dtype=torch.float64) for leaf in leaves))


def masks_of(model: torch.nn.Module, importance: Units) -> dict[str, torch.Tensor]:
    """`1 - I` of the unit each weight belongs to, 1 where there is none; weights are `[out, in]`."""
    c = model.config
    width = c.hidden_size // c.num_attention_heads
    group = c.num_attention_heads // getattr(c, "num_key_value_heads", c.num_attention_heads)
    masks = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    for layer in range(c.num_hidden_layers):
        heads = importance.heads[layer]
        shared = heads.reshape(-1, group).max(1).values
        query, key = ((1 - x).repeat_interleave(width) for x in (heads, shared))
        inner, outer = 1 - importance.intermediate[layer], 1 - importance.output[layer]
        if c.model_type == "roberta":
            prefix, out = f"roberta.encoder.layer.{layer}.", "attention.output.dense"
            rows = {"attention.self.query": query, "attention.self.key": key, "attention.self.value": key}
            rows |= {"intermediate.dense": inner, "output.dense": outer}
        else:
            prefix, out = f"model.layers.{layer}.", "self_attn.o_proj"
            rows = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
            rows |= {"mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": outer}
        for name, mask in rows.items():
            masks[f"{prefix}{name}.weight"] *= mask[:, None]
            masks[f"{prefix}{name}.bias"] *= mask
        masks[f"{prefix}{out}.weight"] *= query[None, :]
    return masks


def batch_loss(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """What training minimises: the mean over all scored tokens of the batch."""
    counts = [len(example.scored) for example in examples]
    return sum(loss_of(model, e) * n for e, n in zip(examples, counts, strict=True)) / sum(counts)


def test_masks_and_masked_gradients_of_every_param(twins: Twins) -> None:
    network, params, model = twins
    importance, units = random_importance(network)
    masks = soft_masks(network.units(), network.shapes(), vars(importance))
    full = jax.tree.map(lambda mask, leaf: jnp.broadcast_to(mask, leaf.shape), masks, network.shapes())
    expected = masks_of(model, units)
    found = by_torch_names(network, full)
    for name, mask in expected.items():
        assert_close(found[name], mask, 1e-6, name)

    method = DasPaper(DasPaperOptions(contrast_weight=0.0), network, 1)
    batch = to_batch(EXAMPLES, length=8, fillers=1)

    def loss(params: Any) -> jax.Array:
        term = method.loss(params, method.init(params), batch, KEY)["loss"]
        return term.sum / term.count

    gradients = jax.jit(jax.grad(loss))(params)
    masked = by_torch_names(network, soft_mask().update(gradients, soft_mask().init(params), masks=masks)[0])
    model.zero_grad()
    batch_loss(model, EXAMPLES).backward()
    for name, param in model.named_parameters():
        assert_close(masked[name], param.grad * expected[name], what=name)


OPTIMIZER = {"learning_rate": 0.02, "weight_decay": 0.3, "eps": 1e-3, "clip_norm": 0.5}


@pytest.mark.parametrize("mask_on", ["update", "gradient"])
def test_masked_adamw_steps(twins: Twins, mask_on: str) -> None:
    """Three steps of the trainer's own program; the mask stands after Adam or before it, the decay below it."""
    network, params, _ = twins
    model = to_torch(network, params)
    importance, units = random_importance(network)
    layout = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), network.axes(), network.shapes())
    method = DasPaper(DasPaperOptions(contrast_weight=0.0, mask_on=mask_on), network, 1)
    trainer = Trainer(method, OptimizerConfig(**OPTIMIZER, schedule="constant"), layout, accumulate=1, seed=0)
    state = trainer.start_task(trainer.init(jax.tree.map(jnp.copy, params)), 3)
    state = trainer.with_method_state(state, {**state.method_state, "importance": importance})

    rate, decay = OPTIMIZER["learning_rate"], OPTIMIZER["weight_decay"]
    masks = masks_of(model, units)
    params_of = dict(model.named_parameters())
    # Biases and norms do not decay.
    decays = {
        name: decay * (name.endswith("weight") and "norm" not in name.lower().split(".")[-2]) for name in params_of
    }
    assert {name for name, value in decays.items() if value == 0} >= {n for n in params_of if n.endswith("bias")}
    adam = torch.optim.AdamW(params_of.values(), lr=rate, eps=OPTIMIZER["eps"], weight_decay=0.0)
    for step in range(3):
        examples = make_examples((6, 4, 5), seed=step)
        state, metrics = trainer.step(state, jax.device_put(to_batch(examples), layout.batch))
        model.zero_grad()
        loss = batch_loss(model, examples)
        loss.backward()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.sqrt(sum((param.grad**2).sum() for param in params_of.values()))
        assert norm > OPTIMIZER["clip_norm"]  # the clipping is at work
        before = {name: param.detach().clone() for name, param in params_of.items()}
        for name, param in params_of.items():
            param.grad *= OPTIMIZER["clip_norm"] / norm
            if mask_on == "gradient":
                param.grad *= masks[name]
        adam.step()
        with torch.no_grad():
            for name, param in params_of.items():
                mask = masks[name]
                moved = param - before[name]
                if mask_on == "update":
                    moved = mask * moved
                param.copy_(before[name] + moved - rate * decays[name] * mask * before[name])
    found, start = by_torch_names(network, state.params), by_torch_names(network, params)
    for name, param in params_of.items():
        assert_close(found[name] - start[name], param - start[name], 1e-3, name)


def contrast_of(anchor: torch.Tensor, positive: torch.Tensor, past: torch.Tensor, temperature: float) -> torch.Tensor:
    """`-1/N sum_n log(e^(s(a_n, p_n)/t) / sum_j (e^(s(a_n, p_j)/t) + e^(s(a_n, q_j)/t)))`."""
    losses = []
    for n in range(len(anchor)):
        own = [torch.exp(torch.cosine_similarity(anchor[n], p, dim=0) / temperature) for p in positive]
        other = [torch.exp(torch.cosine_similarity(anchor[n], q, dim=0) / temperature) for q in past]
        losses.append(-torch.log(own[n] / (sum(own) + sum(other))))
    return torch.stack(losses).mean()


def test_contrast_and_its_gradients() -> None:
    rng = np.random.default_rng(5)
    vectors = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3)]
    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in vectors]
    expected = contrast_of(*given, 0.3)
    gradients = torch.autograd.grad(expected, given)
    # A filler row in between changes nothing.
    real = np.array([True, True, False, True, True])
    rows = [np.insert(x, 2, 9.0, axis=0) for x in vectors]

    def loss(*vectors: jax.Array) -> jax.Array:
        total, count = contrast(*vectors, jnp.asarray(real), 0.3)
        return total / count

    value, found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*map(jnp.asarray, rows))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(found, gradients, strict=True):
        assert_close(np.asarray(one)[real], other)
        np.testing.assert_array_equal(np.asarray(one)[~real], 0.0)


def pooled(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Mean over the tokens of what the last layer gives."""
    body = model.base_model
    return torch.stack([body(input_ids=torch.as_tensor(e.tokens)[None]).last_hidden_state[0].mean(0) for e in examples])


@pytest.mark.parametrize("anchor", ["own", "language_model"])
def test_contrast_of_the_network_and_its_gradient_by_param(twins: Twins, anchor: str) -> None:
    """Without dropout the anchor is its own positive; gradients flow through all three passes."""
    network, params, model = twins
    importance, units = random_importance(network)
    options = DasPaperOptions(proxy_dropout=0.0, temperature=0.3, contrast_weight=0.7, anchor=anchor)
    method = DasPaper(options, network, 1)
    batch = to_batch(EXAMPLES, length=8, fillers=1)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        state = {**method.init(params), "importance": importance}
        terms = method.loss(params, state, batch, KEY)
        total = sum(term.weight * term.sum / term.count for term in terms.values())
        return total, terms["contrast"].sum / terms["contrast"].count

    (total, term), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model.zero_grad()
    full = pooled(model, EXAMPLES)
    with gated(model, units):
        past = pooled(model, EXAMPLES)
    contrasted = contrast_of(full, full, past, 0.3)
    expected = batch_loss(model, EXAMPLES) + 0.7 * contrasted
    expected.backward()
    assert float(term) == pytest.approx(contrasted.item(), rel=1e-5)
    assert float(total) == pytest.approx(expected.item(), rel=1e-5)
    found = by_torch_names(network, gradients)
    for name, param in model.named_parameters():
        assert_close(found[name], param.grad, what=name)
