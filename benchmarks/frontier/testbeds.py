"""What the methods are compared on: four text domains, and instruction tasks; each in two orders.

Order A is for choosing settings and is scored on dev rows; order B is for reporting and is scored on test rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from benchmarks.frontier.data import data_root, write_domain, write_task

Split = Literal["dev", "test"]
SPLIT_OF: dict[str, Split] = {"A": "dev", "B": "test"}
GENERAL_ROWS, DRIFT_ROWS = 100, 64


@dataclasses.dataclass(frozen=True)
class Testbed:
    """Tasks of one kind, and how each is trained.

    Attributes:
      name: name in records.
      kind: `text` or `pairs`.
      orders: names of tasks, by order.
      steps: optimizer steps per task.
      rows: scored rows per task, at most.
      data: the configuration's section `data`.
      score: what is measured: nats per token (lower is better), or percent of right answers.
    """

    name: str
    kind: Literal["text", "pairs"]
    orders: dict[str, tuple[str, ...]]
    steps: int
    rows: int
    data: dict[str, Any]
    score: Literal["nats", "percent"]

    @property
    def higher_is_better(self) -> bool:
        """The direction of the score."""
        return self.score == "percent"

    def config(self, tasks: tuple[str, ...], split: Split, method: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The configuration of a run, with learning rate 1: `PointTrainer` multiplies it.

        Args:
          tasks: names of tasks, in the order learned.
          split: split of the scored rows.
          method: name and options.
          folder: gets the rows and the run folder.
        """
        root = data_root()
        write, scheme = (write_domain, "text") if self.kind == "text" else (write_task, "json")
        sources = {name: write(name, root, folder / "data").resolve() for name in tasks}
        return {
            "output": str(folder / "run"),
            "weights": str(root / "frontier" / "model"),
            "model": {},
            "data": self.data,
            "tasks": [{"name": name, "source": f"{scheme}:{source}"} for name, source in sources.items()],
            "method": method,
            "training": {
                "batch_size": 16,
                "steps": self.steps,
                "log_every": self.steps,
                "checkpoint_every": 0,
                "sinks": ["jsonl"],
            },
            "optimizer": {"learning_rate": 1.0, "schedule": "linear", "warmup": 0.1},
            "evaluation": {"split": split, "limit": self.rows, "batch_size": 50},
        }


TESTBEDS = {
    "text": Testbed(
        name="text",
        kind="text",
        orders={
            "A": ("reviews", "biomedical", "stories", "papers"),
            "B": ("papers", "reviews", "stories", "biomedical"),
        },
        steps=100,
        rows=100,
        data={"length": 96, "packing": True},
        score="nats",
    ),
    "instruction": Testbed(
        name="instruction",
        kind="pairs",
        orders={
            "A": ("relation", "category", "aspect", "direction"),
            "B": ("direction", "aspect", "relation", "category"),
        },
        steps=150,
        rows=250,
        data={"prompt_length": 88, "answer_length": 8, "buckets": 1, "bucket_lengths": [96]},
        score="percent",
    ),
}
