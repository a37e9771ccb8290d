"""Plans: what they say of a small model, and that the kept ones hold together."""

from __future__ import annotations

import itertools
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxcl.cli import main
from jaxcl.config import load_config, parse_config
from jaxcl.data.plan import Shape
from jaxcl.errors import UserError
from jaxcl.models.network import Network
from jaxcl.models.vision_config import vision_of
from jaxcl.planning import plan as plan_module
from jaxcl.planning import search as search_module
from jaxcl.planning.hardware import CHIPS, parse_topology
from jaxcl.planning.plan import Plan, Unplaceable, as_json, plan, programs, row_shape
from jaxcl.planning.search import Arrangement, arranged, arrangements, estimate
from jaxcl.planning.step import StepPlan, bytes_per_device, compile_with_text
from jaxcl.planning.table import as_table
from jaxcl.sharding.mesh import make_mesh
from tests.tiny.runs import DECODER

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "tests" / "golden" / "plans").glob("*.json"))
SEVENTY = ("seekr_llama2_70b_v5p_4x4x4", "seekr_llama2_70b_v5e_16x16")
OTHER_FAMILIES = {  # with a kept plan of `train` and `replay`, and the least utilisation
    "qwen3_8b_v5e_4x4": 0.9,
    "qwen3_8b_v5p_2x2x4": 0.9,
    "gemma3_4b_v5e_4x4": 0.9,
    "gemma3_4b_v5p_2x2x4": 0.8,  # a small model on large chips: bound by memory
    "qwen3_30b_a3b_v5e_8x8": 0.25,  # bound by memory: a token uses 3 of 30 billion params, and all are read
    "qwen3_30b_a3b_v5p_2x2x4": 0.65,
}
LLAMA = {**DECODER, "vocab_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "max_length": 64}
PAIRS_DATA = {"prompt_length": 24, "answer_length": 8}


def config_of(method: dict[str, Any], **changes: Any) -> Any:
    return parse_config(
        {
            "output": "runs/none",
            "model": LLAMA,
            "data": PAIRS_DATA,
            "tasks": [{"name": "a", "source": "json:nowhere/a"}, {"name": "b", "source": "json:nowhere/b"}],
            "method": method,
            "training": {"batch_size": 4},
            "evaluation": {"batch_size": 4, "max_new_tokens": 4},
            **changes,
        }
    )


SEEKR = {"name": "seekr", "layer_budget": 2, "head_budget": 3, "query_budget": 5, "distil_heads": "rows"}


@pytest.fixture(autouse=True)
def without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "find_devices", lambda topology: None)


def test_every_step_of_a_method_is_planned_without_its_data() -> None:
    config = config_of(SEEKR)
    assert set(programs(config, make_mesh(config.mesh, jax.devices()[:1]))) == {
        "train",
        "replay",
        "sensitivity",
        "forgettability",
        "generate",
    }
    for name, measured in {"das_paper": {"importance", "general importance"}, "das": {"importance"}}.items():
        das = config_of({"name": name}, tasks=[{"name": "a", "source": "text:nowhere/a.txt"}], data={"length": 32})
        assert set(programs(das, make_mesh(das.mesh, jax.devices()[:1]))) == {"train", *measured}


def test_steps_are_planned_for_the_largest_rows_of_all_tasks() -> None:
    pairs, text = {"name": "a", "source": "stdlib:errno"}, {"name": "b", "source": "stdlib:python_topics"}

    def planned(*tasks: dict[str, str], length: int) -> tuple[Any, bool]:
        config = config_of({"name": "sequential"}, tasks=tasks, data={**PAIRS_DATA, "length": length})
        found = programs(config, make_mesh(config.mesh, jax.devices()[:1]))
        return row_shape(config, causal=True), "generate" in found

    assert planned(pairs, text, length=48) == planned(text, pairs, length=48) == (Shape(48, None), True)
    assert planned(pairs, text, length=16) == planned(text, pairs, length=16) == (Shape(32, 8), True)
    general = {**PAIRS_DATA, "general": {"source": "stdlib:python_topics", "share": 0.1}, "length": 48}
    assert row_shape(config_of({"name": "sequential"}, tasks=[pairs], data=general), causal=True) == Shape(48, None)
    # Equally long, with more scores.
    assert planned(pairs, text, length=32) == (Shape(32, None), True)
    assert planned(text, length=16) == (Shape(16, None), False)


