"""The worked examples of the docs run as they are."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.models.batch import Batch
from jaxcl.weights import families
from tests.tiny.networks import tiny_llama
from tests.tiny.runs import PAIRS, run

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def my_methods() -> types.ModuleType:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adding_a_method.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    module = types.ModuleType("my_methods")
    sys.modules["my_methods"] = module
    for block in blocks:
        exec(compile(block, "adding_a_method.md", "exec"), module.__dict__)
    return module


def test_the_family_of_the_docs_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adding_a_model.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "adding_a_model.md", "exec"), names)
    assert len(blocks) == 3


def test_the_docs_list_every_family() -> None:
    text = (DOCS / "adding_a_model.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {name for cell in table for name in re.findall(r"`([\w-]+)`", cell)} == set(families.FAMILIES)


def test_the_method_of_the_docs_trains(my_methods: types.ModuleType, tmp_path: Path) -> None:
    results = run(PAIRS, tmp_path / "run", {"name": "my_methods:Anchor", "strength": 10.0, "examples": 8})
    assert results.finished


def test_the_gradient_surgery_of_the_docs_trains(my_methods: types.ModuleType, tmp_path: Path) -> None:
    results = run(PAIRS, tmp_path / "run", {"name": "my_methods:AGem", "replay": {"fraction": 0.25}})
    assert results.finished


def test_a_gradient_is_turned_until_the_loss_on_remembered_rows_no_longer_rises(my_methods: types.ModuleType) -> None:
    method = my_methods.AGem(my_methods.AGem.Options(), None, 2)
    transform = method.transform([optax.identity()] * 4)
    state = transform.init(jnp.zeros(2))
    turned = [
        transform.update(jnp.array(gradient), state, reference=jnp.array([2.0, 0.0]), learning_rate=0.1)[0].tolist()
        for gradient in ([-3.0, 4.0], [1.0, 4.0])
    ]
    assert turned == [[0.0, 4.0], [1.0, 4.0]]  # only what points against the reference is taken away
    assert transform.update(jnp.array([-3.0, 4.0]), state, reference=None)[0].tolist() == [-3.0, 4.0]


def test_its_term_is_the_formula(my_methods: types.ModuleType) -> None:
    network = tiny_llama(num_layers=1)
    params = network.init(jax.random.key(0))
    method = my_methods.Anchor(my_methods.AnchorOptions(strength=3.0), network, 1)
    state = {
        "anchor": jax.tree.map(lambda p: p - 0.5, params),
        "importance": jax.tree.map(lambda p: jnp.full_like(p, 2.0), params),
    }
    ones = jnp.ones((1, 4), jnp.int32)
    batch = Batch(ones, ones, jnp.arange(4)[None], None, ones, jnp.ones((1, 4)), ones[:, 0], ones[:, 0])
    term = method.loss(params, state, batch, jax.random.key(1))["anchor"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(term.sum, 2.0 * 0.25 * count, rtol=1e-5)
    assert term.weight == 3.0
