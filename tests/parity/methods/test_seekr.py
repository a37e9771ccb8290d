"""SEEKR against torch: the paper's formulas (arXiv 2411.06171) on explicit attention maps of transformers' LLaMA."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxcl.functional.heads import HeadSums
from jaxcl.methods.passes.heads import add_forgettability, add_sensitivity
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.batch import Batch
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

LAYERS, HEADS = 2, 4
NETWORK = make_network("llama")
EXAMPLES = make_examples((6, 4, 5))
OPTIONS = {
    "layer_budget": 2,
    "head_budget": 3,
    "query_budget": 0,
    "store_logits": 0,
    "store_attention": "float32",
    "attention_weight": 10.0,
    "logit_weight": 0.3,
    "distil_heads": "rows",
}


def moved(params: Any, scale: float, seed: int) -> Any:
    """The params after a task: other, but not wholly other."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32), params)


BEFORE = random_params(NETWORK)
AFTER = moved(BEFORE, 0.1, seed=1)


class Pass(NamedTuple):
    """One example's attention maps, `heads x query x key` for each layer, and its scores where it is scored."""

    maps: tuple[torch.Tensor, ...]
    logits: torch.Tensor


def run(model: torch.nn.Module, example: Example) -> Pass:
    out = model(input_ids=torch.as_tensor(example.tokens)[None], output_attentions=True)
    for attention in out.attentions:
        if attention.requires_grad:
            attention.retain_grad()
    return Pass(out.attentions, out.logits[0, example.scored])


def cross_entropy(one: Pass, example: Example) -> torch.Tensor:
    return functional.cross_entropy(one.logits, torch.as_tensor(example.targets))


