"""The testbed in `benchmarks/frontier`: what is measured, recorded, chosen and run."""

import argparse
import dataclasses
import io
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.frontier import __main__ as driver
from benchmarks.frontier import point as points
from benchmarks.frontier import records as records_module
from benchmarks.frontier import testbeds, worker
from benchmarks.frontier.data import write_domain, write_task
from benchmarks.frontier.figures import around, draw_frontier, draw_sensitivity
from benchmarks.frontier.methods import RIVALS, Rival, beyond, cross, option_of, tuning_points, with_option
from benchmarks.frontier.records import Point, Record, append, file_of, read
from benchmarks.frontier.summary import best_settings, tables
from benchmarks.frontier.testbeds import TESTBEDS
from jaxcl.config import parse_config
from jaxcl.methods.registry import find_method
from jaxcl.models.batch import Batch
from jaxcl.run import sequence
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig, make_parts
from tests.tiny.networks import tiny_llama
from tests.tiny.trainer import TinyMethod, make_params, make_rows, one_device

BENCHMARK_FILES = os.environ.get("JAXCL_DATA")  # tests do not see it
EWC = Point("text", "A", "ewc", "ewc", {"strength": 10.0}, 1e-3, 0)


def results(**values: Any) -> dict[str, Any]:
    base = {"final": 4.0, "bwt": -0.5, "anytime": 3.9, "learned": 3.8, "drift": 0.6, "divergence": [0.1, 0.3],
            "kept_bytes": 2_000_000, "seconds": {"cpu": 40.0}}  # fmt: skip
    return {**base, **values}


# One point


def test_a_rate_in_the_optimizers_state_is_a_learning_rate() -> None:
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    method = points.with_rate(TinyMethod)()
    transform = method.transform(make_parts(OptimizerConfig(weight_decay=0.1)))
    plain = TinyMethod().transform(make_parts(OptimizerConfig(weight_decay=0.1)))
    state, expected_state = transform.init(params), plain.init(params)
    state = state._replace(rate=jnp.float32(0.25))
    for step in range(3):
        gradient = jax.tree.map(lambda leaf, step=step: leaf * (step - 0.7), params)
        found, state = transform.update(gradient, state, params, learning_rate=jnp.float32(0.4))
        expected, expected_state = plain.update(gradient, expected_state, params, learning_rate=jnp.float32(0.1))
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), found, expected)
    assert state.rate == 0.25


def test_a_rate_lasts_through_all_tasks_and_changes_without_another_trace() -> None:
    method = points.with_rate(TinyMethod)()
    section = OptimizerConfig(learning_rate=1.0, name="sgd", b1=0.0, clip_norm=None, schedule="constant")
    trainer = points.PointTrainer(method, section, one_device(), accumulate=1, seed=0)
    batch = place_batch(make_rows(0), trainer.layout.batch)
    moved = {}
    for rate in (0.5, 0.125):
        trainer.set(rate, seed=3)
        state = trainer.start_task(trainer.start_task(trainer.init(make_params()), 2), 2)
        state, metrics = trainer.step(state, batch)
        moved[rate] = float(metrics["update_norm"])
    assert moved[0.5] == pytest.approx(4 * moved[0.125])
    assert method.traces == 1


def test_a_rate_is_found_within_the_state_of_averaging() -> None:
    section = OptimizerConfig(learning_rate=1.0, name="sgd", b1=0.0, clip_norm=None, schedule="constant", average="ema")
    trainer = points.PointTrainer(points.with_rate(TinyMethod)(), section, one_device(), accumulate=1, seed=0)
    trainer.set(0.5, seed=3)
    state = trainer.start_task(trainer.init(make_params()), 2)
    rates = [node.rate for node in jax.tree.leaves(state.opt_state, is_leaf=is_rated) if is_rated(node)]
    assert [float(rate) for rate in rates] == [0.5]


def is_rated(node: object) -> bool:
    return isinstance(node, points.RateState)


