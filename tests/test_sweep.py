"""`jaxcl compare --sweep`: the grid, what is shared, and runs in several processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxcl.cli import main
from jaxcl.commands import compare as compare_module
from jaxcl.commands import jobs as jobs_module
from jaxcl.commands.jobs import run_jobs
from jaxcl.commands.sweep import folder_name, plan_runs, shared_options
from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.reporting.comparison import read_comparison
from tests.tiny.runs import PAIRS, TEXT, run

BASE = {**PAIRS, "method": {"name": "ewc", "strength": 10.0}}
RATES = {"optimizer.learning_rate": ["1e-3", "0.01"]}


def planned(sweeps: dict[str, list[str]], methods: str = "sequential,ewc,replay", seeds: tuple[int, ...] = (0,)) -> Any:
    return plan_runs(BASE, "c.yaml", methods.split(","), seeds, sweeps, Path("out"))


def test_a_grid_has_a_run_per_combination_method_and_seed() -> None:
    runs = planned({**RATES, "method.strength": ["1", "2"]}, "ewc", (0, 1))
    settings = [(one.config.optimizer.learning_rate, one.config.method.options.strength, one.seed) for one in runs]
    assert settings == [(r, s, seed) for r in (1e-3, 1e-2) for s in (1.0, 2.0) for seed in (0, 1)]
    assert runs[0].config.output == "out/ewc-learning_rate=0.001-strength=1-seed0"
    assert runs[0].title == "ewc, learning_rate=0.001, strength=1, seed 0"


def test_methods_without_a_swept_option_have_one_run_for_all_its_values() -> None:
    runs = planned({"method.strength": ["1", "2", "3"], "method.replay.fraction": ["0.1", "0.2"]})
    assert [folder_name(one.method, one.setting, one.seed) for one in runs] == [
        "sequential-seed0",
        *(f"ewc-strength={value}-seed0" for value in (1, 2, 3)),
        *(f"replay-fraction={value}-seed0" for value in (0.1, 0.2)),
    ]
    assert [one.config.method.options.replay.fraction for one in runs[-2:]] == [0.1, 0.2]


def test_a_key_after_a_methods_name_concerns_that_method_alone() -> None:
    sweeps = {"optimizer.learning_rate": ["1e-3", "1e-2"], "das:method.strength": ["10", "40"]}
    runs = planned(
        {**sweeps, "das:optimizer.learning_rate": ["3e-3"], "ewc:method.strength": ["500"]}, "das,ewc,replay"
    )
    assert [folder_name(one.method, one.setting, one.seed) for one in runs] == [
        *(f"das-learning_rate=0.003-strength={value}-seed0" for value in (10, 40)),
        *(f"ewc-learning_rate={rate}-strength=500-seed0" for rate in (0.001, 0.01)),
        *(f"replay-learning_rate={rate}-seed0" for rate in (0.001, 0.01)),
    ]
    assert [one.config.method.options.strength for one in runs[:4]] == [10, 40, 500, 500]
    assert runs[0].config.optimizer.learning_rate == 3e-3


def test_a_budget_is_the_same_number_of_settings_for_every_method() -> None:
    sweeps = {"optimizer.learning_rate": ["1", "2", "3", "4"], "ewc:method.strength": ["1", "2", "3"]}
    whole = [one.title for one in planned(sweeps, "sequential,ewc", (0, 1))]

    def within(budget: int) -> list[str]:
        runs = plan_runs(BASE, "c.yaml", ["sequential", "ewc"], (0, 1), sweeps, Path("out"), budget)
        return [one.title for one in runs]

    assert len(whole) == 2 * (4 + 12)
    assert within(12) == whole
    some = within(3)
    assert some == within(3) == [title for title in whole if title in some]
    assert [title.split(",")[0] for title in some] == ["sequential"] * 6 + ["ewc"] * 6


def test_one_value_written_in_two_ways_is_one_run() -> None:
    assert len(planned({"optimizer.learning_rate": ["1e-3", "0.001", "0.002"]}, "ewc")) == 2
    assert len(planned({"evaluation.before": ["true", "True", "false"]}, "ewc")) == 2


def test_a_sweep_leaves_the_configuration_as_it_was() -> None:
    before = yaml.safe_dump(BASE)
    planned({"tasks.*.train": ["8", "16"]})
    assert yaml.safe_dump(BASE) == before


def test_options_that_a_method_has_from_another_ones_section_are_said() -> None:
    content = {**PAIRS, "method": {"name": "das", "strength": 40, "loss_chunk": 0, "evenness": 0.5}}
    methods = ["sequential", "das", "ewc", "lwf"]
    line = "ewc: strength=40, from the section of das; to choose: --sweep ewc:method.KEY"
    assert list(shared_options(content, methods, {})) == [line]
    assert list(shared_options(content, methods, {"ewc:method.strength": ["1"]})) == []
    assert list(shared_options({**PAIRS, "method": "das"}, methods, {})) == []


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        ({"method.strengh": ["1", "2"]}, "none of the methods sequential, ewc, replay has this option"),
        ({"ewc:method.strengh": ["1", "2"]}, "--sweep ewc:method.strengh: ewc does not have this option"),
        ({"das:method.strength": ["1", "2"]}, "das is none of the methods sequential, ewc, replay"),
        ({"seed": ["1", "2"]}, "--sweep seed: give --seeds instead"),
        ({"ewc:seed": ["1", "2"]}, "--sweep ewc:seed: give --seeds instead"),
        ({"optimizer.learning_rate": ["1", "x"]}, "c.yaml with sequential learning_rate=x: optimizer.learning_rate"),
        ({"evaluation.text_metric": ["perplexity", "/", "?"]}, "evaluation.text_metric"),
    ],
)
def test_what_cannot_be_swept_is_said_before_any_run(sweeps: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        planned(sweeps)
    assert raised.value.exit_code == 2


def test_values_are_split_at_commas_outside_brackets_and_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("jaxcl.commands.compare.compare", lambda *arguments: seen.extend(arguments) or "page")
    words = ["compare", "c", "--methods", "a", "--out", "o", "--jobs", "3"]
    assert main([*words, "--sweep", "x.y=[1,2],[3]", "--sweep", 'z="a,b",c', "k=v"]) == 0
    assert seen == ["c", ["k=v"], ["a"], None, Path("o"), {"x.y": ["[1,2]", "[3]"], "z": ['"a,b"', "c"]}, 3, None]


@pytest.mark.parametrize("sweep", [["x"], ["x=1"], ["=1,2"], ["x=1,,2"], ["x=1,2", "--sweep", "x=3,4"]])
def test_sweeps_without_a_key_or_a_choice_are_refused(sweep: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "c", "--methods", "a", "--out", "o", "--sweep", *sweep]
    try:
        code: object = main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert "--sweep" in capsys.readouterr().err


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_sweep_is_run_once_and_can_be_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [{**task, "train": 16, "dev": 4} for task in PAIRS["tasks"]]
    content = {
        **PAIRS,
        "tasks": tasks,
        "method": {"name": "ewc", "fisher_examples": 4},
        "training": {"batch_size": 8, "steps": 1, "sinks": ["jsonl"]},
        "evaluation": {"batch_size": 4, "max_new_tokens": 24},
    }
    out = tmp_path / "out"
    words = ["compare", write(tmp_path / "c.yaml", content), "--methods", "sequential,ewc", "--out", str(out)]
    assert main([*words, "--sweep", "optimizer.learning_rate=1e-3,1e-2"]) == 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
    assert len(first) == 4
    results = Results.read(out / "ewc-learning_rate=0.001-seed0" / "results.json")
    assert results.dev is not None
    assert len(results.dev) == 2
    content = read_comparison(out)
    assert content["sweep"]["chosen_by"] == {"sequential": "dev", "ewc": "dev"}

    ran: list[str] = []
    original = compare_module.run
    monkeypatch.setattr(compare_module, "run", lambda config: ran.append(config.output) or original(config))
    monkeypatch.setattr("jaxcl.run.sequence.build", _fails_for(str(out / "sequential-learning_rate=0.1-seed0")))
    assert main([*words, "--sweep", "optimizer.learning_rate=1e-3,1e-2,0.1", "--methods", "sequential"]) == 0
    assert len(ran) == 3
    assert {path: path.stat().st_mtime_ns for path in first} == first  # what is finished is not run again
    content = read_comparison(out)
    assert list(content["sweep"]["failed"]) == ["sequential, learning_rate=0.1, seed 0"]
    assert [one["setting"] for one in content["sweep"]["points"]] == ["learning_rate=0.001", "learning_rate=0.01"]


@pytest.mark.slow
def test_dev_scores_are_those_of_the_model_at_the_end_on_dev_rows(tmp_path: Path) -> None:
    content = {
        **TEXT,
        "tasks": [{key: value for key, value in task.items() if key != "end_task"} for task in TEXT["tasks"]],
        "training": {"batch_size": 8, "steps": 1, "sinks": ["jsonl"]},
        "evaluation": {"batch_size": 8, "limit": 8},
    }
    both = run({**content, "evaluation": {"batch_size": 8, "limit": 8, "dev": True}}, tmp_path / "both", "sequential")
    on_dev = {"batch_size": 8, "limit": 8, "split": "dev"}
    other = run({**content, "evaluation": on_dev}, tmp_path / "other", "sequential")
    assert both.dev == pytest.approx(other.matrix[-1])
    assert both.matrix[-1] != pytest.approx(other.matrix[-1])
    assert other.dev is None


def _fails_for(output: str) -> Any:
    from jaxcl.run.components import build

    def fails(config: Any, folder: Any) -> Any:
        if config.output == output:
            raise UserError("loss is nan")
        return build(config, folder)

    return fails


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a run, a process that says what it is given and ends as its seed says."""
    script = (
        "import sys, time, yaml; content = yaml.safe_load(open(sys.argv[1])); print(content['seed'])\n"
        "open(content['output'] + '.started', 'w').write(str(time.monotonic()))\n"
        "time.sleep(content['training']['log_every'] / 10)\n"
        "open(content['output'] + '.ended', 'w').write(str(time.monotonic())); sys.exit(content['seed'])"
    )
    original = subprocess.Popen
    monkeypatch.setattr(
        jobs_module.subprocess,
        "Popen",
        lambda command, **options: original([sys.executable, "-c", script, command[-1]], **options),
    )


