import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.methods import METHODS, find_method
from jaxcl.methods.options import MethodOptions
from tests.tiny.batches import make_batch
from tests.tiny.networks import init, tiny_llama

OPTIONS: dict[str, Any] = {
    "seekr": {"layer_budget": 1, "head_budget": 2},
    "progressive_prompts": {"length": 3},
}
MODELS: dict[str, Any] = {"olora": {"lora": {"rank": 2}}, "progressive_prompts": {"soft_tokens": 9}}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_to_the_interface(name: str) -> None:
    cls = find_method(name)
    assert issubclass(cls.Options, MethodOptions)
    assert all(field.description for field in cls.Options.model_fields.values())
    options = cls.Options(**OPTIONS.get(name, {}))
    assert cls.Options(**json.loads(options.model_dump_json())) == options
    network = tiny_llama(num_layers=1, **MODELS.get(name, {}))
    cls.check(options, network.config)
    method = cls(options, network, num_tasks=3)
    params = init(network)
    state = method.init(params)
    terms = jax.eval_shape(method.loss, params, state, make_batch(), jax.random.key(0))
    assert "loss" in terms
    assert all(term.sum.shape == () for term in terms.values())
    assert all(np.ndim(value) <= 3 for value in method.tables(state).values())
