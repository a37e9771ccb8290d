"""Federated training in one process, without a network: a server and clients that learn one model task after task.

One client at a time is on the devices. What clients and server hand to each other is on the host, by `Client.answer`:
over a network (`jaxcl.flower`), messages ask for the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax

from jaxcl.config import ExperimentConfig
from jaxcl.data.clients import task_of_client
from jaxcl.data.formats.storage import is_url
from jaxcl.data.sources import TaskData
from jaxcl.errors import UserError
from jaxcl.methods.base import Method
from jaxcl.methods.registry import find_method
from jaxcl.models.trainable import Params
from jaxcl.reporting.report import write_report
from jaxcl.run.client import Client, client_folder
from jaxcl.run.components import Components, build
from jaxcl.run.ending import finished_results
from jaxcl.run.exchange import simulated_secrets
from jaxcl.run.folder import RunFolder
from jaxcl.run.grid import Grid, InProcess, Open
from jaxcl.run.loading import open_task
from jaxcl.run.rewinding import order_seed
from jaxcl.run.sequence import Outcome
from jaxcl.run.server import Server
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.federated import FederatedConfig


def federate(config: ExperimentConfig) -> Outcome:
    """Trains clients and server through the sequence of tasks, and evaluates the server's model after each.

    If the run folder contains an interrupted run of the same configuration, it is resumed; the results of a finished
    run are returned.

    Args:
      config: a configuration with the section `federated`. It is evaluated as by `jaxcl run`, on all tasks' rows.

    Returns:
      The results, and the path of the report.

    Raises:
      UserError: the configuration cannot be federated, or something it refers to cannot be used.
      KeyboardInterrupt: interrupted; the last checkpoint is intact.
    """
    settings = check_federated(config)
    folder = RunFolder(Path(config.output))
    try:
        folder.claim(config.plain())
        if (found := finished_results(folder, config)) is not None:
            return Outcome(found, write_report(folder.path))
        with contextlib.ExitStack() as stack:
            opens: list[Open] = []
            grid = InProcess(opens)
            server = open_server(config, folder, grid, stack)
            for number in range(settings.clients):
                secrets = simulated_secrets(config.seed, number, settings.clients)
                opens.append(opener(server.parts, settings, number, server.base, secrets, stack))
            finished = False
            try:
                results = server.run()
                finished = True
            finally:
                grid.close(finished=finished)
        return Outcome(results, write_report(folder.path))
    finally:
        folder.release()


def open_server(config: ExperimentConfig, folder: RunFolder, grid: Grid, stack: contextlib.ExitStack) -> Server:
    """The server of a run, at its last checkpoint, once everything that it needs has been checked.

    Args:
      config: the configuration.
      folder: the run folder, claimed.
      grid: the clients.
      stack: closes what is opened.

    Raises:
      UserError: the configuration cannot be federated, or something it refers to cannot be used.
    """
    settings, training = check_federated(config), config.training
    parts = build(whole_tasks(config, settings), folder)
    checkpoints = stack.enter_context(
        Checkpoints(folder.checkpoints, keep=training.keep, keep_marked=training.keep_tasks)
    )
    server = Server(parts, folder, checkpoints, settings, grid)
    server.board.evaluator.check()
    server.check_schedule()
    return server


def opener(
    parts: Components,
    settings: FederatedConfig,
    number: int,
    base: Params,
    secrets: dict[int, bytes],
    stack: contextlib.ExitStack,
) -> Open:
    """How to open a client in its folder, which is locked from now on.

    Args:
      parts: the parts of the run, built from `whole_tasks`.
      settings: the section `federated`.
      number: the client's number.
      base: the params that the run begins with, on the host.
      secrets: the secret of each pair that the client is part of, by the number of the other one.
      stack: closes what is opened.

    Raises:
      UserError: the folder cannot be used, or the client has no rows of a task.
    """
    folder = RunFolder(client_folder(parts.config.output, str(number)))
    own = parts_of(parts, settings, number, folder)
    folder.claim(own.config.plain())
    stack.callback(folder.release)
    training = parts.config.training
    # Two at least: the server's last checkpoint may belong to the one before the last.
    checkpoints = stack.enter_context(
        Checkpoints(folder.checkpoints, keep=max(training.keep, 2), keep_marked=training.keep_tasks)
    )

    def open_client(checkpoint: int | None, before: Params | None) -> Client:
        checkpoints.go_back(checkpoint)
        saved = checkpoints.latest_whole()
        if checkpoint != (None if saved is None else saved.number):
            raise UserError(
                f"{folder.path}: checkpoint {checkpoint}, which belongs to the server's, is missing or damaged; "
                "start a new run in another output"
            )
        client = Client(number, own, folder, checkpoints, base, settings, before=before)
        own.encode_all()
        client.secrets = secrets
        return client

    return open_client


def check_federated(config: ExperimentConfig) -> FederatedConfig:
    """The section `federated`, if everything else allows it.

    Raises:
      UserError: it does not; names the key.
    """

    def refused(words: str) -> UserError:
        return UserError(words, exit_code=2)

    if config.federated is None:
        raise refused("federated: the section is missing; it needs clients, rounds and steps")
    if jax.process_count() > 1:
        raise refused("federated: allowed in one process only")
    if is_url(config.output):
        raise refused(f"output {config.output}: with federated, name a folder, not a URL")
    training, optimizer = config.training, config.optimizer
    if training.steps is not None or training.epochs is not None:
        raise refused("training.steps, training.epochs: with federated, rounds times steps say how long a task is")
    if training.privacy is not None:
        raise refused("training.privacy: not with federated")
    if optimizer.averaging is not None or optimizer.goes_on_before_decay:
        raise refused("optimizer: with federated, average must be none and schedule constant, linear or cosine")
    method = find_method(config.method.name)
    own_params = any(getattr(method, name) is not getattr(Method, name) for name in ("final_params", "params_for"))
    if method.joint or method.individual or own_params:
        raise refused(
            f"method.name: {config.method.name} has no params that are the same for all tasks and clients; allowed "
            "with federated are methods that leave them as training does, one task after another"
        )
    settings = config.federated
    if settings.share == "adapters" and config.model.lora is None:
        raise refused("federated.share: adapters, but the model has none (model.lora); allowed: params")
    for number, order in enumerate(settings.orders or ()):
        if sorted(order) != sorted(names := [task.name for task in config.tasks]):
            raise refused(f"federated.orders.{number}: expected the names of all tasks ({', '.join(names)}), each once")
    hidden = [name for name in ("privacy", "secure") if getattr(settings, name)]
    if hidden and method.share is not Method.share:
        raise refused(
            f"federated.{hidden[0]}: {config.method.name} shares what it measures besides params, and that is neither "
            "noised nor masked; allowed: methods that share only params"
        )
    return settings


def whole_tasks(config: ExperimentConfig, settings: FederatedConfig) -> ExperimentConfig:
    """The configuration with the steps of a whole task in `training.steps`."""
    training = config.training.model_copy(update={"steps": settings.rounds * settings.steps})
    return config.model_copy(update={"training": training})


def owned_root(config: ExperimentConfig, owner: str) -> str:
    """The folder that a client's sources are read in.

    Args:
      config: the configuration of the run.
      owner: the client's folder in `federated.owners`.
    """
    return str(Path(config.data_root) / Path(owner).expanduser())


def parts_of(parts: Components, settings: FederatedConfig, number: int, folder: RunFolder) -> Components:
    """The parts of a client: its rows and its seed, and the server's network, tokenizer and compiled step.

    The first client has the run's own seed, so that alone it is the ordinary run.

    Args:
      parts: the parts of the run.
      settings: the section `federated`.
      number: the client's number.
      folder: the client's folder.

    Raises:
      UserError: its rows cannot be read or divided.
    """
    seed = order_seed(parts.config.seed, number)
    order = settings.order(number, parts.names)
    specs = tuple(parts.config.tasks[index] for index in order)
    changes = {"seed": seed, "output": str(folder.path), "federated": None, "tasks": specs}
    config = parts.config.model_copy(update=changes)
    if settings.owners is not None:
        config = config.model_copy(update={"data_root": owned_root(config, settings.owners[number])})
        tasks = tuple(open_task(spec, config, parts.cache) for spec in specs)
        return dataclasses.replace(parts, config=config, tasks=tasks, trainer=parts.trainer.with_seed(seed))

    def dealt(index: int) -> TaskData:
        task, seed = parts.tasks[index], parts.config.seed + index
        return task_of_client(task, number, settings.clients, alpha=settings.alpha, seed=seed, cache=parts.cache)

    tasks = tuple(map(dealt, order))
    own = dataclasses.replace(parts, config=config, tasks=tasks, trainer=parts.trainer.with_seed(seed))
    vars(own)["shapes"] = parts.shapes  # of batches, for which a step is compiled: the same for all clients
    return own


__all__ = [
    "check_federated",
    "federate",
    "open_server",
    "opener",
    "owned_root",
    "parts_of",
    "whole_tasks",
]