def configs(folder: Path, codes: dict[str, int], seconds: float = 0.1) -> Any:
    training = {**PAIRS["training"], "log_every": int(10 * seconds)}
    return {
        name: parse_config(
            {**PAIRS, "method": "sequential", "seed": code, "output": str(folder / name), "training": training}
        )
        for name, code in codes.items()
    }


def test_runs_go_on_though_some_fail(tmp_path: Path, scripts: None) -> None:
    failed = run_jobs(configs(tmp_path, {"a": 0, "b": 1, "c": 0}), 1, tmp_path / "jobs")
    assert failed == {"b": "1"}  # the last line of its log
    assert {path.stem for path in tmp_path.glob("*.ended")} == {"a", "b", "c"}
    assert yaml.safe_load((tmp_path / "jobs" / "a.yaml").read_text())["output"] == str(tmp_path / "a")


def test_as_many_runs_at_once_as_asked_for(tmp_path: Path, scripts: None) -> None:
    assert run_jobs(configs(tmp_path, {"a": 0, "b": 0, "c": 0}, seconds=1.0), 2, tmp_path / "jobs") == {}
    started, ended = (
        {path.stem: float(path.read_text()) for path in tmp_path.glob(f"*.{mark}")} for mark in ("started", "ended")
    )
    assert started["b"] < ended["a"]
    assert started["c"] > min(ended["a"], ended["b"])


def test_a_refused_configuration_stops_all(tmp_path: Path, scripts: None) -> None:
    with pytest.raises(UserError, match=r"a: 2 \(.*a.log\)"):
        run_jobs(configs(tmp_path, {"a": 2, "b": 0}), 1, tmp_path / "jobs")
    assert not (tmp_path / "b.started").exists()
