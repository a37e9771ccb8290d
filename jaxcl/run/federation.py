"""Federated training in one process, without a network: a server and clients that learn one model task after task.

One client at a time is on the devices. What clients and server hand to each other is on the host: `begin`, `train`,
`conclude`, `merge` and `store` of a `Client` are what messages over a network will ask for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxcl.config import ExperimentConfig
from jaxcl.data.clients import task_of_client
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.functional.federated import ClientMean, combine_shared, server_step, why_refused
from jaxcl.methods.base import Method
from jaxcl.methods.registry import find_method
from jaxcl.models.trainable import Params, overlay, trained
from jaxcl.run.client import Client, client_folder
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.folder import RunFolder
from jaxcl.run.rewinding import order_seed
from jaxcl.run.sequence import TaskSequence
from jaxcl.sharding.layout import put
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.federated import FederatedConfig
from jaxcl.training.kept import START_MARK, mark_after
from jaxcl.training.low_bits import no_low_bits, split
from jaxcl.training.state import TrainState
from jaxcl.training.watch import NotFinite, Watch

ROUNDS = "rounds.jsonl"
"""A row per round: clients, those refused and why, bytes to and from the server, norm of the server's step.

Rows of the kind `shared` count the bytes of what methods share.
"""


def federate(config: ExperimentConfig) -> Results:
    """Trains clients and server through the sequence of tasks, and evaluates the server's model after each.

    Args:
      config: a configuration with the section `federated`. It is evaluated as by `jaxcl run`, on all tasks' rows.

    Returns:
      The results; those of a finished run are read.

    Raises:
      UserError: the configuration cannot be federated, or the folder contains an unfinished run.
    """
    settings = check_federated(config)
    folder = RunFolder(Path(config.output))
    try:
        folder.claim(config.plain())
        if folder.results.is_file() and (results := Results.read(folder.results)).finished:
            return results
        if folder.checkpoints.exists():
            raise UserError(f"output {folder.path}: contains an unfinished federated run; name another output")
        whole = config.model_copy(update={"training": _whole_tasks(config, settings)})
        parts = build(whole, folder)
        with contextlib.ExitStack() as stack:

            def checkpoints(of: RunFolder) -> Checkpoints:
                keep = config.training.keep, config.training.keep_tasks
                return stack.enter_context(Checkpoints(of.checkpoints, keep=keep[0], keep_marked=keep[1]))

            server = Server(parts, folder, checkpoints(folder), settings)
            server.board.evaluator.check()
            server.check_schedule()
            for number in range(settings.clients):
                of = RunFolder(client_folder(config.output, str(number)))
                own = _parts_of(parts, settings, number, of)
                of.claim(own.config.plain())
                stack.callback(of.release)
                server.clients.append(Client(str(number), own, of, checkpoints(of), server.base))
            return server.run()
    finally:
        folder.release()


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
    return config.federated


def _whole_tasks(config: ExperimentConfig, settings: FederatedConfig) -> Any:
    return config.training.model_copy(update={"steps": settings.rounds * settings.steps})


def _parts_of(parts: Components, settings: FederatedConfig, number: int, folder: RunFolder) -> Components:
    """The parts of a client: its rows and its seed, and the server's network, tokenizer and compiled step.

    The first client has the run's own seed, so that alone it is the ordinary run.
    """
    seed = order_seed(parts.config.seed, number)
    config = parts.config.model_copy(update={"seed": seed, "output": str(folder.path), "federated": None})
    tasks = tuple(
        task_of_client(
            task, number, settings.clients, alpha=settings.alpha, seed=parts.config.seed + index, cache=parts.cache
        )
        for index, task in enumerate(parts.tasks)
    )
    own = dataclasses.replace(parts, config=config, tasks=tasks, trainer=parts.trainer.with_seed(seed))
    vars(own)["shapes"] = parts.shapes  # of batches, for which a step is compiled: the same for all clients
    return own


class Server(TaskSequence):
    """The server: its params and its optimizer's state, on the host, and the clients.

    Attributes:
      clients: the clients, in the order in which they are added up.
      base: the params that the run begins with, on the host.
      params: what is trained, float32.
    """

    def __init__(
        self, parts: Components, folder: RunFolder, checkpoints: Checkpoints, settings: FederatedConfig
    ) -> None:
        """Prepares the server; clients are appended afterwards.

        Args:
          parts: the parts of the run, with the rows of all clients for evaluation.
          folder: the run folder.
          checkpoints: an empty series in it.
          settings: the section `federated`.
        """
        super().__init__(parts, folder, checkpoints)
        self.settings = settings
        self.clients: list[Client] = []
        self.base: Params = jax.tree.map(np.array, initial_params(parts))
        self.params: Params = jax.tree.map(lambda leaf: leaf.astype(np.float32), trained(self.base))
        self._optimizer = settings.server.build()
        self._opt_state = self._optimizer.init(self.params)
        self._mean = jax.jit(lambda mean, tree, weight: mean.add(tree, weight))
        self._step = jax.jit(lambda state, params, mean: server_step(self._optimizer, state, params, mean))

    def run(self) -> Results:
        """Trains and evaluates from the first task to the end."""
        for sequence in (self, *self.clients):
            sequence.parts.encode_all()
        finished = False
        try:
            self._score(-1)
            for index in range(self.parts.phases):
                self._federate(index)
                self._score(index)
            finished = True
        finally:
            for client in self.clients:
                client.close(finished=finished)
        self.checkpoints.wait()
        self.board.write(self.stopwatch.seconds, finished=True)
        return self.board.results

    def _federate(self, index: int) -> None:
        """One task."""
        settings = self.settings
        with self._timed("method"):
            self._agree([client.begin(index, self.params) for client in self.clients], index)
        with self._timed("training"):
            for round_number in range(settings.rounds):
                self._round(index, round_number)
        with self._timed("method"):
            self._agree([client.conclude(index, self.params) for client in self.clients], index)
            for client in self.clients:
                client.store(index, self.params)
        of_clients = {client.name: client.parts.training_pipeline(index).describe() for client in self.clients}
        described = {"task": self.parts.training_pipeline(index).describe(), "clients": of_clients}
        total = settings.rounds * settings.steps
        watch = Watch(skipped=sum(client.watch.skipped for client in self.clients))
        self.board.note_task(index, steps=total, described=described, watch=watch)

    def _round(self, index: int, round_number: int) -> None:
        """Trains the clients of a round one after another, and takes the server's step."""
        settings, mean = self.settings, ClientMean.zero(self.params)
        refused: dict[str, str] = {}
        chosen = settings.chosen(self.config.seed, index, round_number).tolist()
        size = _bytes(self.params)
        for number in chosen:
            client = self.clients[number]
            try:
                sent = client.train(index, round_number, settings.steps, self.params)
                reason = why_refused(sent.params, self.params)
            except NotFinite as error:
                reason = str(error)
            if reason is None:
                mean = self._mean(mean, sent.params, sent.weight)
                continue
            refused[client.name] = reason
            print(f"round {round_number + 1}: client {client.name} is left out: {reason}", file=sys.stderr)
        before = self.params
        if len(refused) < len(chosen):
            params, self._opt_state = self._step(self._opt_state, self.params, mean.mean)
            self.params = jax.tree.map(np.array, params)
        self._note(
            "round",
            task=index,
            round=round_number,
            clients=[self.clients[number].name for number in chosen],
            refused=refused,
            bytes_down=size * len(chosen),
            bytes_up=size * len(chosen),
            update_norm=_distance(before, self.params),
        )

    def _agree(self, shared: Sequence[PyTree], index: int) -> None:
        """Gives every client what all of them know, if the method shares anything."""
        if not jax.tree.leaves(shared):
            return
        weights = [float(len(client.parts.train_rows(index))) for client in self.clients]
        known = combine_shared(shared, weights, self.parts.method.shared_by)
        self._note("shared", task=index, bytes_up=_bytes(shared), bytes_down=_bytes(known) * len(self.clients))
        for client in self.clients:
            client.merge(known)

    def _score(self, after: int) -> None:
        """Evaluates the server's model, and saves it."""
        state = self._state(after)
        self._evaluate(state, after)
        mark = START_MARK if after < 0 else mark_after(after)
        self._save(state, task=after, phase="learned", mark=mark)

    def _state(self, after: int) -> TrainState:
        """The model as an ordinary run saves it after a task; moments and the method's state are the clients'."""
        low_bits = no_low_bits(trained(self.base))
        part, low_bits = split(self.params, low_bits)
        trainer = self.parts.trainer
        # Arrays of its own: an array on the host may share its memory with one on a CPU device.
        state = trainer.init(jax.tree.map(np.array, overlay(self.base, part)))
        step = np.int32((after + 1) * self.settings.rounds * self.settings.steps)
        own = put((step, jax.tree.map(np.array, low_bits)), (self.parts.layout.replicated, trainer.shardings.low_bits))
        return state.replace(step=own[0], low_bits=own[1])

    def _note(self, kind: str, **row: Any) -> None:
        with (self.folder.path / ROUNDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _distance(one: Params, other: Params) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return math.sqrt(sum(float(np.sum(np.square(a.astype(np.float64) - b))) for a, b in pairs))


__all__ = ["Server", "check_federated", "federate"]
