"""What can be said before training: whether model, method and data of a run go together."""

from __future__ import annotations

from typing import Any

from jaxcl.config import ExperimentConfig
from jaxcl.data.sources import TaskData
from jaxcl.data.split import Rows
from jaxcl.errors import UserError
from jaxcl.evaluation.metrics import check_answers
from jaxcl.evaluation.scoring import drawn
from jaxcl.methods.base import Method


def longest_prefix(method: Method[Any]) -> int:
    """Tokens of the longest `Method.prompt_prefix` of all tasks."""
    return max(len(method.prompt_prefix(index)) for index in range(method.num_tasks))


def check_tasks(
    config: ExperimentConfig, tasks: tuple[TaskData, ...], method: Method, general: TaskData | None
) -> None:
    """Checks that model and method can learn each kind of task, and that the longest row fits the model's window."""
    data, window = config.data, config.model.max_length
    prefix = longest_prefix(method)
    soft = f" + {prefix} soft tokens" if prefix else ""
    needed = {
        "text": ("length", data.length),
        "pairs": (f"prompt_length + answer_length{soft}", data.prompt_length + data.answer_length + prefix),
    }
    gone = [spec.name for spec in config.tasks if spec.data_gone]
    if gone and method.joint:
        raise UserError(
            f"task {gone[0]}: data_gone is true, but {config.method.name} learns all tasks together and needs the "
            "examples of each; choose a method that does not",
            exit_code=2,
        )
    if not prefix and (unread := getattr(config.model, "soft_tokens", 0)):
        raise UserError(
            f"model.soft_tokens: {unread} vectors, which {config.method.name} does not read; allowed is 0", exit_code=2
        )
    _check_end_tasks(config, tasks)
    _check_budget(method, len(tasks))
    written = method.replay is not None and method.replay.source != "kept"
    for task in tasks if general is None else (*tasks, general):
        words = "data.general" if task is general else f"task {task.name}"
        if task.answered and not method.network.causal:
            raise UserError(f"{words}: prompts and answers need a decoder; the model is an encoder", exit_code=2)
        if task.kind == "labelled":
            raise UserError(f"{words}: labelled examples can only be the end_task of a text domain", exit_code=2)
        if (task.kind == "text" and prefix) or (task.kind != "pairs" and written and task is not general):
            # Samples are split into prompt and answer, and soft tokens precede a prompt.
            key = f"name: {config.method.name}" if prefix else "replay.source: synthetic"
            raise UserError(f"method.{key} needs prompts and answers; {words} is {task.kind}", exit_code=2)
        key, tokens = needed["pairs" if task.answered else "text"]
        if tokens > window:
            raise UserError(
                f"data.{key}: {tokens} tokens exceed the model's window, model.max_length={window} ({words})",
                exit_code=2,
            )
    if method.replay is not None and written and method.replay.synthetic.writer == "start" and config.weights is None:
        raise UserError(
            "method.replay.synthetic.writer: start is an untrained model here (no weights); allowed: before",
            exit_code=2,
        )


def _check_end_tasks(config: ExperimentConfig, tasks: tuple[TaskData, ...]) -> None:
    """Checks that only text domains have end tasks, and that their rows fit the model's window."""
    length, window = config.evaluation.end_task.length, config.model.max_length
    for spec, task in zip(config.tasks, tasks, strict=True):
        if spec.end_task is None:
            continue
        if task.kind != "text":
            raise UserError(
                f"task {task.name}: an end_task measures a text domain; the task's rows are {task.kind}", exit_code=2
            )
        if length > window:
            raise UserError(
                f"evaluation.end_task.length: {length} tokens exceed the model's window, model.max_length={window}",
                exit_code=2,
            )


def _check_budget(method: Method, tasks: int) -> None:
    """Checks that a memory counted in rows has at least one row per task."""
    replay = method.replay
    if replay is None or replay.room is None or replay.room.unit != "rows" or replay.choose == "reservoir":
        return
    if replay.room.amount < tasks:
        raise UserError(
            f"method.replay.budget: {replay.room.amount} rows are too few for one of each of {tasks} tasks", exit_code=2
        )


def check_copies(config: ExperimentConfig, tasks: tuple[TaskData, ...], method: Method) -> None:
    """Checks that the rows of each task can be read as often as the method does in one pass (`Method.copies`)."""
    name, copies, data, window = config.method.name, method.copies, config.data, config.model.max_length
    if copies == 1:
        return
    for task in tasks:
        if task.kind != "pairs":
            raise UserError(
                f"method.name: {name} needs prompts and answers; task {task.name} is {task.kind}", exit_code=2
            )
    if data.pack_pairs:
        raise UserError(f"data.pack_pairs: {name} takes one pair per row; allowed is false", exit_code=2)
    tokens = copies * (data.prompt_length + data.answer_length + longest_prefix(method))
    if tokens > window:
        raise UserError(
            f"data.prompt_length + answer_length: {name} reads each row {copies} times in one pass, and {tokens} "
            f"tokens exceed the model's window, model.max_length={window}",
            exit_code=2,
        )


def check_private_data(config: ExperimentConfig) -> None:
    """Checks that every example is in one row per epoch, alone: epsilon is that of a row, by the number of epochs."""
    mixed = [f"tasks.{index}.mix" for index, spec in enumerate(config.tasks) if spec.mix]
    for key in [*mixed, *(["data.pack_pairs"] if config.data.pack_pairs else [])]:
        raise UserError(
            f"training.privacy: {key} puts examples into batches more than once per epoch, or several into a row, "
            "which epsilon does not account for; leave it out",
            exit_code=2,
        )


def check_metrics(config: ExperimentConfig, tasks: tuple[TaskData, ...]) -> None:
    """Checks that a perfect model would score 100 on each task."""
    settings = config.evaluation
    for spec, task in zip(config.tasks, tasks, strict=True):
        if task.answered:
            metric = settings.metric_for("pairs", spec.metric)
            rows: Rows = getattr(task, settings.split)
            scored = drawn(len(rows), settings.limit)
            check_answers(metric, rows.pick(scored), f"task {task.name}: {settings.split}", scored)
