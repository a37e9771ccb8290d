"""Options of methods: what all have, and how examples of earlier tasks are replayed."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from jaxcl.functional.losses import Gate
from jaxcl.schema import Schema

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMG]i?B)\s*")
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "kiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class MethodOptions(Schema):
    """Options that all methods have."""

    loss_chunk: int = Field(
        512,
        ge=0,
        description="scored positions of a row whose token scores exist at the same time; more are worked through "
        "one part after the other and computed again in the backward pass; 0: no limit",
    )
    loss_gate: Gate = Field(
        "none",
        description="factor on the loss of each token of the task at hand; none: 1; probability: the model's own "
        "probability of the token (DFT); entropy: how unsure the model is there (EAFT)",
    )


class SyntheticConfig(Schema):
    """How a model writes samples of a task it has learned."""

    writer: Literal["start", "before"] = Field(
        "start",
        description="who writes the prompts; start: the model that the run began with (needs weights); before: the "
        "model as it was before the task",
    )
    candidates: int = Field(4, ge=1, description="samples written for each one that is kept")
    temperature: float = Field(0.8, gt=0, description="divides the scores that prompts are drawn by")
    top_p: float = Field(0.95, gt=0, le=1, description="prompts are drawn among the likeliest tokens of this mass")
    similarity: float = Field(
        0.8, ge=0, le=1, description="share of equal letters from which a sample counts as a copy of another prompt"
    )
    prefix: str | None = Field(
        None, description="what each prompt begins with; none: the longest beginning that a task's prompts share"
    )


class Budget(NamedTuple):
    """What the examples of all tasks together may take: rows, or bytes of their tokens in the run folder."""

    amount: int
    unit: Literal["rows", "bytes"]


def read_budget(text: str) -> Budget:
    """A budget as it is written in a configuration.

    >>> read_budget("200"), read_budget("1.5 MB")
    (Budget(amount=200, unit='rows'), Budget(amount=1500000, unit='bytes'))

    Raises:
      ValueError: it is neither.
    """
    found = _SIZE.fullmatch(text)
    if found is None and not text.strip().isdecimal():
        raise ValueError(f"must be a number of rows, or bytes such as 500 kB, 10 MB or 1 GiB; got {text!r}")
    amount = int(float(found[1]) * _UNITS[found[2]]) if found else int(text)
    if amount < 1:
        raise ValueError(f"must be at least one row or byte, got {text!r}")
    return Budget(amount, "bytes" if found else "rows")


class ReplayConfig(Schema):
    """How examples of earlier tasks are kept and fed back."""

    source: Literal["kept", "synthetic"] = Field(
        "kept",
        description="what is remembered; kept: examples; synthetic: samples that the model writes before it moves on, "
        "so that nothing of an earlier task's data is kept (prompt-answer tasks)",
    )
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="how samples are written")
    fraction: float = Field(
        0.01, ge=0, le=1, description="share of each task's training examples that is kept; above 0, at least one is"
    )
    minimum: int = Field(1, ge=0, description="smallest number of examples kept from a task")
    budget: int | str | None = Field(
        None,
        description="what is kept of all tasks together: a number of rows, or bytes of tokens such as `10 MB`. A later "
        "task takes room from earlier ones; fraction and minimum are not used. None: fraction and minimum",
    )
    choose: Literal["random", "highest_loss", "reservoir", "balanced"] = Field(
        "random",
        description="which examples are kept. random: drawn by seed; balanced: drawn so that each answer is equally "
        "frequent, in a task of few answers; highest_loss: those with the highest mean loss per learned token under "
        "the model that has learned the task; reservoir (needs budget): every example of all tasks so far with the "
        "same probability. All but reservoir divide a budget equally over the tasks so far",
    )
    mode: str = Field(
        "interleave",
        pattern="^(interleave|mix)$",
        description="interleave: every few steps, a step is on a memory batch; mix: every step is on a task batch and "
        "a memory batch, and minimises the sum of both losses",
    )
    every: int = Field(
        0,
        ge=0,
        description="interleave: steps between memory batches, at most as many as the task has; 0: so that each epoch "
        "of the task sees the memory once",
    )
    spacing: Literal["steps", "distance"] = Field(
        "steps",
        description="interleave: what lies between memory batches; steps: equally many steps; distance: equal sums of "
        "the learning rate, so that more of them come where the model moves faster",
    )

    @field_validator("budget")
    @classmethod
    def _is_budget(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            read_budget(str(value))
        return value

    @property
    def room(self) -> Budget | None:
        """The budget of all tasks together, if there is one."""
        return None if self.budget is None else read_budget(str(self.budget))

    def check(self) -> None:
        """Checks the section for methods that need a memory.

        Raises:
          ValueError: nothing is kept, or settings contradict each other.
        """
        if self.budget is None and self.fraction == 0 and self.minimum == 0:
            raise ValueError("replay.fraction: 0 with replay.minimum 0 keeps nothing; allowed: either above 0")
        if self.choose == "reservoir" and self.budget is None:
            raise ValueError("replay.choose: reservoir needs replay.budget, the size of the memory of all tasks")
        if self.spacing == "distance" and self.mode == "mix":
            raise ValueError("replay.spacing: distance with replay.mode mix, where every step is on memory, too")
        if self.source == "synthetic" and (self.budget is not None or self.choose != "random"):
            key = "choose" if self.budget is None else "budget"
            raise ValueError(f"replay.{key}: written samples are chosen by likelihood; allowed with source kept only")


class ReplayOptions(MethodOptions):
    """Options of methods that replay examples of earlier tasks."""

    replay: ReplayConfig = Field(ReplayConfig(), description="which examples are kept and how they come back")