def test_a_point_may_change_other_sections_and_the_methods_options_stay_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testbeds, "data_root", lambda: tmp_path)
    monkeypatch.setattr(testbeds, "write_domain", lambda name, root, rows, characters: rows / name)
    options = {"name": "ewc", "strength": 10.0, "run": {"data": {"general": {"share": 0.1}}, "optimizer": {"b1": 0.5}}}
    config = TESTBEDS["text"].config(("a", "b"), "dev", options, tmp_path)
    assert config["method"] == {"name": "ewc", "strength": 10.0}
    assert config["data"]["general"] == {"source": f"text:{tmp_path}/frontier/general.txt.gz", "share": 0.1}
    assert config["data"]["packing"] is True
    assert (config["optimizer"]["b1"], config["optimizer"]["warmup"]) == (0.5, 0.1)
    changed = dataclasses.replace(EWC, options={"strength": 10.0, "run": options["run"]})
    assert records_module.all_options(changed) == records_module.all_options(EWC)
    assert changed.key != EWC.key


def pair_batch(rows: int, length: int, vocabulary: int) -> Batch:
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(1, vocabulary, (rows, length)), jnp.int32)
    predict = jnp.asarray(np.tile([length - 3, length - 2], (rows, 1)), jnp.int32)
    targets = jnp.take_along_axis(tokens, predict + 1, axis=1)
    weights = jnp.ones((rows, 2)).at[-1].set(0.0)  # the last row only fills the batch
    ones = jnp.ones((rows, length), jnp.int32).at[-1].set(0)
    numbers = jnp.arange(rows)
    return Batch(tokens, ones, jnp.tile(jnp.arange(length), (rows, 1)), predict, targets, weights, numbers, numbers)


def test_an_answer_is_the_label_whose_first_token_is_likeliest() -> None:
    network = tiny_llama()
    params = network.init(jax.random.key(0))
    batch, labels = pair_batch(40, 9, 13), np.array([2, 5, 7])
    logits = np.asarray(network.logits(params, network.hidden(params, batch).states))
    right = [
        labels[np.argmax(logits[row, 6, labels])] == batch.targets[row, 0] for row in range(39)
    ]  # fmt: skip
    found = points.choose(network, params, batch, jnp.asarray(labels))
    assert found.tolist() == [sum(right), 39]
    assert 0 < sum(right) < 39


def test_the_divergence_is_that_of_the_start_from_the_model_at_hand() -> None:
    network = tiny_llama()
    first, second = (network.init(jax.random.key(seed)) for seed in (0, 1))
    batch = pair_batch(3, 9, 13)

    def probabilities(params: Any) -> np.ndarray:
        logits = np.asarray(network.logits(params, network.hidden(params, batch).states), np.float64)
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return (shares / shares.sum(axis=-1, keepdims=True))[:2, [6, 7]]  # real rows, scored positions

    start, now = probabilities(first), probabilities(second)
    total, count = points.diverge(network, first, second, batch).tolist()
    assert count == 4
    assert total == pytest.approx((start * np.log(start / now)).sum(), rel=1e-4)


def test_kept_bytes_are_the_methods_state_and_what_is_remembered(tmp_path: Path) -> None:
    folder = points.RunFolder(tmp_path)
    folder.memory.write_bytes(b"12345")
    folder.examples.mkdir()
    (folder.examples / "a").write_bytes(b"123")
    (tmp_path / "config.yaml").write_bytes(b"1" * 100)
    state: Any = SimpleNamespace(method_state={"fisher": jnp.zeros(10)})
    assert points.kept_bytes(state, folder) == 40 + 5 + 3


