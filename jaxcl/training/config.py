"""Configuration of training: length, batches, checkpoints, privacy."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from jaxcl.errors import UserError
from jaxcl.schema import Schema
from jaxcl.training.privacy import PrivacyConfig


class TrainingConfig(Schema):
    """How long each task is trained, in what batches, and how often metrics and checkpoints are written."""

    batch_size: int = Field(32, ge=1, description="rows per batch over all processes and micro-batches")
    accumulate: int = Field(
        1,
        ge=1,
        description="number of micro-batches per batch: saves memory, also in measurements between tasks; the numbers "
        "are the same except for dropout in training, and for losses that compare rows (the contrast of das_paper, "
        "router_loss_weight), which see one micro-batch at a time",
    )
    epochs: float | tuple[float, ...] | None = Field(
        None,
        description="passes over a task's training examples: one number, or one per task; this or steps, default 1",
    )
    steps: int | tuple[int, ...] | None = Field(
        None,
        description="optimizer steps per task, memory batches included: one number, or one per task; this or epochs",
    )
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    sinks: tuple[Literal["jsonl", "tensorboard", "wandb", "mlflow"], ...] = Field(
        ("jsonl", "tensorboard"),
        description="where rows of metrics go; metrics.jsonl is always written, wandb and mlflow are optional packages",
    )
    checkpoint_every: int = Field(
        500, ge=0, description="steps between checkpoints within a task; 0: only at the ends of tasks"
    )
    keep: int = Field(1, ge=1, description="number of latest checkpoints kept")
    keep_tasks: int | None = Field(
        1,
        ge=1,
        description="number of checkpoints after tasks kept in addition to the latest ones, with schedules wsd and "
        "infinite also those before their decays; null: all",
    )
    max_skipped: int = Field(
        10,
        ge=0,
        description="a step whose loss or gradient is not finite changes nothing; after this many in a row (or all of "
        "a task's) the run goes back to the last checkpoint, with another order of the data from there on; 0: the "
        "first one stops the run",
    )
    max_rewinds: int = Field(
        1, ge=0, description="how often each task may go back because of max_skipped; then the run stops"
    )
    spike_window: int = Field(
        100,
        ge=0,
        description="losses, of the same kind of batch, that the next one is compared with; a spike is counted in "
        "metrics.jsonl and named in the report, and nothing else follows from it; 0: none",
    )
    spike_deviations: float = Field(
        6.0, gt=0, description="standard deviations above the mean of spike_window losses that make a loss a spike"
    )
    prefetch: int = Field(2, ge=0, description="batches prefetched to the devices")
    privacy: PrivacyConfig | None = Field(
        None, description="differentially private training, for methods that keep no examples; none: plain gradients"
    )
    profile: tuple[int, int] | None = Field(
        None,
        description="first and last step traced on process 0, for xprof and TensorBoard; steps are counted over all "
        "tasks, as in metrics.jsonl; null: no trace",
    )

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if value == () or any(not (math.isfinite(number) and number > 0) for number in values):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile must be a first and a last step, both from 1, got {list(self.profile)}")
        return self


def task_steps(config: TrainingConfig, index: int, num_tasks: int, steps_per_epoch: int) -> int:
    """Number of optimizer steps of one task.

    Args:
      config: the training section.
      index: index of the task in the sequence.
      num_tasks: length of the sequence.
      steps_per_epoch: batches in one pass over the task.

    Returns:
      At least 1; a fraction of an epoch is rounded up.

    Raises:
      UserError: a list of epochs or steps does not have one entry per task.

    Examples:
      >>> task_steps(TrainingConfig(epochs=(5, 3)), 1, 2, steps_per_epoch=10)
      30
    """
    name = "steps" if config.steps is not None else "epochs"
    value = getattr(config, name)
    if isinstance(value, tuple):
        if len(value) != num_tasks:
            raise UserError(
                f"training.{name}: {list(value)} has {len(value)} entries for {num_tasks} tasks; "
                "give one number or one per task",
                exit_code=2,
            )
        value = value[index]
    if name == "steps":
        return int(value)
    return max(1, math.ceil((1.0 if value is None else value) * steps_per_epoch))


def check_batch_size(
    size: int, accumulate: int, ways: int, processes: int = 1, key: str = "training.batch_size"
) -> None:
    """Checks that every device gets the same number of rows in every micro-batch.

    Args:
      size: rows per batch.
      accumulate: micro-batches per batch.
      ways: number of parts of a batch on the mesh (`Layout.batch_ways`).
      processes: number of processes, each of which reads an equal share.
      key: key of the size in the configuration.

    Raises:
      UserError: they do not; names the key, the value and the nearest allowed values.

    Examples:
      >>> check_batch_size(10, accumulate=1, ways=4)
      Traceback (most recent call last):
      jaxcl.errors.UserError: training.batch_size: 10 must be a multiple of 4 (mesh data * fsdp = 4); nearest: 8 or 12
    """
    unit = math.lcm(accumulate * ways, processes)
    if size % unit == 0:
        return
    below, above = size // unit * unit, (size // unit + 1) * unit
    parts = [f"mesh data * fsdp = {ways}"]
    if accumulate > 1:
        parts.append(f"training.accumulate = {accumulate}")
    if processes > 1:
        parts.append(f"{processes} processes")
    nearest = f"{below} or {above}" if below else str(above)
    raise UserError(f"{key}: {size} must be a multiple of {unit} ({', '.join(parts)}); nearest: {nearest}", exit_code=2)


def micro_batch_size(config: TrainingConfig, ways: int, processes: int = 1) -> int:
    """Rows that go through the model at once: those of a micro-batch, rounded up to what processes and mesh can split.

    Args:
      config: the training section; its batch size passes `check_batch_size`.
      ways: number of parts of a batch on the mesh (`Layout.batch_ways`).
      processes: number of processes, each of which reads an equal share.

    Examples:
      >>> micro_batch_size(TrainingConfig(batch_size=16, accumulate=4), ways=2)
      4
      >>> micro_batch_size(TrainingConfig(batch_size=4, accumulate=4), ways=1, processes=2)
      2
    """
    unit = math.lcm(ways, processes)
    return -(-config.batch_size // (config.accumulate * unit)) * unit
