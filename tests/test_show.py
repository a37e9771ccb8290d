"""`jaxcl show`, and trackers, over one run that is interrupted and goes on."""

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxcl.cli import main
from jaxcl.commands.params_table import params_table
from jaxcl.commands.show import checkpoints, show
from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.models.network import Network
from jaxcl.run import sequence
from jaxcl.training import trackers
from tests.tiny.invented_runs import make_run

CONFIG: dict[str, Any] = {
    "model": {
        "architecture": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "max_length": 96,
    },
    "tokenizer": {"vocab_size": 300, "train_rows": 50},
    "data": {"prompt_length": 64, "answer_length": 24, "buckets": 1},
    "tasks": [
        {"name": "direction", "source": "stdlib:unicode_bidi", "train": 16, "test": 2},
        {"name": "category", "source": "stdlib:unicode_category", "train": 16, "test": 2},
    ],
    "training": {"batch_size": 8, "steps": 3, "log_every": 1, "checkpoint_every": 2, "sinks": ["wandb"]},
    "evaluation": {"batch_size": 2, "max_new_tokens": 24, "before": True},
    "method": {"name": "derpp", "replay": {"fraction": 0.25}},
}


class Killed(Exception):
    """Stands for whatever kills a process."""


class Notes:
    """A tracker that keeps what it is given, over all runs of a folder."""

    logged: list[tuple[int, dict[str, float]]]
    ends: list[bool]

    def __init__(self, folder: Path, config: Any) -> None:
        assert config["seed"] == 0

    def log(self, step: int, numbers: Any) -> None:
        self.logged.append((step, dict(numbers)))

    def close(self, finished: bool) -> None:
        self.ends.append(finished)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run, and what was shown of it when it had been killed within its second task."""
    folder = tmp_path_factory.mktemp("runs") / "derpp"
    config = parse_config({**CONFIG, "output": str(folder)})
    original, count = sequence.TaskSequence._save, 0
    Notes.logged, Notes.ends = [], []

    def save_then_die(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal count
        original(self, *arguments, **options)
        count += options["phase"] != "trained"
        if count == 4:  # the start, step 2, the end of task 0, step 2 of task 1
            self.checkpoints.wait()
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jaxcl.run.sequence.check_sinks", lambda _: None)
        patched.setitem(trackers.TRACKERS, "wandb", Notes)
        with patched.context() as dying:
            dying.setattr(sequence.TaskSequence, "_save", save_then_die)
            with pytest.raises(Killed):
                sequence.run(config)
        texts = {"interrupted": show(folder)}
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            texts["running"] = show(folder)
        more = {**CONFIG["training"], "sinks": ["tensorboard", "wandb"]}  # may change while a run rests
        sequence.run(parse_config({**CONFIG, "training": more, "output": str(folder)}))
        sequence.run(config)  # nothing is left to do, or to say
    return {"folder": folder, **texts}


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.slow
def test_an_interrupted_run_says_where_it_is_and_how_it_goes_on(told: dict[str, Any]) -> None:
    lines = lines_of(told["interrupted"])
    assert lines[0] == f"{told['folder']}: derpp, seed 0, 2 tasks"
    where = "task 2 of 2 (category), step 2 of the task, 5 of the run"
    assert any(
        re.fullmatch(rf"interrupted: {re.escape(where)}; last written \d{{4}}-\d\d-\d\d \d\d:\d\d", x) for x in lines
    )
    assert f"`jaxcl run {told['folder']}/config.yaml` goes on from checkpoint 3" in lines
    assert any(line.startswith("after 1 direction ") for line in lines)
    assert not any(line.startswith("after 2") for line in lines)
    assert any(re.fullmatch(r"checkpoint 3 [\d.]+ kB latest", line) for line in lines)
    assert any(re.fullmatch(r"checkpoint 2 [\d.]+ kB after task 0", line) for line in lines)


def test_a_run_in_progress_is_told_from_one_that_was_interrupted(told: dict[str, Any]) -> None:
    assert "running: task 2 of 2" in told["running"]
    assert "goes on from" not in told["running"]


def test_a_finished_run_shows_scores_stores_and_time(told: dict[str, Any]) -> None:
    folder = told["folder"]
    results = json.loads((folder / "results.json").read_text())
    lines = lines_of(show(folder))
    assert any(re.fullmatch(r"finished \d{4}-\d\d-\d\d \d\d:\d\d after 6 steps", line) for line in lines)
    matrix = results["matrix"]
    assert f"after 2 category {matrix[1][0]:.1f} {matrix[1][1]:.1f}" in lines
    assert f"before training {results['initial'][0]:.1f} {results['initial'][1]:.1f}" in lines
    assert any(line.startswith(f"OP {results['op']:.1f} BWT ") for line in lines)
    stores = list((folder / "teacher").glob("*"))
    kilobytes = f"{sum(path.stat().st_size for path in stores) / 1000:.1f} kB"
    assert f"teacher store {kilobytes} {len(stores)} files" in lines
    assert "memory 4 of 16 examples, direction" in lines
    training = results["timing"]["training"]
    assert f"training {training:,.1f} s {training / sum(results['timing'].values()):.0%}" in lines
    assert [one.mark for one in checkpoints(folder / "checkpoints")] == ["after task 1"]


def test_what_was_not_finite_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "seekr", tasks=1)
    results = json.loads((folder / "results.json").read_text())
    (task,) = results["tasks"]
    assert "skipped" not in show(folder)
    (folder / "results.json").write_text(json.dumps({**results, "steps": {task: 40}, "skipped": {task: 2}}))
    assert f"{task}: 2 of 40 steps skipped, because loss or gradient was not finite" in show(folder)


def test_the_summary_needs_no_jax(told: dict[str, Any]) -> None:
    code = (
        "import sys; from jaxcl.cli import main; assert main(['show', sys.argv[1]]) == 0; "
        "sys.exit(', '.join({'jax', 'flax', 'pydantic', 'orbax'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, told["folder"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout


def test_rows_and_scores_reach_a_tracker_over_an_interruption(told: dict[str, Any]) -> None:
    assert Notes.ends == [False, True]
    assert list((told["folder"] / "tensorboard").glob("events*"))
    losses = [(step, numbers["task/loss"]) for step, numbers in Notes.logged if "task/loss" in numbers]
    logged = [json.loads(line) for line in (told["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert set(losses) == {(row["step"], row["loss"]) for row in logged if row["kind"] == "task"}
    scores = [(step, numbers) for step, numbers in Notes.logged if "score/direction" in numbers]
    results = json.loads((told["folder"] / "results.json").read_text())
    initial = zip(results["tasks"], results["initial"], strict=True)
    assert scores[0] == (0, {f"score/{name}": score for name, score in initial})
    assert scores[-1][0] == 6
    assert scores[-1][1]["score/category"] == results["matrix"][1][1]
    assert scores[-1][1]["score/op"] == results["op"]
    times = [numbers for _, numbers in Notes.logged if "time/goodput" in numbers]
    assert 0 == times[0]["time/goodput"] < times[-1]["time/goodput"] < 1
    assert not any(row["kind"] == "score" for row in logged)


@pytest.fixture
def other(told: dict[str, Any], tmp_path: Path) -> Any:
    """A run folder of the same run with a changed configuration."""

    def make(**changes: Any) -> Path:
        content = yaml.safe_load((told["folder"] / "config.yaml").read_text())
        for key, value in changes.items():
            content[key] = {**content[key], **value}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return tmp_path

    return make


def test_a_run_that_has_moved_goes_on_where_it_is(other: Any) -> None:
    folder = other()
    (folder / "metrics.jsonl").write_text('{"step": 1')
    assert f"`jaxcl run {folder}/config.yaml output={folder}` goes on from the beginning" in show(folder)
    assert "interrupted: no step logged yet" in show(folder)


def test_the_table_has_every_param_once_with_its_shape_and_totals(told: dict[str, Any]) -> None:
    lines = lines_of(params_table(told["folder"]))
    network = Network.create(parse_config({**CONFIG, "output": "x"}).model)
    assert "blocks/mlp/up/kernel 1 x 16 x 32 float32 layers, embed, mlp intermediate 2.0 kB" in lines
    names = [line.split()[0] for line in lines[1:-1]]
    assert len(names) == len(set(names))
    assert lines[-1] == f"trained: {network.num_params:,} params, {4 * network.num_params / 1000:.1f} kB"


def test_the_table_shows_what_is_frozen_and_how_a_mesh_splits(other: Any) -> None:
    folder = other(model={"lora": {"rank": 2, "targets": ["query"]}}, mesh={"fsdp": 2, "tensor": 2})
    lines = lines_of(params_table(folder))
    axes = "layers, embed, heads, head_dim"
    kernel = f"blocks/attention/query/kernel 1 x 16 x 2 x 8 float32 {axes} heads embed/fsdp, heads/tensor"
    assert f"{kernel} 1.0 kB" in lines
    assert "blocks/attention/query/lora_a 1 x 16 x 2 float32 layers, embed, rank layer embed/fsdp yes 128 B" in lines
    whole = Network.create(parse_config({**CONFIG, "output": "x"}).model).num_params
    assert lines[-3:-1] == ["trained: 64 params, 256 B", f"frozen: {whole:,} params, {4 * whole / 1000:.1f} kB"]
    # By 2: norms (fsdp) and both adapters; by 4: all else.
    halves = 3 * 16 + 64
    each = 4 * (halves / 2 + (whole + 64 - halves) / 4)
    assert lines[-1] == f"each device (fsdp 2, tensor 2): {each / 1000:.1f} kB"


def test_params_by_the_command_line(told: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(told["folder"]), "--params"]) == 0
    assert "\n\nparam " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", "", "not a run folder"),
        ("config.yaml", "tasks: [", "config.yaml: cannot be read as the configuration of a run"),
        ("config.yaml", "seed: 1", "config.yaml: cannot be read as the configuration of a run"),
    ],
)
def test_what_is_no_run_is_one_line(
    tmp_path: Path, name: str, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["show", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message


def test_a_broken_memory_is_named(other: Any) -> None:
    folder = other()
    (folder / "memory.json").write_text("{}")
    with pytest.raises(UserError, match=r"memory.json: cannot be read"):
        show(folder)
