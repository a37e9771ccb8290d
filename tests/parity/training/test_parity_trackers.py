"""Real runs of Weights & Biases and MLflow, both without a network: what they write, and that a run is gone on with."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxcl.training.sinks import check_sinks
from jaxcl.training.trackers import Tracked

CONFIG = {"seed": 3, "tasks": [{"name": "first"}]}
# Of what the trackers import.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def installed(name: str) -> Any:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed: pip install 'jaxcl[{name}]'")


def track(name: str, folder: Path, steps: range, finished: bool) -> None:
    folder.mkdir(exist_ok=True)
    check_sinks([name])
    sink = Tracked(name, folder, CONFIG)
    for step in steps:
        sink.write({"step": step, "task": 0, "kind": "task", "loss": 1.0 / step})
    sink.close(finished=finished)


def stored(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: 7 bytes, then LevelDB's log, blocks of 32 KiB that cut records into parts."""
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := (1 << 15) - place % (1 << 15)) < 7:
            place += left
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@installed("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "das-seed0"
    track("wandb", folder, range(1, 4), finished=False)
    track("wandb", folder, range(3, 6), finished=True)
    assert "goes on without it" not in capsys.readouterr().err
    run_id = json.loads((folder / "tracking.json").read_text())["wandb"]
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    losses, codes, projects, names, settings = [], [], set(), set(), {}
    for path in files:
        for data in stored(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses.append((row["train_step"], row["task/loss"]))
            elif kind == "exit":
                codes.append(record.exit.exit_code)
            elif kind == "run":
                projects.add(record.run.project)
                names.add(record.run.display_name)
            elif kind == "config":
                settings |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    assert losses == [(step, 1.0 / step) for step in (1, 2, 3, 3, 4, 5)]
    assert codes == [1, 0]
    assert (projects, names) == ({"jaxcl"}, {"das-seed0"})
    assert settings["seed"] == 3


@installed("mlflow")
def test_mlflow_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import mlflow

    # The store of the full package, and the only one of the skinny one that needs no server.
    full = importlib.util.find_spec("sqlalchemy") is not None
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db" if full else f"file:{tmp_path}/mlruns")
    track("mlflow", tmp_path / "das-seed0", range(1, 4), finished=False)
    client = mlflow.MlflowClient()
    run_id = json.loads((tmp_path / "das-seed0" / "tracking.json").read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "KILLED"
    track("mlflow", tmp_path / "das-seed0", range(3, 6), finished=True)
    assert "goes on without it" not in capsys.readouterr().err
    (run,) = client.search_runs([client.get_experiment_by_name("jaxcl").experiment_id])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (run_id, "FINISHED", "das-seed0")
    assert run.data.params == {"seed": "3", "tasks.0.name": "first"}
    losses = sorted({(metric.step, metric.value) for metric in client.get_metric_history(run_id, "task/loss")})
    assert losses == [(step, 1.0 / step) for step in range(1, 6)]
