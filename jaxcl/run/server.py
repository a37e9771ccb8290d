"""The server of federated training: its params, the state of its optimizer, and what it asks of clients."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxcl.evaluation.results import Results
from jaxcl.functional.client_drift import common_variate
from jaxcl.functional.federated import combine_shared, server_step, why_refused
from jaxcl.models.trainable import Params, overlay, trained
from jaxcl.run.agreement import agreed
from jaxcl.run.client import travelling
from jaxcl.run.components import Components, initial_params
from jaxcl.run.exchange import Gathering, Order
from jaxcl.run.folder import RunFolder
from jaxcl.run.grid import Grid, Lost, Reply, Words, why_unusable
from jaxcl.run.note import Phase, ServerNote, read_note
from jaxcl.run.rounds import Rounds
from jaxcl.run.sequence import TaskSequence
from jaxcl.sharding.layout import put
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.federated import FederatedConfig
from jaxcl.training.kept import START_MARK, mark_after
from jaxcl.training.keys import run_key
from jaxcl.training.low_bits import split, widen
from jaxcl.training.privacy import gaussian_epsilon
from jaxcl.training.state import TrainState, abstract
from jaxcl.training.watch import Watch


class Server(TaskSequence):
    """The server: its params and its optimizer's state, on the host, and the clients.

    Checkpoints are written at the ends of tasks and of rounds (`training.checkpoint_every`), and after a task's last
    round if the method consolidates it. Before each, the clients write theirs, whose numbers it notes: so a client that
    was killed later than the server goes back.

    Attributes:
      base: the params that the run begins with, on the host.
      params: what is trained and travels, float32.
    """

    def __init__(
        self, parts: Components, folder: RunFolder, checkpoints: Checkpoints, settings: FederatedConfig, grid: Grid
    ) -> None:
        """Opens the server at its last checkpoint.

        Args:
          parts: the parts of the run, with the rows of all clients for evaluation.
          folder: the run folder.
          checkpoints: the series in it.
          settings: the section `federated`.
          grid: the clients, not opened yet.
        """
        super().__init__(parts, folder, checkpoints)
        self.settings = settings
        self._grid = grid
        self._only_b = settings.only_adapters(parts.config.model.lora is not None)
        self.base: Params = jax.tree.map(np.array, initial_params(parts))
        self.params: Params = self._travelling(self.base)
        self._before = self.params
        self._optimizer = settings.server.build()
        self._opt_state = jax.tree.map(np.array, self._optimizer.init(self.params))
        self._variate = jax.tree.map(np.zeros_like, self.params) if settings.control_variates else {}
        self._step = jax.jit(lambda state, params, mean: server_step(self._optimizer, state, params, mean))
        shapes = jax.eval_shape(parts.trainer.init_method, parts.layout.shapes)
        self._shared = jax.eval_shape(parts.method.share, shapes)
        # By client: its weight in the task, if it has begun it; its last checkpoint; rounds that it was in.
        self._weights: dict[int, float] = {}
        self._numbers: dict[int, int] = {}
        self._keys: dict[int, str] = {}
        self._taken = dict.fromkeys(range(settings.clients), 0)
        # What all clients know at this point of the task, and whether there is any.
        self._known: PyTree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shared)
        self._agreed = False
        self._rows = Rounds(folder.rounds)
        if self.saved is not None:
            self._restore_all()

    def _travelling(self, tree: Params) -> Params:
        part = travelling(tree, only_b=self._only_b)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), part)

    def run(self) -> Results:
        """Trains and evaluates from the last checkpoint to the end."""
        with self._timed("data"):
            self.parts.encode_all()
        saved = self.saved
        task, done = -1, 0
        phase: Phase = "learned"
        note = None if saved is None else read_note(saved, ServerNote)
        if note is not None:
            self.stopwatch.resume(note.timing)
            task, phase, done = note.task, note.phase, note.rounds
        self._rows.cut(0 if note is None else note.rows)
        steps = self.settings.rounds * self.settings.steps
        self._note_attempt((task + 1) * steps if done == 0 else task * steps + done * self.settings.steps)
        self._open(range(self.settings.clients), None if phase == "learned" else self._before)
        if saved is None:
            self._checkpoint(-1, 0, mark=START_MARK)
        if phase == "learned":
            self._score(task)
            task, done = task + 1, 0
        for index in range(task, self.parts.phases):
            self._federate(index, done)
            self._score(index)
            done = 0
        if self.config.evaluation.dev:
            with self._timed("evaluation"):
                params = self._state(self.parts.phases - 1, 0).params
                self.board.evaluate_dev(lambda index: params)
        self.checkpoints.wait()
        self.board.write(self.stopwatch.seconds, finished=True)
        return self.board.results

    def _score(self, after: int) -> None:
        """Scores the tasks due after a task."""
        self._evaluate(self._state(after, 0), after)
        if not self.settings.score_clients or after < 0:
            return
        with self._timed("evaluation"):
            answers = self._ask("score", after, self._to_clients)
            scores = {str(number): self._as_listed(number, reply.words["matrix"]) for number, reply in answers}
            self._note_clients(scores=scores)
        self.board.write(self.stopwatch.seconds)

    def _as_listed(self, client: int, matrix: list[Any]) -> list[list[Any]]:
        """A client's scores with tasks as the configuration lists them, not as the client learns them."""
        order = self.settings.order(client, self.parts.names)
        whole = [row for row in matrix if isinstance(row, list) and len(row) == len(order)]
        return [[row[order.index(task)] for task in range(len(order))] for row in whole]

    def _note_clients(self, **values: Any) -> None:
        self.board.note_extra("federated", {**self.board.results.extra.get("federated", {}), **values})

    # One task

    def _federate(self, index: int, done: int) -> None:
        """A task, from the round `done` on."""
        settings = self.settings
        if done == 0:
            self._before, self._weights, self._agreed = self.params, {}, False
            if self.config.optimizer.reset_optimizer and settings.control_variates:
                self._variate = jax.tree.map(np.zeros_like, self.params)
            with self._timed("method"):
                self._begin(index, range(settings.clients))
        saved_at = done
        for round_number in range(done, settings.rounds):
            with self._timed("training"):
                self._round(index, round_number)
            every = self.config.training.checkpoint_every
            due = every and (round_number + 1 - saved_at) * settings.steps >= every
            last = round_number + 1 == settings.rounds
            if self._concludes if last else due:
                saved_at = round_number + 1
                self._checkpoint(index, saved_at)
        with self._timed("method"):
            self._agree(self._ask("conclude", index, self._to_clients), index)
            self._all("store", index, self._to_clients)
        self._note_task(index)
        self._checkpoint(index, 0, mark=mark_after(index))

    def _begin(self, index: int, clients: Sequence[int]) -> None:
        """Lets clients begin a task from the params before it."""
        shared: dict[int, PyTree] = {}
        for number, reply in self._ask("begin", index, {"params": self._before}, clients):
            self._weights[number], shared[number] = reply.words["weight"], reply.arrays
        if len(clients) == self.settings.clients:
            self._agree(((number, Reply(found, {})) for number, found in shared.items()), index)
        elif self._agreed:  # clients that came later
            self._all("merge", index, self._known, list(shared))

    def _round(self, index: int, round_number: int) -> None:
        """Trains the clients of a round, and takes the server's step."""
        settings = self.settings
        chosen = settings.chosen(self.config.seed, index, round_number).tolist()
        if away := [number for number in chosen if number not in self._weights]:
            self._return(index, away)
        members = [number for number in chosen if number in self._weights]
        refused = {str(number): "has not begun the task" for number in chosen if number not in members}
        order = Order(index, round_number, index * settings.rounds + round_number, members, 0.0)
        sent = {**self._to_clients, **({"variate": self._variate} if settings.control_variates else {})}
        gathering = Gathering(settings, sent, order)
        total = sum(self._weights[number] for number in members)
        words = {number: order._replace(share=self._weights[number] / total)._asdict() for number in members}
        up = 0
        for number, reply in self._grid.ask("train", words, sent, sent):
            if isinstance(reply, str):
                refused[str(number)] = reply
                if isinstance(reply, Lost):
                    self._weights.pop(number)
                continue
            up += _bytes(reply.arrays)
            reason = gathering.add(number, reply.arrays, self._weights[number])
            if reason is not None:
                refused[str(number)] = reason
            self._taken[number] += 1
        for name, reason in refused.items():
            print(f"round {round_number + 1}: client {name} is left out: {reason}", file=sys.stderr)
        before = self.params
        joined = [number for number in members if str(number) not in refused]
        lost = self._take(gathering, order, sum(self._weights[number] for number in joined))
        self._rows.note(
            "round",
            task=index,
            round=round_number,
            clients=list(map(str, chosen)),
            refused=refused,
            bytes_down=_bytes(sent) * len(members),
            bytes_up=up,
            update_norm=_distance(before, self.params),
            **({} if lost is None else {"lost": lost}),
        )

    def _take(self, gathering: Gathering, order: Order, weight: float) -> str | None:
        """The server's step; returns why there is none."""
        key = jax.random.fold_in(run_key(self.config.seed, "rounds"), order.number)
        try:
            found = gathering.result(self.params, key)
        except ValueError as error:
            print(f"round {order.round + 1} is lost: {error}", file=sys.stderr)
            return str(error)
        if found is None:
            return "no client is left"
        params, opt_state = self._step(self._opt_state, self.params, found["params"])
        self.params, self._opt_state = jax.tree.map(np.array, (params, opt_state))
        if self.settings.control_variates:
            share = weight / sum(self._weights.values())
            self._variate = jax.tree.map(np.array, common_variate(self._variate, found["variate"], share))
        return None

    def _agree(self, replies: Iterable[tuple[int, Reply]], index: int) -> None:
        """Gives every client what all of them know, if the method shares anything."""
        usable: dict[int, PyTree] = {}
        for number, reply in replies:
            reason = why_refused(reply.arrays, self._known)
            if reason is None:
                usable[number] = reply.arrays
            else:
                print(f"task {index}: what client {number} shares is left out: {reason}", file=sys.stderr)
        if not jax.tree.leaves(self._shared) or not usable:
            return
        weights = [self._weights[number] for number in usable]
        self._known = combine_shared(list(usable.values()), weights, self.parts.method.shared_by)
        self._known, self._agreed = jax.tree.map(np.array, self._known), True
        up, down = _bytes(list(usable.values())), _bytes(self._known) * len(self._begun)
        self._rows.note("shared", task=index, bytes_up=up, bytes_down=down)
        self._all("merge", index, self._known)

    def _note_task(self, index: int) -> None:
        settings = self.settings
        found = dict(self._ask("describe", index, {}))
        described = {
            "task": self.parts.training_pipeline(index).describe(),
            "clients": {str(number): reply.words["data"] for number, reply in found.items()},
        }
        watch = Watch(skipped=sum(reply.words["skipped"] for reply in found.values()))
        self.board.note_task(index, steps=settings.rounds * settings.steps, described=described, watch=watch)
        if settings.privacy is not None:
            self._note_clients(**self._spent(index + 1))

    def _spent(self, tasks: int) -> dict[str, Any]:
        """What the model reveals about each client, after a number of tasks."""
        privacy, settings = self.settings.privacy, self.settings
        assert privacy is not None
        by_client = {
            str(number): gaussian_epsilon(privacy.noise_multiplier, privacy.delta, rounds)
            for number, rounds in self._taken.items()
        }
        sampled = gaussian_epsilon(
            privacy.noise_multiplier,
            privacy.delta,
            tasks * settings.rounds,
            sampled=settings.members / settings.clients,
        )
        return {"epsilon": by_client, "epsilon_poisson": sampled, "delta": privacy.delta}

    # Clients

    @property
    def _begun(self) -> list[int]:
        """The clients that have begun the task."""
        return sorted(self._weights)

    @property
    def _to_clients(self) -> dict[str, PyTree]:
        return {"params": self.params}

    def _ask(
        self, what: str, index: int, arrays: PyTree, clients: Sequence[int] | None = None, **more: Any
    ) -> Iterator[tuple[int, Reply]]:
        """Asks clients about a task, by default all that have begun it; see `_replies`."""
        words = {"task": index, **more}
        return self._replies(what, dict.fromkeys(self._begun if clients is None else clients, words), arrays)

    def _replies(self, what: str, words: Mapping[int, Words], arrays: PyTree) -> Iterator[tuple[int, Reply]]:
        """The replies of those clients that answer; the others are named, and have to begin the task again."""
        for number, reply in self._grid.ask(what, words, arrays, self._shared):
            reason = reply if isinstance(reply, str) else why_unusable(what, reply.words)
            if reason is not None:
                print(f"{what}: client {number} is left out: {reason}", file=sys.stderr)
                self._weights.pop(number, None)
            elif isinstance(reply, Reply):
                yield number, reply

    def _all(self, what: str, index: int, arrays: PyTree, clients: Sequence[int] | None = None) -> None:
        """Asks clients, by default all that have begun the task, for something without an answer."""
        for _ in self._ask(what, index, arrays, clients):
            pass

    def _open(self, clients: Sequence[int], before: Params | None) -> None:
        """Opens clients at the checkpoints that the server knows of."""
        tokenizer, names, config = self.parts.tokenizer.fingerprint, self.parts.names, agreed(self.config)
        known = {"tokenizer": tokenizer, "tasks": names, "config": config}
        words = {number: {"checkpoint": self._numbers.get(number), **known} for number in clients}
        for number, reply in self._replies("open", words, {} if before is None else {"params": before}):
            if "key" in reply.words:
                self._keys[number] = reply.words["key"]
        if self._keys:  # over a network, clients agree on secrets
            keys = {"keys": {str(number): key for number, key in self._keys.items()}}
            for _ in self._grid.ask("secrets", dict.fromkeys(self._keys, keys), {}):
                pass

    def _return(self, index: int, clients: Sequence[int]) -> None:
        """Lets clients that were left out begin the task from their last checkpoint, if they are there again."""
        self._open(clients, None)
        self._begin(index, clients)

    # Checkpoints

    def _checkpoint(self, index: int, done: int, mark: str | None = None) -> None:
        """Saves clients and server after the round `done` of a task, 0: after the task."""
        # A client may remove the checkpoint that the server's last one belongs to.
        self.checkpoints.wait()
        if index >= 0:
            for number, reply in self._ask("save", index, {}, learned=done == 0):
                self._numbers[number] = reply.words["checkpoint"]
        more = {
            "rounds": done,
            "rows": self._rows.count,
            "agreed": self._agreed,
            "weights": list(self._weights.items()),
            "clients": list(self._numbers.items()),
            "taken": list(self._taken.items()),
        }
        phase = "training" if done else "learned"
        self._save(self._state(index, done), task=index, phase=phase, mark=mark, more=more)

    def _state(self, index: int, done: int) -> TrainState:
        """The model as an ordinary run saves it; in place of its optimizer's state is that of the server's."""
        trainer, settings = self.parts.trainer, self.settings
        part, low_bits = split(self.params, trainer.target.low_bits)
        # Arrays of its own: an array on the host may share its memory with one on a CPU device.
        state = trainer.init(jax.tree.map(np.array, overlay(self.base, part)))
        step = np.int32((index if done else index + 1) * settings.rounds * settings.steps + done * settings.steps)
        own = put((step, jax.tree.map(np.array, low_bits)), (self.parts.layout.replicated, trainer.shardings.low_bits))
        return state.replace(step=own[0], low_bits=own[1], opt_state=self._own())

    def _own(self) -> PyTree:
        own = {"server": self._opt_state, "variate": self._variate, "known": self._known}
        return put(jax.tree.map(np.array, own), self.parts.layout.replicated)

    def _restore_all(self) -> None:
        """Takes over the last checkpoint."""
        assert self.saved is not None
        note = read_note(self.saved, ServerNote)
        state = self._restored(self.saved)
        self.base = jax.tree.map(np.array, state.params)
        self.params = self._wide(state)
        own = jax.tree.map(np.array, state.opt_state)
        self._opt_state, self._variate, self._known = own["server"], own["variate"], own["known"]
        self._agreed = note.agreed
        self._weights, self._numbers, self._taken = dict(note.weights), dict(note.clients), dict(note.taken)
        if note.phase == "training":
            self._before = self._wide(self._restored(self._saved_before(note.task)))

    def _restored(self, saved: Saved) -> TrainState:
        own = self._own()
        places = jax.tree.map(lambda _: self.parts.layout.replicated, own)
        target = self.parts.trainer.target.replace(opt_state=abstract(own, places))
        return self.checkpoints.restore(target, saved)[0]

    def _wide(self, state: TrainState) -> Params:
        return self._travelling(widen(trained(state.params), state.low_bits))


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _distance(one: Params, other: Params) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return math.sqrt(sum(float(np.sum(np.square(a.astype(np.float64) - b))) for a, b in pairs))


__all__ = ["Server"]
