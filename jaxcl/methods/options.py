"""Options of methods: what all have, and how examples of earlier tasks are replayed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxcl.schema import Schema


class MethodOptions(Schema):
    """Options that all methods have."""

    loss_chunk: int = Field(
        512,
        ge=0,
        description="scored positions of a row whose token scores exist at the same time; more are worked through "
        "one part after the other and computed again in the backward pass; 0: no limit",
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

    def check(self) -> None:
        """Checks the section for methods that need a memory.

        Raises:
          ValueError: nothing is kept.
        """
        if self.fraction == 0 and self.minimum == 0:
            raise ValueError("replay.fraction: 0 with replay.minimum 0 keeps nothing; allowed: either above 0")


class ReplayOptions(MethodOptions):
    """Options of methods that replay examples of earlier tasks."""

    replay: ReplayConfig = Field(ReplayConfig(), description="which examples are kept and how they come back")
