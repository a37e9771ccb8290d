"""Methods on a network with adapters, within the real training step: what is trained, by how much, and what is kept."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.methods.base import Method
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.ewc import Ewc, EwcOptions
from jaxcl.methods.lwf import Lwf, LwfOptions
from jaxcl.methods.olora import Olora, OloraOptions
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.methods.sequential import Sequential
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import overlay, trained
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer
from tests.tiny.batches import StandInTask, make_batch, take_rows
from tests.tiny.networks import init, named, perturbed, tiny_llama
from tests.tiny.stored import collated, stored_records

NETWORK = tiny_llama(num_layers=1, lora={"rank": 2, "alpha": 3.0, "targets": ["query", "out", "up"]})
BATCH = make_batch((6, 4))
LAYOUT = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), NETWORK.axes(), NETWORK.shapes())
STEPS = 6


def make_trainer(method: Method, accumulate: int = 1, **optimizer: Any) -> Trainer:
    section = OptimizerConfig(**{"learning_rate": 0.05, "schedule": "constant", **optimizer})
    return Trainer(method, section, LAYOUT, accumulate=accumulate, seed=0)


def start(trainer: Trainer, params: Any = None) -> Any:
    return trainer.start_task(trainer.init(jax.tree.map(jnp.copy, init(NETWORK) if params is None else params)), STEPS)


def sequential(accumulate: int = 1, **optimizer: Any) -> Trainer:
    return make_trainer(Sequential(MethodOptions(), NETWORK, 1), accumulate, **optimizer)


def das() -> tuple[Method, Any, Batch]:
    """In the middle of a sequence: half of each kind of unit matters."""
    method = DasPaper(DasPaperOptions(), NETWORK, 2)
    half = jax.tree.map(lambda ones: ones * (jnp.arange(ones.shape[-1]) % 2), NETWORK.gates())
    return method, {"importance": half}, BATCH


def seekr() -> tuple[Method, Any, Batch]:
    """At a replay step, with what another model's heads had seen."""
    options = {"layer_budget": 1, "head_budget": 2, "query_budget": 3, "attention_weight": 1.0}
    method = Seekr(SeekrOptions(**options), NETWORK, 2)
    state = {"heads": jnp.array([[[0, 1], [0, 2]], [[-1, -1], [-1, -1]]])}
    teacher = perturbed(init(NETWORK), 0.2)
    whole = {**method.init(teacher), **state}
    stored = collated(method, teacher, whole, stored_records(method, teacher, whole, BATCH), 7, 3)
    return method, state, dataclasses.replace(BATCH, origin="memory", teacher=stored)


def olora() -> tuple[Method, Any, Batch]:
    return Olora(OloraOptions(), NETWORK, 2), {}, BATCH


def plain() -> tuple[Method, Any, Batch]:
    return Sequential(MethodOptions(), NETWORK, 1), {}, BATCH


def ewc() -> tuple[Method, Any, Batch]:
    return Ewc(EwcOptions(), NETWORK, 2), {}, BATCH


def lwf() -> tuple[Method, Any, Batch]:
    """On the second task, whose teacher is a fresh adapter."""
    return Lwf(LwfOptions(weight=0.1), NETWORK, 2), {"learned": jnp.int32(1)}, BATCH


@pytest.mark.parametrize(
    "case", [das, seekr, *(pytest.param(case, marks=pytest.mark.slow) for case in (plain, olora, ewc, lwf))]
)
def test_only_adapters_learn(case: Any) -> None:
    method, changes, batch = case()
    trainer = make_trainer(method, weight_decay=0.1)
    state = start(trainer)
    state = trainer.with_method_state(state, {**state.method_state, **changes})
    before, losses = named(jax.tree.map(np.array, state.params)), []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, jax.device_put(batch, LAYOUT.batch))
        losses.append(float(metrics["term/loss"]))
    assert losses[-1] < losses[0] - 0.01
    for path, leaf in named(state.params).items():
        assert np.array_equal(leaf, before[path]) == ("lora" not in path), path


@pytest.mark.parametrize(("case", "copies"), [(ewc, 2), (lwf, 1)])
def test_methods_that_keep_params_keep_those_trained(case: Any, copies: int) -> None:
    method, _, _ = case()
    params = init(NETWORK)
    kept = {path: leaf.size for path, leaf in named(method.init(params)).items() if leaf.ndim}
    assert sum(kept.values()) == copies * sum(leaf.size for leaf in jax.tree.leaves(trained(params)))


