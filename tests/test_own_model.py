"""The page about models that are not jaxcl's: its programs run, and do what the page says."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "own_model.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(number: int) -> dict[str, Any]:
    module: dict[str, Any] = {"__name__": "own_model"}
    exec(compile(BLOCKS[number], f"own_model.md, program {number + 1}", "exec"), module)
    return module


def test_there_are_four_programs_of_less_than_forty_lines() -> None:
    lines = [[line for line in block.splitlines() if line.strip()] for block in BLOCKS]
    assert [len(block) < 40 for block in lines] == [True] * 4


def test_das_on_dictionaries_learns_and_protects() -> None:
    found = run(0)
    importance = found["importance"]
    shared = jax.tree.map(lambda one: one[:, None], found["ones"])
    assert float(jnp.mean(found["losses"](found["params"], found["tokens"], shared))) < 0.7 * np.log(128)
    masks = found["F"].soft_masks(found["units"], found["params"], importance)
    # One backward pass gives what single examples give, one unit at a time.
    tokens, params, ones = found["tokens"][:3], found["params"], found["ones"]
    gates = jax.tree.map(lambda one: jnp.repeat(one[:, None], 3, axis=1), ones)
    slopes = found["F"].gate_gradients(lambda gates: found["losses"](params, tokens, gates), gates)
    moved = [
        found["losses"](params, tokens, {**gates, "heads": gates["heads"].at[1, :, 2].add(step)})
        for step in (1e-2, -1e-2)
    ]
    np.testing.assert_allclose(slopes["heads"][1, :, 2], (moved[0] - moved[1]) / 2e-2, rtol=0.05, atol=1e-4)
    # A head of importance 1 would not move at all.
    state = found["optimizer"].init(params)
    full = {**importance, "heads": importance["heads"].at[0, 1].set(1.0)}
    after = found["step"](params, state, full, found["tokens"])[0]
    np.testing.assert_array_equal(after["qkv"][0, :, :, 1], params["qkv"][0, :, :, 1])
    np.testing.assert_array_equal(after["out"][0, 1], params["out"][0, 1])
    assert np.all(np.any(after["qkv"][1] != params["qkv"][1], axis=(0, 1, 3)))
    assert masks["qkv"].shape == (2, 1, 1, 4, 1)


def test_seekr_on_a_flax_layer() -> None:
    found = run(1)
    # Sensitivity by its definition: the gradient of the loss in explicit attention probabilities.
    layer, x, wanted, seen = (found[name] for name in ("graph", "x", "wanted", "seen"))
    merged = found["nnx"].merge(layer, found["after"])

    def loss(probs: jax.Array) -> jax.Array:
        out = merged.out(jnp.einsum("bhqk,bkhd->bqhd", probs, merged.value(x)))
        return jnp.sum(jnp.mean(jnp.square(out - wanted), axis=(1, 2)))

    squares = jnp.sum(jnp.where(seen, jnp.square(jax.grad(loss)(found["maps"][1])), 0), axis=(0, 2, 3))
    np.testing.assert_allclose(found["sensitivity"][0], squares / found["pairs"], rtol=1e-4)
    assert found["selected"][:, 1].tolist() == sorted(np.argsort(-found["importance"][0])[:2].tolist())
    # The divergence is 0 at the teacher itself, and the mean KL of the selected rows elsewhere.
    assert abs(float(found["divergence"](found["after"]))) < 1e-6
    heads, queries, rows = found["heads"], found["queries"], found["teacher"].rows
    own = found["F"].selected_rows(found["view"](found["before"]), heads, queries)
    expected = jnp.mean(jnp.sum(jnp.where(rows > 0, rows * jnp.log(jnp.maximum(rows, 1e-30) / own), 0), axis=-1))
    np.testing.assert_allclose(found["divergence"](found["before"]), expected, rtol=1e-4)
    slope = jax.grad(found["divergence"])(found["before"])
    assert float(jnp.abs(slope["query"]["kernel"][...]).sum()) > 0
    assert float(jnp.abs(slope["value"]["kernel"][...]).sum()) == 0


def test_trainer_around_another_model() -> None:
    losses = run(2)["losses"]
    assert losses[0] == pytest.approx(np.log(64), rel=1e-3)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.slow
def test_a_network_looked_at_from_outside() -> None:
    found = run(3)
    params, batch, losses = (found[name] for name in ("params", "batch", "losses"))
    assert batch.segments.sum(axis=1).tolist() == [10, 7, 10, 5]
    assert batch.weights.sum(axis=1).tolist() == [4, 4, 4, 4]
    plain = jax.grad(lambda params: jnp.mean(losses(params)))(params)
    up = plain["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(found["gradients"]["model.layers.1.mlp.up_proj.weight"], up[1].T, rtol=1e-4, atol=1e-7)
    maps, slopes = found["maps"], found["slopes"]
    real = jnp.arange(10) < batch.segments.sum(axis=1)[:, None]
    np.testing.assert_allclose(jnp.sum(maps, axis=-1), jnp.broadcast_to(real[:, None], maps.shape[:-1]), atol=1e-5)
    # One attention weight a little larger: the loss moves by its slope, that of the other rows not at all.
    place, tap = (1, 1, 2, 5, 3), found["Tap"]
    moved = [
        losses(params, tap=tap(lambda probs, _, added: probs + added, jnp.zeros_like(maps).at[place].set(step)))
        for step in (0.05, -0.05)
    ]
    change = (moved[0] - moved[1]) / 0.1
    np.testing.assert_allclose(change, jnp.zeros(4).at[1].set(slopes[place]), rtol=0.02, atol=1e-6)
    assert abs(float(slopes[place])) > 1e-5
    # What the activation reads scaled for one row, by its projection, or by the gate.
    kernel = params["blocks"]["mlp"]["gate"]["kernel"].at[0, :, 7].multiply(1.05)
    scaled = {**params, "blocks": {**params["blocks"], "mlp": {**params["blocks"]["mlp"], "gate": {"kernel": kernel}}}}
    np.testing.assert_allclose(
        losses(scaled) - losses(params), 0.05 * found["gate_slopes"].intermediate[0, :, 7], rtol=0.1, atol=1e-6
    )