def test_only_what_is_trained_on_is_packed() -> None:
    config = config_of(SEEKR, data={**PAIRS_DATA, "pack_pairs": True})
    found = programs(config, make_mesh(config.mesh, jax.devices()[:1]))
    scored = {name: one.arguments["batch"].targets.shape[1] for name, one in found.items() if name != "generate"}
    assert scored == {"train": 32, "replay": 8, "sensitivity": 8, "forgettability": 8}


def test_what_stands_before_prompts_is_planned_for() -> None:
    model = {**LLAMA, "soft_tokens": 6}
    config = config_of({"name": "progressive_prompts", "length": 3}, model=model)
    found = programs(config, make_mesh(config.mesh, jax.devices()[:1]))
    assert found["train"].arguments["batch"].tokens.shape == (4, 24 + 8 + 2 * 3)
    assert found["generate"].arguments["batch"][0].shape == (4, 24 + 2 * 3)


def test_plan_of_a_small_model_adds_up() -> None:
    found = plan(config_of(SEEKR), "v5e:1x1", ["train", "replay"])
    params = 4 * found.parameters
    train = found.steps["train"]
    assert train.arguments["params"] == params
    # Two moments; and the count of steps with them.
    assert 2 * params <= train.arguments["optimizer"] <= 2 * params + 64
    # 6 operations a token for each param in a matrix: all but embedding and norms, and the head at scored positions.
    tokens, scored, attention = 4 * 32, 4 * 8, 3 * 6 * 2 * 4 * 32 * 32 * 16
    layers = 3 * (4 * 16 * 16 + 3 * 16 * 32)
    assert train.flops == pytest.approx(6 * (layers * tokens + 64 * 16 * scored) + attention, rel=0.15)
    assert found.steps["replay"].flops > train.flops
    assert found.fits
    assert found.compiler == "host"
    assert found.roofline_seconds == max(found.steps["replay"].seconds.values())
    content = json.loads(as_json(found))
    assert {"fits", "bytes_per_chip", "chip_memory", "flops", "roofline_seconds"} <= content.keys()
    table = as_table(found)
    assert "not for a TPU" in table
    assert "fits:" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9:2x2"], "kinds: v4, v5e, v5p, v6e, l4, rtx4090"),
        (["--topology", "v5e"], "such as v5e:4x4"),
        (["--topology", "v5e:2x2", "--mesh", "fsdp=3"], "mesh: data=-1, fsdp=3"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "quickstart_seekr.yaml"
    assert main(["plan", str(config), *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_what_lies_beside_a_measurement_counts() -> None:
    """Between tasks: the moments stay, and forgettability reads the params before the task as well."""
    found = plan(config_of(SEEKR), "v5e:1x1", ["sensitivity", "forgettability"])
    params = 4 * found.parameters
    unread = 4 * (64 * 16 + 16)  # output head and final norm, which attention does not need
    least = {"sensitivity": 3 * params, "forgettability": 4 * params - 2 * unread}
    for name, step in found.steps.items():
        assert step.arguments["optimizer"] >= 2 * params
        assert step.bytes_per_chip - step.activations >= least[name]


def test_measurements_between_tasks_see_micro_batches() -> None:
    config = config_of(SEEKR, training={"batch_size": 8, "accumulate": 4})
    found = programs(config, make_mesh(config.mesh, jax.devices()[:1]))
    assert found["train"].arguments["batch"].size == found["replay"].arguments["batch"].size == 8
    assert found["sensitivity"].arguments["batch"].size == found["forgettability"].arguments["batch"].size == 2


def test_entries_of_the_cache_that_only_a_tpu_can_read_raise_no_warning() -> None:
    class Lowered:
        """Stands for a program for TPUs, compiled before: jax warns and compiles it again."""

        def compile(self, **_: Any) -> Any:
            warnings.warn("Error reading persistent compilation cache entry for 'jit_step'", stacklevel=1)
            return self

        def as_text(self) -> str:
            return "HloModule"

    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        assert compile_with_text(Lowered())[1] == "HloModule"
    assert not raised


def test_search_splits_whole_heads_and_whole_batches() -> None:
    config = config_of({"name": "sequential"}, training={"batch_size": 8})
    found = list(arrangements(config, 8))
    assert found
    for one in found:
        assert one.data * one.fsdp * one.tensor == 8
        assert 4 % one.tensor == 0
        assert 8 % (one.data * one.fsdp * one.accumulate) == 0
    assert arranged(config, found[0]).mesh.tensor == found[0].tensor


def test_estimates_know_what_saves_memory() -> None:
    config = config_of({"name": "sequential"}, training={"batch_size": 8})
    chip = CHIPS["v5e"]

    def needs(*arrangement: Any) -> float:
        return estimate(config, Arrangement(*arrangement), chip).bytes

    assert needs(1, 8, 1, "full", 1) < needs(1, 8, 1, "dots", 1) < needs(1, 8, 1, "none", 1)
    assert needs(1, 4, 1, "none", 2) < needs(1, 4, 1, "none", 1)
    assert needs(1, 8, 1, "full", 1) < needs(8, 1, 1, "full", 1)
    twice = Arrangement(1, 8, 1, "full", 1)
    once = Arrangement(1, 8, 1, "dots", 1)
    assert estimate(config, twice, chip).seconds > estimate(config, once, chip).seconds


MIXTURE = {**LLAMA, "num_experts": 8, "experts_per_token": 2, "expert_size": 16}


def test_of_experts_active_operations_are_counted() -> None:
    """Products of a dense model of equal size, two experts of 16 units for one of 32; routers come on top."""
    mixed, dense = (plan(config_of(SEEKR, model=model), "v5e:1x1", ["train"]) for model in (MIXTURE, LLAMA))
    router = 6 * 3 * 16 * 8 * 4 * 32  # operations x layers x embed x experts x tokens
    assert mixed.flops == pytest.approx(dense.flops + router, rel=1e-3)
    network = Network.create(config_of(SEEKR, model=MIXTURE).model)
    assert mixed.parameters == network.num_params == mixed.active_parameters + 3 * (8 - 2) * 3 * 16 * 16
    assert dense.active_parameters is None
    assert "active" in as_table(mixed)
    assert "active" not in as_table(dense)


VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "image_size": 16, "patch_size": 4},
    **{"shuffle": 2, "image_token_id": 6},
}


def test_of_images_the_towers_operations_are_counted() -> None:
    """By hand: 16 patches per image through the tower, 4 states of 4 patches each through the connector."""
    config = config_of(SEEKR, model={**LLAMA, "vision": VISION})
    plans = {count: plan(config, "v5e:1x1", ["train", "replay"], count) for count in (None, 0, 2, 4)}
    text, two, four = (plans[count].steps["train"] for count in (0, 2, 4))
    assert plans[None].images == 6  # of 4 tokens each, in prompts of 24
    assert text.vision_flops is None
    assert text.flops == plan(config_of(SEEKR), "v5e:1x1", ["train"]).steps["train"].flops
    patches = 4 * 2 * 16  # rows, images
    layers = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    attention = 2 * 7 * 2 * 8 * 16 * 16 * 16  # of layers, products (scores twice), images of all rows, patches, width
    # The patches' own kernel has a gradient, and pixels have none.
    first, connector = 3 * 4 * 4 * 16 * patches, 64 * 16 * patches / 4
    expected = 6 * layers * patches + attention + 4 * first + 6 * connector
    assert two.vision_flops == pytest.approx(expected, rel=0.02)
    assert two.flops == pytest.approx(text.flops + two.vision_flops, rel=1e-3)
    assert four.vision_flops == pytest.approx(2 * two.vision_flops, rel=1e-3)
    pixels, places = 4 * 2 * 16 * 16 * 3, 4 * 4 * 32
    assert two.arguments["batch"] == text.arguments["batch"] + pixels + places
    replay = plans[2].steps["replay"]
    assert replay.vision_flops == two.vision_flops
    assert replay.arguments["batch"] > two.arguments["batch"]
    row = next(line for line in as_table(plans[2]).splitlines() if line.startswith("tower and connector"))
    assert row.split()[3:5] == [f"{100 * two.vision_flops / two.flops:.0f}", "%"]
    assert "tower" not in as_table(plans[0])


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        ({**LLAMA, "vision": VISION}, 7, "images: 7 per row; a prompt of 24 tokens has room for 6 of 4 each"),
        (LLAMA, 1, r"images: 1 per row; the model does not see \(model.vision is none\)"),
    ],
)
def test_images_that_a_row_cannot_hold_are_refused(model: dict[str, Any], images: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(config_of(SEEKR, model=model), "v5e:1x1", ["train"], images)


def test_generation_is_planned_with_images() -> None:
    config = config_of(SEEKR, model={**LLAMA, "vision": VISION})
    found = programs(config, make_mesh(config.mesh, jax.devices()[:1]), 3)
    assert found["generate"].arguments["batch"][2].pixels.shape == (4, 4, 16, 16, 3)  # a power of 2
    assert plan(config, "v5e:1x1", ["generate"], 3).steps["generate"].vision_flops


def test_estimates_and_meshes_know_the_tower() -> None:
    config = config_of({"name": "sequential"}, model={**LLAMA, "vision": VISION}, training={"batch_size": 8})
    assert {one.tensor for one in arrangements(config, 4)} == {1, 2}  # of 2 heads
    text, one, six = (estimate(config, Arrangement(1, 1, 1, "full", 1), CHIPS["v5e"], n) for n in (0, 1, 6))
    assert text.bytes < one.bytes < six.bytes
    assert six.seconds - text.seconds == pytest.approx(6 * (one.seconds - text.seconds))
    alone = estimate(
        config_of({"name": "sequential"}, training={"batch_size": 8}), Arrangement(1, 1, 1, "full", 1), CHIPS["v5e"]
    )
    assert text.seconds == pytest.approx(alone.seconds)


def test_estimates_know_that_few_experts_compute() -> None:
    chip, one = CHIPS["v5e"], Arrangement(1, 1, 1, "full", 1)
    few, all_of_them = (
        estimate(config_of({"name": "sequential"}, model={**MIXTURE, "experts_per_token": count}), one, chip)
        for count in (2, 8)
    )
    assert few.seconds < all_of_them.seconds
    assert few.bytes < all_of_them.bytes


def test_search_splits_whole_experts() -> None:
    config = config_of({"name": "sequential"}, model={**MIXTURE, "num_experts": 6}, training={"batch_size": 8})
    assert {one.tensor for one in arrangements(config, 8)} == {1, 2}


def test_low_bits_count_as_much_as_bfloat16_saves() -> None:
    """Without accumulation the gradient is bfloat16, too."""

    def needs(dtype: str, accumulate: int) -> float:
        compute = {"param_dtype": dtype, "dtype": "bfloat16"}
        config = config_of({"name": "sequential"}, training={"batch_size": 8}, model={**LLAMA, "compute": compute})
        return estimate(config, Arrangement(1, 1, 1, "full", accumulate), CHIPS["v5e"]).bytes

    params = Network.create(config_of({"name": "sequential"}, model=LLAMA).model).num_params
    assert needs("float32", 2) == needs("bfloat16", 2)
    assert needs("float32", 1) - needs("bfloat16", 1) == 2 * params


def test_a_plan_counts_low_bits_to_the_optimizer() -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        config = config_of({"name": "sequential"}, model={**LLAMA, "compute": {"param_dtype": dtype}})
        found = programs(config, make_mesh(config.mesh, jax.devices()[:1]))["train"].arguments
        sizes[dtype] = {
            name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found[name]))
            for name in ("params", "optimizer")
        }
    params = sizes["bfloat16"]["params"]
    assert sizes["float32"]["params"] == 2 * params
    assert sizes["bfloat16"]["optimizer"] - sizes["float32"]["optimizer"] == params  # 2 bytes each


