"""DAS on a model that sees: tower and connector have units, gates, importance, masks and pulls as the layers have."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.importance import ImportanceSums, normalise_quantile
from jaxcl.functional.row_column import importance_masks
from jaxcl.functional.soft_masks import soft_masks
from jaxcl.methods.das import Das, DasOptions
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.passes.importance import add_domain_importance
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.gates import SeeingGates
from jaxcl.models.network import Network, Params
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.batches import take_rows
from tests.tiny.networks import params_of
from tests.tiny.seeing import batch, images_of, seeing

TOWER = "vision/tower/blocks"
KINDS = ("tower_heads", "tower_intermediate", "tower_output", "connector_output")
# Of each kind, the params that all of a unit's output goes through, and the axis of its units.
OUTPUTS = {
    "tower_heads": {f"{TOWER}/out/kernel": 1},
    "tower_intermediate": {f"{TOWER}/down/kernel": 1},
    "tower_output": {f"{TOWER}/down/kernel": 2, f"{TOWER}/down/bias": 1},
    "connector_output": {"vision/connector/kernel": 1},
}
FREE = {"embed", "final_norm", "head", "vision/tower/patch", "vision/tower/position", "vision/tower/norm"}


@pytest.fixture(scope="module")
def network() -> Network:
    return seeing(image_token_id=3, init_std=0.3)


@pytest.fixture(scope="module")
def params(network: Network) -> Params:
    return params_of(network)


@pytest.fixture(scope="module")
def shown() -> Batch:
    """Three rows with up to two images, one of them with none."""
    return batch(images_of([[0, 1], [], [1]], 2), rows=3)


def random_importance(network: Network) -> SeeingGates:
    keys = iter(jax.random.split(jax.random.key(0), 7))
    return jax.tree.map(lambda leaf: jax.random.uniform(next(keys), leaf.shape), network.gates())


def masks_of(network: Network, importance: Any, shared: Any = "free") -> dict[str, Any]:
    return flatten(soft_masks(network.units(), network.shapes(), vars(importance), shared))


def test_no_param_is_without_a_mask(network: Network) -> None:
    """Importance 1 freezes what belongs to a unit, and all else where shared params are frozen too."""
    shapes, ones = flatten(network.shapes()), network.gates()
    assert set(vars(ones)) == {"heads", "intermediate", "output", *KINDS}
    for path, mask in masks_of(network, ones, "frozen").items():
        assert np.all(np.asarray(mask) == 0), path
        assert jnp.broadcast_shapes(mask.shape, shapes[path].shape) == shapes[path].shape, path
    # What belongs to no unit: embeddings, norms and the biases of attention outputs, as in the decoder.
    free = {path for path, mask in masks_of(network, ones).items() if np.any(np.asarray(mask) != 0)}
    named = {path for path in shapes if path.startswith(tuple(FREE)) or "_norm/" in path or path.endswith("out/bias")}
    assert free == named


def test_masks_of_the_tower_equal_loops_over_its_units(network: Network) -> None:
    importance = random_importance(network)
    shapes = flatten(network.shapes())
    masks = {
        path: np.broadcast_to(mask, shapes[path].shape) for path, mask in masks_of(network, importance, "mean").items()
    }
    for layer in range(2):
        for head in range(2):
            expected = 1 - importance.tower_heads[layer, head]
            for part in ("query", "key", "value"):
                np.testing.assert_allclose(masks[f"{TOWER}/{part}/kernel"][layer, :, head], expected)
                np.testing.assert_allclose(masks[f"{TOWER}/{part}/bias"][layer, head], expected)
            np.testing.assert_allclose(masks[f"{TOWER}/out/kernel"][layer, head], expected)
        for unit in range(12):
            expected = 1 - importance.tower_intermediate[layer, unit]
            np.testing.assert_allclose(masks[f"{TOWER}/up/kernel"][layer, :, unit], expected)
        for unit in range(8):
            expected = 1 - importance.tower_output[layer, unit]
            np.testing.assert_allclose(masks[f"{TOWER}/down/kernel"][layer, :, unit], expected)
        kinds = (importance.tower_heads, importance.tower_intermediate, importance.tower_output)
        mean = 1 - np.mean([np.mean(kind[layer]) for kind in kinds])
        np.testing.assert_allclose(masks[f"{TOWER}/mlp_norm/scale"][layer], mean, rtol=1e-6)
    np.testing.assert_allclose(masks["vision/connector/kernel"][5], 1 - importance.connector_output[0])
    # A norm of the decoder has the mean of the decoder's layer, and what is outside layers that of all.
    own = [np.mean(kind[1]) for kind in (importance.heads, importance.intermediate, importance.output)]
    np.testing.assert_allclose(masks["blocks/mlp_norm/scale"][1], 1 - np.mean(own), rtol=1e-6)
    assert masks["embed/embedding"].min() == masks["vision/tower/norm/scale"].min()


def scaled(params: Params, kind: str, layer: int, unit: int, factor: float) -> Params:
    """The params of a model in which a unit's output is `factor` times as large."""
    flat = dict(flatten(params))
    for path, axis in OUTPUTS[kind].items():
        own = np.array(flat[path])
        place: list[Any] = [slice(None)] * own.ndim
        place[axis] = unit
        if kind != "connector_output":
            place[0] = layer
        own[tuple(place)] *= factor
        flat[path] = jnp.asarray(own)
    return unflatten(flat)


