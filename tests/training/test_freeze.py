"""Frozen layers and embeddings: what is frozen keeps its bits, the rest learns as it would."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.sequential import Sequential
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer
from tests.tiny.batches import make_batch
from tests.tiny.networks import init, named, tiny_llama
from tests.tiny.trainer import host

NETWORK = tiny_llama(num_layers=3)


def trainer_of(network: Network = NETWORK, **optimizer: Any) -> Trainer:
    layout = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), network.axes(), network.shapes())
    # Moments, weight decay and a rate that moves everything by much more than rounding.
    section = OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.1, clip_norm=None, **optimizer)
    return Trainer(Sequential(MethodOptions(), network, 2), section, layout, accumulate=1, seed=0)


def after_a_step(**optimizer: Any) -> dict[str, np.ndarray]:
    trainer = trainer_of(**optimizer)
    state = trainer.start_task(trainer.init(init(NETWORK)), 2)
    return named(host(trainer.step(state, make_batch())[0].params))


def test_what_is_frozen_keeps_its_bits_and_the_rest_moves_as_without() -> None:
    before, free = named(host(init(NETWORK))), after_a_step()
    for layers, embeddings in ((2, False), (3, True)):
        found = after_a_step(freeze_layers=layers, freeze_embeddings=embeddings)
        for name, value in found.items():
            if name.startswith("blocks"):
                np.testing.assert_array_equal(value[:layers], before[name][:layers], err_msg=name)
                np.testing.assert_array_equal(value[layers:], free[name][layers:], err_msg=name)
            elif embeddings and name.startswith(("embed", "head")):
                np.testing.assert_array_equal(value, before[name], err_msg=name)
            else:
                np.testing.assert_array_equal(value, free[name], err_msg=name)
    assert all(np.abs(free[name] - before[name]).max() > 1e-3 for name in before)


def test_sizes_are_checked() -> None:
    with pytest.raises(UserError, match=r"optimizer.freeze_layers: 4 is over the model's 3"):
        trainer_of(freeze_layers=4)
    adapters = tiny_llama(num_layers=3, lora={"rank": 2, "targets": ["query"]})
    with pytest.raises(UserError, match="nothing is left to train"):
        trainer_of(adapters, freeze_layers=3)
