"""What the methods are compared on: four text domains, and instruction tasks; each in two orders.

Order A is for choosing settings and is scored on dev rows; order B is for reporting and is scored on test rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from benchmarks.frontier.data import data_root, write_domain, write_task
from benchmarks.frontier.encoder import encoder
from jaxcl.config.experiment import merged

Split = Literal["dev", "test"]
SPLIT_OF: dict[str, Split] = {"A": "dev", "B": "test"}
GENERAL_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Testbed:
    """Tasks of one kind, and how each is trained.

    Attributes:
      name: name in records.
      kind: `text`, scored by nats per token, or `pairs`, scored by percent of right answers.
      orders: names of tasks, by order.
      steps: optimizer steps per task.
      batch_size: rows of a batch.
      rows: scored rows per task, at most.
      data: the configuration's section `data`.
      characters: of the training passages of a text domain, at most: about what its steps go through once.
      model: `decoder`, that of the benchmark files, or `encoder`, see `benchmarks.frontier.encoder`.
    """

    name: str
    kind: Literal["text", "pairs"]
    orders: Mapping[str, tuple[str, ...]]
    steps: int
    batch_size: int
    rows: int
    data: dict[str, Any]
    characters: int = 0
    model: Literal["decoder", "encoder"] = "decoder"

    @property
    def higher_is_better(self) -> bool:
        """The direction of the score."""
        return self.kind == "pairs"

    def config(self, tasks: tuple[str, ...], split: Split, method: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The configuration of a run, with learning rate 1: `PointTrainer` multiplies it.

        Args:
          tasks: names of tasks, in the order learned.
          split: split of the scored rows.
          method: name and options; under `run`, changes of other sections. `data.general` without a source is the
            general text of the benchmark files.
          folder: gets the rows and the run folder.
        """
        root = data_root()
        if self.kind == "text":
            rows = folder / f"text-{self.characters}"
            sources = {name: f"text:{write_domain(name, root, rows, self.characters).resolve()}" for name in tasks}
        else:
            sources = {name: f"json:{write_task(name, root, folder / 'tasks').resolve()}" for name in tasks}
        weights = root / "frontier" / "model" if self.model == "decoder" else encoder(folder)
        options = dict(method)
        changes = options.pop("run", {})
        if general := changes.get("data", {}).get("general"):
            changes = merged(changes, {"data": {"general": {"source": f"text:{general_text()}", **general}}})
        config = {
            "output": str(folder / "run"),
            "weights": str(weights),
            "model": {},
            "data": self.data,
            "tasks": [{"name": name, "source": source} for name, source in sources.items()],
            "method": options,
            "training": {
                "batch_size": self.batch_size,
                "steps": self.steps,
                "log_every": self.steps,
                "checkpoint_every": 0,
                "sinks": ["jsonl"],
            },
            "optimizer": {"learning_rate": 1.0, "schedule": "linear", "warmup": 0.1},
            "evaluation": {"split": split, "limit": self.rows, "batch_size": 32},
        }
        return merged(config, changes)


def general_text() -> Path:
    """The benchmark files' general text, which the small models were trained on."""
    return data_root() / "frontier" / "general.txt.gz"


_DOMAINS = {
    "A": ("reviews", "biomedical", "stories", "papers"),
    "B": ("papers", "reviews", "stories", "biomedical"),
}
_TEXT = {"length": 96, "packing": True}
_ANSWERS = {
    "A": ("relation", "category", "number", "direction"),
    "B": ("number", "direction", "category", "relation"),
}

TESTBEDS = {
    one.name: one
    for one in (
        Testbed("text", "text", _DOMAINS, steps=60, batch_size=8, rows=64, data=_TEXT, characters=200_000),
        # Not for choosing: to see that everything works.
        Testbed("text_quick", "text", _DOMAINS, steps=25, batch_size=8, rows=32, data=_TEXT, characters=60_000),
        # The same at the size of the first measurements: three and a half times the work.
        Testbed("text_long", "text", _DOMAINS, steps=100, batch_size=16, rows=96, data=_TEXT, characters=500_000),
        # Of a masked model, a step sees a seventh of the targets.
        Testbed(
            "encoder",
            "text",
            _DOMAINS,
            steps=60,
            batch_size=24,
            rows=96,
            data=_TEXT,
            characters=500_000,
            model="encoder",
        ),
        # Right after each task, plain fine-tuning at 1e-3 (percent right; the most frequent answer's share): relation
        # 100 (26), category 62 (about 12), number 98 (about 10), direction 62 (about 13). Tasks of whole sentences are
        # beyond this model: aspect, alone, 58 (61).
        Testbed(
            "instruction",
            "pairs",
            _ANSWERS,
            steps=100,
            batch_size=16,
            rows=250,
            data={
                "prompt_length": 24,
                "answer_length": 8,
                "buckets": 1,
                "bucket_lengths": [32],
                "on_long_answer": "cut",
            },
        ),
    )
}