@pytest.mark.parametrize(("how", "each"), [("int8", 1.0), ("nf4", 0.5)])
def test_a_plan_counts_frozen_weights_as_they_are_held(how: str, each: float) -> None:
    """Of 64 x 64 numbers of a projection, a byte or half a byte each, and 64 scales of 4 bytes."""
    sizes = {"hidden_size": 64, "head_dim": 64, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 64}
    model = {**LLAMA, **sizes, "lora": {"rank": 2}, "quantise": how}
    config = config_of({"name": "sequential"}, model=model, training={"batch_size": 1})
    found = plan(config, "l4:1x1", ["train"])
    kernels = 3 * 7 * (64 * 64 * each + 64 * 4)
    rest = 4 * (2 * 64 * 64 + 7 * 64)  # embedding, head, norms
    adapters = 4 * 3 * 2 * (2 * 64 + 2 * 64)
    train = found.steps["train"]
    assert train.arguments["params"] == kernels + rest + adapters
    assert 2 * adapters <= train.arguments["optimizer"] <= 2 * adapters + 64
    assert found.parameters == 3 * 7 * 64 * 64 + (rest + adapters) / 4
    assert found.chip_memory == 22 * 2**30
    assert "a GPU needs no more memory" in as_table(found)


def test_estimates_know_what_is_frozen() -> None:
    def needs(**changes: Any) -> float:
        config = config_of({"name": "sequential"}, model={**LLAMA, **changes}, training={"batch_size": 8})
        return estimate(config, Arrangement(1, 1, 1, "full", 2), CHIPS["v5e"]).bytes

    # Moments (8 bytes) and gradient (4) of all, or of the adapters of 3 layers alone; int8 saves 3 bytes of 4.
    kernels, scales = 3 * (4 * 16 * 16 + 3 * 16 * 32), 3 * (4 * 16 + 2 * 32 + 16)
    everything = Network.create(config_of({"name": "sequential"}, model=LLAMA).model).num_params
    adapters = 3 * 2 * 2 * (16 + 16)
    lora = {"rank": 2}
    assert needs() - needs(lora=lora) == 12 * everything - 16 * adapters
    assert needs(lora=lora) - needs(lora=lora, quantise="int8") == 3 * kernels - 4 * scales