def test_the_fisher_of_adapters_is_that_of_the_whole_model_at_their_places() -> None:
    method, params = Ewc(EwcOptions(), NETWORK, 2), perturbed(init(NETWORK), 0.3)
    fisher = named(jax.jit(method.add_fisher)(method.no_fisher(params), params, BATCH).mean())

    def loss(params: Any, row: Batch) -> jax.Array:
        term = plain()[0].loss(params, {}, row, jax.random.key(0))["loss"]
        return term.sum / term.count

    slopes = [named(jax.jit(jax.grad(loss))(params, take_rows(BATCH, [row]))) for row in range(BATCH.size)]
    assert sorted(fisher) == sorted(path for path in slopes[0] if "lora" in path)
    for path, found in fisher.items():
        expected = np.mean([np.square(slope[path]) for slope in slopes], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7, err_msg=path)


def test_the_optimizer_knows_nothing_of_frozen_params() -> None:
    state = start(sequential(weight_decay=0.1))
    sizes = {path: leaf.size for path, leaf in named(state.opt_state).items() if leaf.ndim}
    assert all("lora" in path for path in sizes)
    assert sum(sizes.values()) == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained(state.params)))


def test_no_gradient_of_a_frozen_kernel_is_computed() -> None:
    """No product of the compiled program has the shape of a feed-forward kernel, 8 x 12, which nothing else has."""
    method, params = plain()[0], init(NETWORK)

    def products(part: Any) -> int:
        def loss(part: Any) -> jax.Array:
            return method.loss(overlay(params, part), {}, BATCH, jax.random.key(0))["loss"].sum

        text = jax.jit(jax.grad(loss)).lower(part).compile().as_text()
        shapes = re.findall(r"f32\[([\d,]+)\]\S* dot\(", text)
        return sum(sorted(shape.split(",")) == ["12", "8"] for shape in shapes)

    assert products(params) == 3  # of gate, up and down
    assert products(trained(params)) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_central_differences(accumulate: int) -> None:
    rate = 1e-3
    trainer = sequential(accumulate, name="sgd", b1=0, clip_norm=None, learning_rate=rate)
    params = perturbed(init(NETWORK), 0.3)
    state, metrics = trainer.step(start(trainer, params), jax.device_put(BATCH, LAYOUT.batch))
    method: Any = trainer.method

    @jax.jit
    def loss(params: Any) -> jax.Array:
        term = method.loss(params, {}, BATCH, jax.random.key(0))["loss"]
        return term.sum / term.count

    gradient = {path: (named(params)[path] - leaf) / rate for path, leaf in named(state.params).items()}
    for path in ("blocks/attention/query/lora_a", "blocks/attention/out/lora_b", "blocks/mlp/up/lora_b"):
        place = (0,) + (1,) * (gradient[path].ndim - 1)
        sides = []
        for sign in (1, -1):
            moved = {p: leaf.at[place].add(sign * 1e-2) if p == path else leaf for p, leaf in named(params).items()}
            sides.append(float(loss(jax.tree.unflatten(jax.tree.structure(params), list(moved.values())))))
        expected = (sides[0] - sides[1]) / 2e-2
        assert abs(expected) > 1e-3, path
        assert float(gradient[path][place]) == pytest.approx(expected, rel=0.02, abs=2e-4), path
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in gradient.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-3)


def test_a_restored_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    trainer = sequential()
    state, _ = trainer.step(start(trainer), BATCH)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, progress={})
        saved = checkpoints.latest()
        assert saved is not None
        restored, _ = checkpoints.restore(trainer.target, saved)
    ends = [trainer.step(one, BATCH)[0] for one in (state, restored)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_params_that_a_method_finishes_with_are_checked_and_never_shared() -> None:
    trainer = make_trainer(Olora(OloraOptions(), NETWORK, 2))
    state = start(trainer)
    assert trainer.with_params(state, state.params) is state
    with pytest.raises(ValueError, match="params: expected structure"):
        trainer.with_params(state, trained(state.params))
    wider = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, 1)), state.params)
    with pytest.raises(ValueError, match=r"params blocks/.*; the network decides"):
        trainer.with_params(state, wider)
    task: Any = StandInTask([BATCH])
    new = trainer.method.consolidate(state.params, state.method_state, task)
    state = trainer.with_method_state(state, new)
    state = trainer.with_params(state, trainer.method.final_params(state.params, state.method_state, task))
    trainer.step(state, BATCH)  # donates both, which a shared buffer would make impossible
