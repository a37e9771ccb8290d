"""Weights & Biases and MLflow, with modules in their places that record what is called."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from jaxcl.errors import UserError
from jaxcl.training import trackers
from jaxcl.training.config import TrainingConfig
from jaxcl.training.sinks import check_sinks, open_sinks
from jaxcl.training.trackers import Tracked

ROW = {"step": 3, "task": 0, "kind": "memory", "loss": 0.5, "name": "text"}
CONFIG = {"seed": 1, "tasks": [{"name": "a"}, {"name": "b"}]}


class Recorder:
    """Takes any call and notes it; calls named in `failing` raise."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.failing: dict[str, Exception] = {}

    def note(self, name: str, result: Any = None) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            if name in self.failing:
                raise self.failing[name]
            return result

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    run = types.SimpleNamespace(
        log=recorder.note("log"),
        finish=recorder.note("finish"),
        define_metric=recorder.note("define_metric"),
        config=types.SimpleNamespace(update=recorder.note("update")),
    )
    module: Any = types.ModuleType("wandb")
    module.init = recorder.note("init", run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return recorder


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    created = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    client = types.SimpleNamespace(
        get_experiment_by_name=recorder.note("get_experiment_by_name"),
        create_experiment=recorder.note("create_experiment", "e1"),
        create_run=recorder.note("create_run", created),
        update_run=recorder.note("update_run"),
        log_batch=recorder.note("log_batch"),
        set_terminated=recorder.note("set_terminated"),
    )
    module: Any = types.ModuleType("mlflow")
    module.MlflowClient = lambda: client
    entities: Any = types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)
    return recorder


def track(folder: Path, name: str, finished: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    for sink in open_sinks(folder, ["jsonl", name], config=CONFIG):
        sink.write(ROW)
        sink.close(finished=finished)


def test_wandb_gets_configuration_and_rows_and_goes_on_with_its_run(tmp_path: Path, wandb: Recorder) -> None:
    folder = tmp_path / "das-seed0"
    track(folder, "wandb", finished=False)
    track(folder, "wandb")
    (_, first), (_, second) = wandb.named("init")
    assert first == second
    assert first["id"] == json.loads((folder / "tracking.json").read_text())["wandb"]
    assert first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("jaxcl", "das-seed0", str(folder))
    assert wandb.named("update") == 2 * [((CONFIG,), {"allow_val_change": True})]
    assert wandb.named("define_metric") == 2 * [(("*",), {"step_metric": "train_step"})]
    assert wandb.named("log") == 2 * [(({"memory/loss": 0.5, "train_step": 3},), {})]
    assert wandb.named("finish") == [((), {"exit_code": 1}), ((), {"exit_code": 0})]


def test_wandb_variables_win(tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "other")
    track(tmp_path / "run", "wandb")
    assert (wandb.named("init")[0][1]["project"], wandb.named("init")[0][1]["name"]) == ("mine", "other")


def test_mlflow_gets_params_once_and_rows_and_goes_on_with_its_run(tmp_path: Path, mlflow: Recorder) -> None:
    track(tmp_path / "run", "mlflow", finished=False)
    track(tmp_path / "run", "mlflow")
    assert mlflow.named("create_experiment") == [(("jaxcl",), {})]
    assert mlflow.named("create_run") == [(("e1",), {"run_name": "run"})]
    assert mlflow.named("update_run") == [(("r1",), {"status": "RUNNING"})]
    params = [("seed", "1"), ("tasks.0.name", "a"), ("tasks.1.name", "b")]
    metrics = [(("r1",), {"metrics": [("memory/loss", 0.5, 3)]})]
    assert mlflow.named("log_batch") == [(("r1",), {"params": params}), *metrics, *metrics]
    assert mlflow.named("set_terminated") == [(("r1", "KILLED"), {}), (("r1", "FINISHED"), {})]
    assert json.loads((tmp_path / "run" / "tracking.json").read_text()) == {"mlflow": "r1"}


def test_mlflow_takes_a_hundred_params_at_once_and_no_odd_names(tmp_path: Path, mlflow: Recorder) -> None:
    sink = trackers.MLflow(tmp_path, {"many": list(range(250))})
    assert [len(options["params"]) for _, options in mlflow.named("log_batch")] == [100, 100, 50]
    sink.log(1, {"score/C#": 1.0})
    assert mlflow.named("log_batch")[-1][1]["metrics"] == [("score/C_", 1.0, 1)]


def test_mlflow_starts_anew_where_its_run_is_gone(tmp_path: Path, mlflow: Recorder) -> None:
    gone: Any = Exception("no run")
    gone.error_code = "RESOURCE_DOES_NOT_EXIST"
    mlflow.failing["update_run"] = gone
    track(tmp_path / "run", "mlflow")
    track(tmp_path / "run", "mlflow")
    assert len(mlflow.named("create_run")) == 2


def test_ids_are_not_written_through_a_link(tmp_path: Path, wandb: Recorder) -> None:
    (tmp_path / "other").write_text("mine")
    for name in ("tracking.json", "tracking.partial"):
        (tmp_path / name).symlink_to(tmp_path / "other")
    Tracked("wandb", tmp_path, {}).close()
    assert (tmp_path / "other").read_text() == "mine"
    assert "wandb" in json.loads((tmp_path / "tracking.json").read_text())


def test_two_trackers_keep_their_ids_side_by_side(tmp_path: Path, wandb: Recorder, mlflow: Recorder) -> None:
    track(tmp_path / "run", "wandb")
    track(tmp_path / "run", "mlflow")
    assert json.loads((tmp_path / "run" / "tracking.json").read_text()).keys() == {"wandb", "mlflow"}


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path, wandb: Recorder, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.failing[call] = ConnectionError("network is unreachable\nmore")
    sink = trackers.Tracked("wandb", tmp_path, CONFIG)
    for _ in range(3):
        sink.write(ROW)
    sink.close()
    warning = "wandb: ConnectionError: network is unreachable; the run goes on without it\n"
    assert capsys.readouterr().err == warning
    if call == "log":
        assert len(wandb.named("log")) == 1
        assert not wandb.named("finish")


def test_a_tracker_that_hangs_does_not_hold_the_training(
    tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()
    monkeypatch.setattr(trackers, "_LAST_SECONDS", 0.01)
    sink = trackers.Tracked("wandb", tmp_path, CONFIG)
    monkeypatch.setattr(sink._tracker, "log", lambda *_: released.wait())
    sink.write(ROW)  # returns although the tracker does not
    sink.close()
    released.set()
    assert "has not taken all rows" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"training.sinks: {name} .*: pip install 'jaxcl\[{name}\]'") as caught:
        check_sinks(["jsonl", name])
    assert caught.value.exit_code == 2
    # The folder that the tracker itself leaves behind is importable too.
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(UserError, match=f"{name} is not installed"):
        check_sinks([name])
    check_sinks(["jsonl", "tensorboard"])


def test_sinks_are_those_named_and_always_the_file(tmp_path: Path) -> None:
    (only,) = open_sinks(tmp_path, [])
    only.write(ROW)
    only.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size > 0
    assert not (tmp_path / "tensorboard").exists()
    assert TrainingConfig().sinks == ("jsonl", "tensorboard")
    with pytest.raises(ValueError, match="'jsonl', 'tensorboard', 'wandb' or 'mlflow'"):
        TrainingConfig(sinks=("wanb",))  # type: ignore[arg-type]


def test_other_processes_track_nothing(tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert open_sinks(tmp_path, ["wandb"]) == []
    assert not wandb.calls