@pytest.mark.parametrize(("model", "utilisation"), OTHER_FAMILIES.items())
def test_other_families_have_plans_whose_replay_costs_hardly_more(model: str, utilisation: float) -> None:
    kept = _kept(f"seekr_{model}")
    assert kept.fits
    plain, replay = kept.steps["train"], kept.steps["replay"]
    assert plain.flops < replay.flops <= 1.03 * plain.flops  # type: ignore[operator]
    assert replay.utilisation >= utilisation  # type: ignore[operator]


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_seven_billion_params_with_adapters_fit_one_gpu_of_24_gb(how: str) -> None:
    kept = _kept(f"seekr_llama2_7b_{how}_l4")
    assert kept.parameters > 6.7e9
    assert kept.fits
    assert kept.chip_memory < 24e9
    assert kept.bytes_per_chip < 16e9
    assert kept.steps["replay"].flops <= 1.03 * kept.steps["train"].flops  # type: ignore[operator]


def _kept(name: str) -> Plan:
    path = ROOT / "tests" / "golden" / "plans" / f"{name}.json"
    return Plan.model_validate(json.loads(path.read_text())["plan"])


def test_search_says_when_nothing_can_be_split() -> None:
    from jaxcl.planning.search import search

    with pytest.raises(UserError, match=r"training.batch_size: 4 rows cannot be split over 64 chips"):
        search(config_of({"name": "sequential"}), "v5p:4x4x4", "train")