@pytest.mark.slow
def test_a_point_is_the_run_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if BENCHMARK_FILES is not None:
        monkeypatch.setenv("JAXCL_DATA", BENCHMARK_FILES)
    try:
        points.data_root()
    except SystemExit as error:
        pytest.skip(str(error))
    testbed = dataclasses.replace(TESTBEDS["text_quick"], name="text_tiny", steps=3, rows=8)
    monkeypatch.setitem(points.TESTBEDS, "text_tiny", testbed)
    point = Point("text_tiny", "stories,papers", "ewc", "ewc", {"fisher_examples": 4}, 3e-3, 5)
    setting = points.Setting(point, tmp_path)
    points.measure(setting, dataclasses.replace(point, learning_rate=0.1, seed=0))  # leaves nothing behind
    found = points.measure(setting, point)
    config = testbed.config(point.tasks, "dev", {"name": "ewc", **point.options}, tmp_path)
    config |= {"seed": 5, "optimizer": {**config["optimizer"], "learning_rate": 3e-3}}
    results = sequence.run(parse_config(config)).results
    for ours, theirs in zip(found["matrix"], results.matrix, strict=True):
        assert ours == pytest.approx([np.log(score) for score in theirs if score is not None], rel=1e-4)
    assert found["learned"] == pytest.approx(np.mean([found["matrix"][0][0], found["matrix"][1][1]]), abs=1e-4)
    assert found["drift"] == pytest.approx(found["general"][-1] - found["general"][0], abs=2e-5)


# Records


def test_what_is_recorded_is_known_by_all_that_results_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(EWC, results(), tmp_path)
    append(dataclasses.replace(EWC, seed=1), results(final=5.0), tmp_path)
    found = list(read(tmp_path))
    assert [(one.point.seed, one.results["final"]) for one in found] == [(0, 4.0), (1, 5.0)]
    assert found[0].point.key == EWC.key
    changed = [{"seed": 2}, {"learning_rate": 0.1}, {"options": {"strength": 1.0}}, {"order": "B"}, {"name": "x"}]
    assert len({EWC.key, *(dataclasses.replace(EWC, **one).key for one in changed)}) == 6
    monkeypatch.setattr(find_method("ewc").Options.model_fields["fisher_examples"], "default", 7)
    find_method("ewc").Options.model_rebuild(force=True)
    assert list(read(tmp_path)) == []  # of other defaults
    monkeypatch.undo()
    find_method("ewc").Options.model_rebuild(force=True)
    assert len(list(read(tmp_path))) == 2
    longer = dataclasses.replace(TESTBEDS["text"], steps=1000)
    monkeypatch.setitem(records_module.TESTBEDS, "text", longer)
    assert list(read(tmp_path)) == []  # of another testbed


