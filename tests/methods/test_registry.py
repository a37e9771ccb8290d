import json
import sys
from typing import Any

import jax
import numpy as np
import pytest
from methods_helpers import init, make_batch, tiny_llama

from jaxcl.methods import METHODS
from jaxcl.methods.base import MethodConfig

OPTIONS: dict[str, Any] = {
    "seekr": {"layer_budget": 1, "head_budget": 2},
    "progressive_prompts": {"length": 3},
}
MODELS: dict[str, Any] = {"olora": {"lora": {"rank": 2}}, "progressive_prompts": {"soft_tokens": 9}}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_to_the_interface(name: str) -> None:
    cls = METHODS[name]
    assert issubclass(cls.Config, MethodConfig)
    assert cls.__doc__
    assert all(field.description for field in cls.Config.model_fields.values())
    options = cls.Config(**OPTIONS.get(name, {}))
    assert cls.Config(**json.loads(options.model_dump_json())) == options
    network = tiny_llama(num_layers=1, **MODELS.get(name, {}))
    cls.check(options, network.config)
    method = cls(options, network, num_tasks=3)
    params = init(network)
    state = method.init(params)
    terms = jax.eval_shape(method.loss, params, state, make_batch(), jax.random.key(0))
    assert "loss" in terms
    assert all(term.sum.shape == () for term in terms.values())
    assert all(np.ndim(value) <= 3 for value in method.tables(state).values())


def test_only_joint_training_is_joint() -> None:
    assert [name for name, cls in METHODS.items() if cls.joint] == ["joint"]


def test_only_separate_models_are_individual() -> None:
    assert [name for name, cls in METHODS.items() if cls.individual] == ["one"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_opens_with_what_it_is(name: str) -> None:
    assert len((sys.modules[METHODS[name].__module__].__doc__ or "").split()) > 10


def test_plain_records_are_stacked() -> None:
    method = METHODS["sequential"](MethodConfig(), tiny_llama(), 1)
    records = [method.trim({"x": np.full(2, value)}) for value in (1, 2)]
    assert method.collate(records, None)["x"].tolist() == [[1, 1], [2, 2]]  # type: ignore[arg-type]
