"""Plans by the TPU compiler, which needs no TPU: `pip install libtpu`."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from jaxcl.config import ExperimentConfig, parse_config
from jaxcl.errors import UserError
from jaxcl.planning.plan import plan
from jaxcl.planning.search import search

pytestmark = [
    pytest.mark.optimised,  # compiled programs are read
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

LAYERS, HIDDEN, WIDE, VOCAB, HEADS, LENGTH, SCORED, ROWS = 3, 512, 1024, 1024, 4, 256, 64, 4


PLAIN = {"name": "sequential"}


def config_of(method: dict[str, Any] = PLAIN, model: Any = None, **mesh: int) -> ExperimentConfig:
    return parse_config(
        {
            "output": "runs/none",
            "model": {
                "architecture": "llama",
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": WIDE,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "num_kv_heads": HEADS,
                "max_length": 512,
                "tie_embeddings": False,
                "compute": {"dtype": "bfloat16", "remat": "full"},
                **(model or {}),
            },
            "data": {"prompt_length": LENGTH - SCORED, "answer_length": SCORED},
            "tasks": [{"name": "a", "source": "json:a"}, {"name": "b", "source": "json:b"}],
            "method": method,
            "training": {"batch_size": ROWS},
            "mesh": mesh,
        }
    )


def test_a_step_for_a_tpu_counts_every_layer_and_its_attention() -> None:
    found = plan(config_of(fsdp=2, tensor=2), "v5e:2x2", ["train"])
    step = found.steps["train"]
    assert found.compiler == "tpu"
    assert found.fits
    # By hand, of one of 4 chips: a layer's products run forward, again for the backward pass, and twice in it; the
    # head three times, at scored positions. Splash attention: two products forward and again, three and four backward,
    # half of them behind a causal mask.
    products = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE) * ROWS * LENGTH * 2
    head = HIDDEN * VOCAB * ROWS * SCORED * 2
    attention = LAYERS * ROWS * LENGTH * LENGTH * HIDDEN * 2 / 2
    assert step.flops == pytest.approx((4 * products + 3 * head + (2 + 2 + 3 + 4) * attention) / 4, rel=0.05)
    # Every layer's params are gathered for the forward pass and for the backward pass.
    gathered = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE) / 4 * 2
    assert step.collectives["all-gather"].bytes >= 2 * gathered
    assert step.collectives["all-reduce"].runs >= 2 * LAYERS
    assert 0 < step.utilisation <= 1


def test_a_step_with_experts_counts_what_a_token_goes_through() -> None:
    """Two experts of half the width are a dense layer's products; routers come on top.

    So does `down`, once more than in a dense layer: the gradient of the routers' factors needs its results.
    """
    model = {"num_experts": 8, "experts_per_token": 2, "expert_size": WIDE // 2}
    dense, mixed = (
        plan(config_of(fsdp=2, tensor=2, model=own), "v5e:2x2", ["train"]).steps["train"] for own in ({}, model)
    )
    router = LAYERS * 4 * HIDDEN * 8 * ROWS * LENGTH * 2 / 2  # of each of two parts of the batch
    down = LAYERS * HIDDEN * WIDE * ROWS * LENGTH * 2 / 4
    assert mixed.flops == pytest.approx(dense.flops + router + down, rel=0.01)


def test_distilling_heads_gathers_no_queries_and_keys_over_tensor() -> None:
    """Beside what a plain step sends, only the selected heads' rows go round: a head of each example a turn."""
    queries, turns = 20, 1
    method = {
        "name": "seekr",
        "layer_budget": LAYERS,
        "head_budget": LAYERS,
        "query_budget": queries,
        "distil_heads": "rows",
    }
    found = plan(config_of(method, fsdp=2, tensor=2), "v5e:2x2", ["train", "replay"])
    plain, replay = (found.steps[name].collectives for name in ("train", "replay"))
    assert replay["all-gather"].bytes == pytest.approx(plain["all-gather"].bytes, rel=0.02)
    row = (ROWS // 2) * (LENGTH + queries) * (HIDDEN // HEADS) * 2  # bytes of a head's keys and queries, bfloat16
    # Forward and backward; the gradient of the keys goes back in float32.
    extra = replay["all-reduce"].bytes - plain["all-reduce"].bytes
    assert 0 < extra < LAYERS * turns * row * 4 * 2
    assert LAYERS * turns * row * 4 * 2 < LAYERS * (ROWS // 2) * LENGTH * HIDDEN * 2 * 2 * 3  # whole, thrice a step


def test_programs_that_jax_cannot_print_are_read() -> None:
    """jax 0.10 fails at instructions that the compiler writes for v5p."""
    method = {
        "name": "seekr",
        "layer_budget": LAYERS,
        "head_budget": LAYERS,
        "query_budget": 20,
        "distil_heads": "rows",
    }
    found = plan(config_of(method, fsdp=4), "v5p:2x2x1", ["train", "replay"])
    plain, replay = (found.steps[name] for name in ("train", "replay"))
    assert plain.flops < replay.flops < 1.2 * plain.flops
    assert replay.collectives


def test_search_finds_an_arrangement_that_fits() -> None:
    found = search(config_of(), "v5e:2x2", "train", compile_at_most=1)
    assert found.fits
    assert found.mesh["data"] * found.mesh["fsdp"] * found.mesh["tensor"] == 4


def test_a_grid_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^topology v5e:3x5"):
        plan(config_of(), "v5e:3x5", ["train"])
