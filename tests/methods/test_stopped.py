"""What methods measure between tasks, stopped after any batch: the same state, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.methods.base import Method
from jaxcl.methods.das import Das, DasOptions
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.ewc import Ewc, EwcOptions
from jaxcl.methods.seekr import Seekr
from jaxcl.methods.seekr_options import SeekrOptions
from jaxcl.methods.ssu import Ssu, SsuOptions
from jaxcl.models.batch import Batch
from jaxcl.training.halfway import Halfway
from jaxcl.training.interrupt import StoppedTogether
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, perturbed, tiny_llama
from tests.tiny.trainer import one_device

NETWORK = tiny_llama(num_layers=1)
BEFORE = init(NETWORK)
AFTER = perturbed(BEFORE, 0.3)
METHODS: dict[str, Callable[[], Method[Any]]] = {
    "das": lambda: Das(DasOptions(), NETWORK, 1),
    "das, full": lambda: Das(DasOptions(resolution="full", targets="true"), NETWORK, 1),
    "das_paper": lambda: DasPaper(DasPaperOptions(), NETWORK, 1),
    "ewc": lambda: Ewc(EwcOptions(), NETWORK, 1),
    "ssu": lambda: Ssu(SsuOptions(), NETWORK, 1),
    "seekr": lambda: Seekr(SeekrOptions(layer_budget=1, head_budget=2), NETWORK, 1),
}


class Stoppable(StandInTask):
    """Four batches; perhaps this process gets a signal while one of them is added."""

    def __init__(self, halfway: Halfway | None, stop: int | None = None) -> None:
        super().__init__([make_batch((6, 4, 5), seed=seed) for seed in range(4)], before=BEFORE)
        self.halfway, self.stop, self.added = halfway, stop, 0

    def fold(self, add: Any, start: Any, *, limit: int | None = None, memory: bool = False) -> Any:
        def counted(total: Any, batch: Batch) -> Any:
            self.added += 1
            if self.added == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return add(total, batch)

        return (
            super().fold(counted, start) if self.halfway is None else self.halfway.fold(counted, start, self._batches)
        )


def bits(state: Any) -> list[tuple[Any, bytes]]:
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", METHODS)
def test_stopped_after_a_batch_the_state_is_the_same(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()

    def learn(task: Stoppable, stage: str, state: Any) -> Any:
        params = BEFORE if stage == "prepare" else AFTER
        return getattr(method, stage)(params, state, task)

    state = expected = method.init(BEFORE)
    for stage in ("prepare", "consolidate"):
        undisturbed = Stoppable(None)
        expected = learn(undisturbed, stage, expected)
        counts = []
        for stop in (1, 2, None) if undisturbed.added else (None,):
            halfway = Halfway(tmp_path / stage, one_device().mesh, checkpoint=0, about={}, saved=lambda: None)
            task = Stoppable(halfway, stop)
            if stop is None:
                with halfway.phase(stage):
                    state = learn(task, stage, state)
            else:
                with pytest.raises(StoppedTogether), halfway.phase(stage):
                    learn(task, stage, state)
            counts.append(task.added)
        assert counts == ([1, 2, 1] if undisturbed.added else [0]), stage
        assert bits(state) == bits(expected), stage
    assert undisturbed.added == 4
