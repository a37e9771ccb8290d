from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jaxcl.training.config import TrainingConfig
from jaxcl.training.loop import train_task
from jaxcl.training.profile import Profiler
from tests.tiny.trainer import Rows, make_params, shared_trainer


def train(folder: Path, steps: tuple[int, int] | None) -> None:
    trainer = shared_trainer()
    state = trainer.start_task(trainer.init(make_params()), 6)
    feed = trainer.feed(Rows(), prefetch=0)
    profiler = Profiler(folder, steps)
    train_task(trainer, state, feed, total=6, task=0, name="x", log_every=6, progress=False, profiler=profiler)


def traced_steps(folder: Path) -> set[int]:
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"}


def test_the_given_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    train(tmp_path, (3, 4))
    assert traced_steps(tmp_path) == {3, 4}
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_a_trace_ends_with_its_task(tmp_path: Path) -> None:
    train(tmp_path, (6, 9))
    assert traced_steps(tmp_path) == {6}


def test_nothing_is_written_without_steps(tmp_path: Path) -> None:
    train(tmp_path, None)
    train(tmp_path, (7, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_steps_out_of_order_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="profile must be a first and a last step, both from 1"):
        TrainingConfig(profile=steps)