def pairs(examples: list[Example]) -> int:
    """A causal example of n tokens has n (n + 1) / 2 visible pairs; without padding all of them are real."""
    return sum(len(example.tokens) * (len(example.tokens) + 1) // 2 for example in examples)


def sensitivity_of(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Mean square of d(loss) / d(attention weight) over examples and visible pairs, `[layers, heads]`."""
    total = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for example in examples:
        one = run(model, example)
        cross_entropy(one, example).backward()
        visible = torch.ones(len(example.tokens), len(example.tokens)).tril()
        total += torch.stack([((a.grad[0] * visible) ** 2).sum((1, 2)) for a in one.maps])
    return total / pairs(examples)


def forgettability_of(before: torch.nn.Module, after: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Mean squared change of attention weights over examples and visible pairs, `[layers, heads]`."""
    total = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    with torch.no_grad():
        for example in examples:
            old, new = run(before, example).maps, run(after, example).maps
            total += torch.stack([((n[0] - o[0]) ** 2).sum((1, 2)) for o, n in zip(old, new, strict=True)])
    return total / pairs(examples)


def test_sensitivity() -> None:
    add = jax.jit(lambda sums, batch: add_sensitivity(NETWORK, sums, BEFORE, batch, 0))
    sums = HeadSums.zero(NETWORK.num_layers, NETWORK.num_heads)
    for part in (EXAMPLES[:2], EXAMPLES[2:]):
        sums = add(sums, to_batch(part, length=8, fillers=3 - len(part)))
    assert_close(sums.mean(), sensitivity_of(to_torch(NETWORK, BEFORE), EXAMPLES))


def test_forgettability() -> None:
    add = jax.jit(lambda sums, batch: add_forgettability(NETWORK, sums, BEFORE, AFTER, batch))
    sums = HeadSums.zero(NETWORK.num_layers, NETWORK.num_heads)
    for part in (EXAMPLES[:2], EXAMPLES[2:]):
        sums = add(sums, to_batch(part, length=8, fillers=3 - len(part)))
    assert_close(sums.mean(), forgettability_of(to_torch(NETWORK, BEFORE), to_torch(NETWORK, AFTER), EXAMPLES))


class OneTask:
    """What `Seekr.consolidate` needs of a task."""

    name, count, key = "task", 2, jax.random.key(0)
    compile = staticmethod(jax.jit)

    def __init__(self, index: int, before: Any, examples: list[Example]) -> None:
        self.index, self._before, self._examples = index, before, examples

    def fold(self, add: Any, start: Any, *, limit: int, memory: bool) -> Any:
        assert memory
        return add(start, to_batch(self._examples, length=7))

    def params_before(self) -> Any:
        return self._before


@pytest.mark.parametrize("importance", ["product_of_sums", "sum_of_products"])
def test_importance_and_selected_heads_over_two_tasks(importance: str) -> None:
    method = Seekr(SeekrOptions(**{**OPTIONS, "layer_budget": 1, "importance": importance}), NETWORK, 2)
    state = method.init(BEFORE)
    measured: list[tuple[torch.Tensor, torch.Tensor]] = []
    params = [BEFORE, AFTER, moved(AFTER, 0.2, seed=2)]
    for index in range(2):
        before, after = params[index : index + 2]
        examples = make_examples((5, 6, 3), seed=index + 10)
        state = method.consolidate(after, state, OneTask(index, before, examples))
        models = to_torch(NETWORK, before), to_torch(NETWORK, after)
        sensitivity = sensitivity_of(models[1], examples)
        measured.append((sensitivity / sensitivity.sum(1, keepdim=True), forgettability_of(*models, examples)))
        if importance == "product_of_sums":
            expected = sum(s for s, _ in measured) * sum(f for _, f in measured)
        else:
            expected = sum(s * f for s, f in measured)
        assert_close(method.tables(state)["importance_heads"], expected, 1e-3)
        layer = int(expected.sum(1).argmax())
        heads = sorted(expected[layer].topk(3).indices.tolist())
        assert state["heads"][index].tolist() == [[layer, head] for head in heads]


SELECTED = [[(0, 1), (1, 0), (1, 3)], [(1, 0), (1, 1), (1, 2)]]
TASKS = [0, 1, 0]


@pytest.fixture(scope="module")
def remembered() -> tuple[Seekr, Any, Batch]:
    """The method, its state, and a memory batch with the teacher that the params before the task gave."""
    method = Seekr(SeekrOptions(**OPTIONS), NETWORK, 2)
    state = {**method.init(BEFORE), "heads": jnp.array(SELECTED)}
    batch = to_batch(EXAMPLES, length=7)
    batch = dataclasses.replace(batch, task=jnp.array(TASKS))
    teacher = jax.jit(method.signals)(BEFORE, state, batch, jax.random.key(0))
    return method, state, dataclasses.replace(batch, origin="memory", teacher=teacher)


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """`KL(teacher || student)` of distributions along the last axis; what is 0 adds 0."""
    return torch.where(teacher > 0, teacher * (teacher / student).log(), 0.0).sum(-1)


def replay_terms(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Cross-entropy and logit divergence over all answer tokens; attention over queries and heads, layers, examples."""
    losses, logits, attention = [], [], []
    for example, task in zip(EXAMPLES, TASKS, strict=True):
        with torch.no_grad():
            old = run(before, example)
        new = run(after, example)
        losses.append(functional.cross_entropy(new.logits, torch.as_tensor(example.targets), reduction="none"))
        logits.append(kl(old.logits.softmax(-1), new.logits.softmax(-1)))
        layers: dict[int, list[torch.Tensor]] = {}
        for layer, head in SELECTED[task]:
            # Future keys have weight 0 in both; a query's row is over the keys up to itself.
            rows = [
                kl(old.maps[layer][0, head, q, : q + 1], new.maps[layer][0, head, q, : q + 1])
                for q in range(len(example.tokens))
            ]
            layers.setdefault(layer, []).append(torch.stack(rows))
        attention.append(torch.stack([torch.stack(heads).mean() for heads in layers.values()]).mean())
    return {
        "loss": torch.cat(losses).mean(),
        "logits": torch.cat(logits).mean(),
        "attention": torch.stack(attention).mean(),
    }


WEIGHTS = {"loss": 0.7, "logits": 0.3, "attention": 10.0}


@pytest.mark.parametrize("name", [*WEIGHTS, "all"])
def test_terms_of_a_replay_step_and_their_gradients(remembered: Any, name: str) -> None:
    """`(1 - a) cross-entropy + a logits + b attention`, each apart and all together."""
    method, state, batch = remembered
    names = list(WEIGHTS) if name == "all" else [name]

    def total(params: Any) -> jax.Array:
        terms = method.loss(params, state, batch, jax.random.key(1))
        assert terms.keys() == WEIGHTS.keys()
        return sum(terms[one].weight * terms[one].sum / terms[one].count for one in names)

    value, gradients = jax.jit(jax.value_and_grad(total))(AFTER)
    model = to_torch(NETWORK, AFTER)
    terms = replay_terms(to_torch(NETWORK, BEFORE), model)
    expected = sum(WEIGHTS[one] * terms[one] for one in names)
    assert expected.item() > 1e-3
    assert float(value) == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    found = by_torch_names(NETWORK, gradients)
    for path, param in model.named_parameters():
        gradient = torch.zeros_like(param) if param.grad is None else param.grad
        assert_close(found[path], gradient, 1e-3, path)