@pytest.fixture(scope="module")
def losses(network: Network, shown: Batch) -> Any:
    @jax.jit
    def compiled(params: Params) -> jax.Array:
        return example_losses(network, params, network.hidden(params, shown).states, shown, 0)

    return lambda params: np.asarray(compiled(params), np.float64)


@pytest.fixture(scope="module")
def measured(network: Network, params: Params, shown: Batch) -> Any:
    """Importance of the whole batch."""
    return importance_of(network, params, shown)


def importance_of(network: Network, params: Params, *batches: Batch) -> Any:
    add = jax.jit(lambda sums, batch: add_domain_importance(network, sums, params, batch, chunk=0))
    sums = ImportanceSums.zero(network.gates())
    for one in batches:
        sums = add(sums, one)
    return sums.mean()


@pytest.mark.parametrize(("kind", "unit"), [(kind, unit) for kind in KINDS for unit in (0, 1)])
def test_importance_is_what_scaling_a_units_weights_does_to_each_example(
    params: Params, measured: Any, losses: Any, kind: str, unit: int
) -> None:
    """An oracle that knows nothing of gates: the weights behind a unit are scaled in the params."""
    found, step = getattr(measured, kind), 1e-2
    for layer in range(len(found)):
        more, less = (losses(scaled(params, kind, layer, unit, 1 + sign * step)) for sign in (1, -1))
        slopes = (more - less) / (2 * step)
        assert abs(slopes[1]) < 1e-4  # the row without images
        np.testing.assert_allclose(found[layer, unit], np.abs(slopes).mean(), rtol=2e-2, atol=1e-3)
    assert np.max(np.asarray(found)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_gate_is_a_unit_that_is_cut_out(
    network: Network, params: Params, shown: Batch, losses: Any, kind: str
) -> None:
    layer = 0 if kind == "connector_output" else 1
    gates = network.gates()
    closed = dataclasses.replace(gates, **{kind: getattr(gates, kind).at[layer, 1].set(0.0)})

    @jax.jit
    def gated(gates: Any) -> jax.Array:
        return example_losses(network, params, network.hidden(params, shown, gates=gates).states, shown, 0)

    np.testing.assert_allclose(gated(closed), losses(scaled(params, kind, layer, 1, 0.0)), rtol=1e-5)
    np.testing.assert_allclose(gated(gates), losses(params), rtol=1e-6)
    assert np.abs(gated(closed) - losses(params)).max() > 1e-3


def test_how_examples_are_batched_changes_no_importance(
    network: Network, params: Params, shown: Batch, measured: Any
) -> None:
    single = importance_of(network, params, *(take_rows(shown, [row]) for row in (2, 0, 1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), measured, single)


@pytest.mark.parametrize("normalisation", ["tanh", "quantile"])
def test_what_saw_no_image_is_free(network: Network, params: Params, normalisation: Any) -> None:
    method = DasPaper(DasPaperOptions(normalisation=normalisation, protected_share=1.0), network, 1)
    zero, text = ImportanceSums.zero(network.gates()), batch(None)
    add = jax.jit(lambda: method.add_domain(zero, params, text, jax.random.key(0)))
    state = method.update_state(method.init(params), add(), jnp.int32(1))
    found = vars(state["importance"])
    assert all(np.any(np.asarray(found[kind])) == (kind not in KINDS) for kind in found)
    assert normalise_quantile(jnp.zeros((1, 3)), 1.0).tolist() == [[0.0] * 3]


def test_the_contrast_reads_images_through_the_gates(network: Network, params: Params, shown: Batch) -> None:
    """With its connector closed, what is known from before does not depend on what the images show."""
    method = DasPaper(DasPaperOptions(proxy_dropout=0.1), network, 1)
    known = jax.tree.map(jnp.ones_like, network.gates())
    blind = dataclasses.replace(known, connector_output=0 * known.connector_output)
    assert shown.images is not None
    other = dataclasses.replace(shown, images=dataclasses.replace(shown.images, pixels=shown.images.pixels + 1.0))

    @jax.jit
    def past(gates: Any, given: Batch) -> jax.Array:
        return method._pooled(params, given, gates, jax.random.key(0))

    np.testing.assert_array_equal(past(blind, shown), past(blind, other))
    assert np.abs(past(known, shown) - past(known, other)).max() > 1e-3
    terms = jax.jit(method.loss)(params, {"importance": blind}, shown, jax.random.key(1))
    assert np.isfinite(terms["contrast"].sum)


def squares_by_hand(network: Network, params: Params, shown: Batch) -> dict[str, np.ndarray]:
    """Squared gradients of each row's summed loss."""

    @jax.jit
    def slope(row: Batch) -> Params:
        def loss(params: Params) -> jax.Array:
            states = network.hidden(params, row).states
            return example_losses(network, params, states, row, 0)[0] * jnp.sum(row.weights)

        return jax.grad(loss)(params)

    rows = [flatten(slope(take_rows(shown, [row]))) for row in range(shown.size)]
    return {path: sum(np.square(np.asarray(row[path], np.float64)) for row in rows) for path in rows[0]}


def test_das_measures_masks_and_pulls_every_param(network: Network, params: Params, shown: Batch) -> None:
    method = Das(DasOptions(hold="both", targets="true", evenness=0.0, general_knowledge=False), network, 1)
    add = jax.jit(lambda: method.add_true(method.no_sums(), params, shown, jax.random.key(0)))
    sums, expected = add(), squares_by_hand(network, params, shown)
    inputs, outputs = flatten(sums.total.inputs), flatten(sums.total.outputs)
    for path, axes in (("vision/connector/kernel", (0, 1)), (f"{TOWER}/up/kernel", (1, 2))):
        for side, axis in ((inputs, axes[1]), (outputs, axes[0])):
            np.testing.assert_allclose(side[path], expected[path].sum(axis=axis, keepdims=True), rtol=2e-3)
    state = method.update_state(method.init(params), sums, jnp.int32(1))
    given = method.update_args(params, state, shown, jax.random.key(0))
    for path, leaf in flatten(params).items():
        for name in ("anchor", "stiffness", "masks"):
            assert flatten(given[name])[path].shape == leaf.shape, (name, path)
        # The bias of keys moves no attention; of what is measured as 0, rounding may leave something.
        if not path.endswith("key/bias"):
            assert np.max(flatten(given["stiffness"])[path]) > 0, path
            assert np.min(flatten(given["masks"])[path]) < 1, path


def test_needs_of_units_are_means_over_their_params(network: Network, params: Params, shown: Batch) -> None:
    method = Das(DasOptions(), network, 1)
    sums = jax.jit(lambda: method.add_drawn(method.no_sums(), params, shown, jax.random.key(0)))()
    needs = method.needs(sums.total)
    masks = importance_masks(sums.total.full(method.sides()), method.sides(), strength=1.0, keep_mean=False)
    flat = {path: 1 - np.asarray(mask) for path, mask in flatten(masks).items()}
    assert {kind: found.shape for kind, found in needs.items()} == {
        kind: leaf.shape for kind, leaf in vars(network.gates()).items()
    }
    connector = flat["vision/connector/kernel"].mean(axis=0)
    np.testing.assert_allclose(needs["connector_output"], connector[None], rtol=1e-5)
    for layer in range(2):
        for unit in range(12):
            own = [*flat[f"{TOWER}/up/kernel"][layer, :, unit], flat[f"{TOWER}/up/bias"][layer, unit]]
            np.testing.assert_allclose(needs["tower_intermediate"][layer, unit], np.mean(own), rtol=1e-5)
    assert set(method.tables(method.init(params))) >= {"importance_tower_heads", "domains_connector_output"}