def test_the_loop_over_heads_is_counted_as_the_method_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 heads in 3 layers: four per layer."""
    trips: list[int] = []

    def record(*args: Any, loop_trips: int, **kwargs: Any) -> StepPlan:
        trips.append(loop_trips)
        return StepPlan(fits=True, bytes_per_chip=1.0, arguments={}, compile_seconds=0.0)

    monkeypatch.setattr(plan_module, "plan_step", record)
    plan(config_of({**SEEKR, "layer_budget": 3, "head_budget": 12}), "v5e:1x1", ["replay"])
    assert trips == [4]


def test_a_step_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^steps: no reply here; allowed: train, replay, "):
        plan(config_of(SEEKR), "v5e:1x1", ["reply"])


def searched(monkeypatch: pytest.MonkeyPatch, answer: Any) -> Any:
    """Search on 4 chips, where `answer` stands for the compiler: from (number of the attempt) to a time or an error."""
    attempts: list[int] = []

    def compiled(config: Any, topology: str, steps: Any, *_: object) -> Plan:
        attempts.append(len(attempts))
        seconds = answer(attempts[-1])
        step = StepPlan(fits=True, bytes_per_chip=1.0, arguments={}, compile_seconds=0.0, roofline_seconds=seconds)
        return Plan(
            topology=topology,
            compiler="tpu",
            mesh=config.mesh.model_dump(),
            batch_size=8,
            accumulate=1,
            remat="none",
            parameters=1,
            chip_memory=2.0,
            fits=True,
            bytes_per_chip=1.0,
            roofline_seconds=seconds,
            steps={"train": step},
            versions={},
        )

    monkeypatch.setattr(search_module, "plan", compiled)
    return search_module.search(config_of({"name": "sequential"}, training={"batch_size": 8}), "v5e:2x2", "train", 3)


def test_search_goes_past_meshes_that_chips_cannot_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(attempt: int) -> float:
        if attempt < 2:
            raise Unplaceable("mesh: no assignment")
        return 10.0 - attempt

    assert searched(monkeypatch, answer).roofline_seconds == 6.0  # attempts 2, 3 and 4 are the three compiled


def test_search_prefers_a_known_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [None, 3.0, 2.0]
    assert searched(monkeypatch, lambda attempt: times[attempt]).roofline_seconds == 2.0


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_kept_plans_are_of_the_configurations_as_they_are(path: Path) -> None:
    """What needs no TPU compiler to be known: sizes of model, rows and chip, and least times by its speeds."""
    content = json.loads(path.read_text())
    found = Plan.model_validate(content["plan"])
    words = shlex.split(content["command"])
    assert words[:2] == ["jaxcl", "plan"]
    overrides = itertools.takewhile(lambda word: not word.startswith("--"), words[3:])
    config = load_config(ROOT / words[2], list(overrides))
    assert (found.batch_size, found.accumulate) == (config.training.batch_size, config.training.accumulate)
    if "--search" not in words:  # which chooses it
        assert found.remat == config.model.compute.remat
    network, chip = Network.create(config.model), parse_topology(found.topology).chip
    assert found.parameters == network.num_params
    assert found.chip_memory == pytest.approx(chip.memory, rel=1e-5)
    split, rows = found.mesh["fsdp"] * found.mesh["tensor"], found.mesh["data"] * found.mesh["fsdp"]
    vision = vision_of(config.model)
    shape = row_shape(config, network.causal, found.images if vision else None)
    # Images are bytes, and each position has a number that says which of their states it is.
    shown = shape.length + shape.images * 3 * vision.image_size**2 / 4 if vision else 0
    scored = 3 * shape.predict if shape.predict is not None else 2 * shape.length
    for name, step in found.steps.items():
        assert step.arguments["params"] == pytest.approx(bytes_per_device(network.shapes()) / split, rel=1e-2)
        if name != "replay":  # which has what the method stores in its batch as well
            numbers = 3 * shape.length + scored + 2 + shown
            parts = 1 if name == "train" else found.accumulate  # between tasks, micro-batches are measured
            expected = 4 * numbers * found.batch_size / rows / parts  # six digits of it are kept
            assert step.arguments["batch"] == pytest.approx(expected, rel=1e-6)
        assert step.fits == (step.bytes_per_chip <= chip.memory)
        assert step.bytes_per_chip >= sum(step.arguments.values()) * 0.99
        assert step.seconds["compute"] == pytest.approx(step.flops / chip.flops, rel=1e-4)
        assert step.seconds["memory"] == pytest.approx(step.bytes / chip.bandwidth, rel=1e-4)
    if path.stem in ("seekr_llama2_7b_v5e_4x4", "seekr_llama2_7b_v5e_2x4", *SEVENTY):
        plain, replay = found.steps["train"], found.steps["replay"]
        assert replay.flops <= 1.03 * plain.flops
        assert replay.bytes <= 1.05 * plain.bytes
    if "tokens" in content:
        seen = sum(leaf.size for leaf in jax.tree.leaves(network.shapes().get("vision", {})))
        active = (found.active_parameters or found.parameters) - seen
        expected = content["passes"] * 2 * active * content["tokens"] / (found.mesh["data"] * split)
        train = found.steps["train"]
        assert train.flops - (train.vision_flops or 0) == pytest.approx(expected, rel=0.2)
        if vision:  # attention to all patches, a fifth, comes on top
            patches = found.batch_size * found.images * vision.side**2 / (found.mesh["data"] * split)
            assert train.vision_flops == pytest.approx(1.2 * content["passes"] * 2 * seen * patches, rel=0.15)