def test_points_of_other_programs_are_not_run_as_those_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EWC.plain(), {**EWC.plain(), "name": "mine", "options": {"strength": 20.0}}]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(points)))
    monkeypatch.setattr("sys.argv", ["worker", "--records", str(tmp_path), "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="points of one process share programs: mine differ from ewc in"):
        worker.main()


@pytest.mark.parametrize("group", sorted(path.name for path in records_module.RECORDS.iterdir()))
def test_committed_records_are_of_the_methods_that_they_name(group: str) -> None:
    """The options of a rival, and all defaults, are those that its records were made with."""
    count = 0
    for record in read():
        point, rival = record.point, RIVALS.get(record.point.name)
        if f"{point.testbed}-{point.order}" == group and rival is not None:
            value = option_of(point.options, rival.knob) if rival.knob else None
            options = with_option(rival.options, rival.knob, value) if rival.knob else rival.options
            assert (point.method, dict(point.options)) == (rival.method, options), point
            count += 1
    assert count == sum(len(path.read_text().splitlines()) for path in (records_module.RECORDS / group).iterdir())


def test_a_record_is_in_a_file_of_its_method(tmp_path: Path) -> None:
    point = dataclasses.replace(EWC, name="das (v2.1)")
    assert file_of(point, tmp_path) == tmp_path / "text-A" / "das_v2.1_.jsonl"


# Summary


def tuned(final: dict[tuple[float, int], Any], testbed: str = "text", name: str = "ewc") -> list[Record]:
    return [
        Record(dataclasses.replace(EWC, testbed=testbed, name=name, learning_rate=rate, seed=seed), value)
        for (rate, seed), value in final.items()
    ]


def test_the_best_setting_has_all_seeds_and_did_not_fail() -> None:
    found = tuned(
        {
            (0.1, 0): results(final=3.0),  # lacks a seed
            (0.2, 0): results(final=5.0),
            (0.2, 1): results(final=4.0),
            (0.3, 0): results(final=4.6),
            (0.3, 1): results(final=4.6),
            (0.4, 0): results(final=1.0),
            (0.4, 1): {"failed": "loss is nan"},
        }
    )
    assert best_settings(found)["ewc"].learning_rate == 0.2
    percent = [Record(dataclasses.replace(one.point, testbed="instruction"), one.results) for one in found]
    assert best_settings(percent)["ewc"].learning_rate == 0.3
    assert "failed: `ewc` 0.4; strength 10: loss is nan" in tables(found, reference="none")


def test_differences_are_paired_and_positive_where_a_method_is_better(tmp_path: Path) -> None:
    plain = tuned({(0.1, 0): results(), (0.1, 1): results(final=6.0, bwt=-1.0, drift=0.8)}, name="sequential")
    other = tuned({(0.2, 0): results(final=3.5), (0.2, 1): results(final=5.5, bwt=-1.0, drift=0.9)})
    lines = tables([*plain, *other], reference="sequential").splitlines()
    row = next(lines[at + 4] for at, line in enumerate(lines) if line.startswith("Better than `sequential`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["`ewc`", "+0.500 ± 0.000 *", "0.000 ± 0.000"]
    assert cells[5].startswith("−0.050 ± ")  # noqa: RUF001  # general text drifted further
    assert draw_frontier([*plain, *other], tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def with_strength(strength: float, rate: float, final: float, seed: int = 0, **options: Any) -> Record:
    point = dataclasses.replace(EWC, learning_rate=rate, seed=seed, options={"strength": strength, **options})
    return Record(point, results(final=final))


def test_sensitivity_is_of_one_setting_at_a_time(tmp_path: Path) -> None:
    records = [
        with_strength(10.0, 1e-3, 4.0),
        with_strength(10.0, 1e-3, 4.2, seed=1),
        with_strength(10.0, 3e-3, 4.5),
        with_strength(40.0, 1e-3, 4.4),
        with_strength(40.0, 3e-3, 9.0),
        with_strength(10.0, 1e-3, 9.0, decay=0.5),
    ]
    rates, values = around(records[0].point, "strength", records)
    assert rates == {1e-3: [4.0, 4.2], 3e-3: [4.5]}
    assert values == {10.0: [4.0, 4.2], 40.0: [4.4]}
    assert around(records[0].point, "", records)[1] == {}
    drawn = draw_sensitivity(records, RIVALS, tmp_path / "sensitivity.png")
    assert drawn.read_bytes()[:4] == b"\x89PNG"


# Running


@pytest.mark.parametrize(
    ("strength", "rate", "expected"),
    [
        (40.0, 1e-3, []),  # within
        (160.0, 1e-3, [(640.0, 1e-3)]),
        (10.0, 3e-4, [(2.5, 3e-4), (10.0, 9e-5)]),
        (40.0, 3e-3, [(40.0, 9e-3)]),
    ],
)
def test_tuning_goes_on_where_the_best_is_at_an_edge(
    strength: float, rate: float, expected: list[tuple[float, float]]
) -> None:
    rival = Rival("ewc", {}, "strength", (10.0, 40.0, 160.0))
    tried = tuning_points("text", "ewc", rival)
    best = next(one for one in tried if one.options["strength"] == strength and one.learning_rate == rate)
    found = [(one.options["strength"], one.learning_rate) for one in beyond(best, rival, tried)]
    assert sorted(found) == sorted(expected)


def test_the_cross_around_the_best_is_completed() -> None:
    rival = Rival("ewc", {}, "strength", (10.0, 40.0))
    grid = tuning_points("text", "ewc", rival, learning_rates=(1e-3, 3e-3))
    best = dataclasses.replace(grid[0], learning_rate=9e-3)
    found = {(one.options["strength"], one.learning_rate) for one in cross(best, rival, [*grid, best])}
    assert found == {(10.0, 1e-3), (10.0, 3e-3), (10.0, 9e-3), (40.0, 9e-3)}
    plain = tuning_points("text", "sequential", Rival("sequential"))
    assert cross(plain[0], Rival("sequential"), plain) == plain


def test_a_knob_does_not_go_beyond_its_limit_and_names_have_none() -> None:
    rival = Rival("mofo", {}, "share", (0.1, 0.3, 0.9), most=1.0)
    tried = tuning_points("text", "mofo", rival, learning_rates=(1e-3,))
    assert beyond(tried[-1], rival, tried) == []
    words = Rival("das_paper", {}, "shared", ("free", "mean"))
    tried = tuning_points("text", "das_paper", words, learning_rates=(1e-3, 2e-3))
    assert [one.learning_rate for one in beyond(tried[0], words, tried)] == [5e-4]
    nested = Rival("replay", {"replay": {"every": 5}}, "replay.fraction", (0.1, 0.2), most=1.0)
    tried = tuning_points("text", "replay", nested, learning_rates=(1e-3,))
    assert [one.options["replay"] for one in beyond(tried[-1], nested, tried)] == [{"every": 5, "fraction": 0.4}]


def test_every_rival_has_a_grid_of_its_own_knob() -> None:
    for name, rival in RIVALS.items():
        grid = tuning_points("text", name, rival)
        assert len({point.key for point in grid}) == len(grid) == 3 * max(len(rival.values), 1)
        assert {point.order for point in grid} == {"A"}


def test_names_of_rivals_may_have_commas() -> None:
    assert driver._names(",".join(RIVALS)) == [*RIVALS]
    assert any("," in name for name in RIVALS)


def test_cheap_points_are_run_first_and_recorded_ones_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[Point]] = []

    def worker(command: list[str], *, input: bytes, env: dict[str, str]) -> Any:
        given.append([Point(**one) for one in json.loads(input)])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", worker)
    seeds = [dataclasses.replace(EWC, seed=seed) for seed in range(3)]
    plain = dataclasses.replace(EWC, name="sequential", method="sequential", options={})
    append(seeds[0], results(seconds={"cpu": 90.0}), tmp_path)
    append(dataclasses.replace(plain, order="B"), results(seconds={"cpu": 30.0}), tmp_path)
    options = argparse.Namespace(records=tmp_path, work=tmp_path, processes=1, until=float("inf"))
    driver.run_points([*seeds, plain], options)
    assert [[(one.name, one.seed) for one in group] for group in given] == [
        [("sequential", 0)],
        [("ewc", 1), ("ewc", 2)],  # share a process, and what it compiles
    ]
    given.clear()
    driver.run_points([plain], argparse.Namespace(**{**vars(options), "until": 0.0}))
    assert given == []  # the time is over


# Data


@pytest.fixture
def benchmark_files(tmp_path: Path) -> Path:
    folder = tmp_path / "superni" / "task748"
    folder.mkdir(parents=True)
    stories = [f"Tom {number} ate. Then he slept." for number in range(30)]
    rows = [{"prompt": f"Definition\nInput: story: {story}\n selected sentence: x\nOutput: "} for story in stories]
    (folder / "train.json").write_text(json.dumps([*rows, *rows]))
    folder = tmp_path / "superni" / "task1510"
    folder.mkdir()
    names = ["Antonym", "Entails", "IsA"]
    rows = [
        {"prompt": f"Definition\nInput: a{number} is b\nOutput: ", "answer": f"a {names[number % 3]} b"}
        for number in range(30)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_domain_has_each_passage_in_one_split(benchmark_files: Path, tmp_path: Path) -> None:
    folder = write_domain("stories", benchmark_files, tmp_path / "rows", 300)
    splits = {split: (folder / f"{split}.txt").read_text().splitlines() for split in ("train", "dev", "test")}
    assert [len(splits["dev"]), len(splits["test"])] == [6, 6]
    assert len({row for rows in splits.values() for row in rows}) == sum(map(len, splits.values()))
    assert 250 < sum(map(len, splits["train"])) <= 300


def test_a_task_has_short_prompts_and_answers_of_a_closed_set(benchmark_files: Path, tmp_path: Path) -> None:
    folder = write_task("relation", benchmark_files, tmp_path / "rows")
    rows = [row for split in ("train", "dev", "test") for row in json.loads((folder / f"{split}.json").read_text())]
    assert len(rows) == 20
    assert {row["answer"] for row in rows} == {"opposite", "kind"}
    assert {row["prompt"] for row in rows} >= {"a0 is b\nRelation: "}
