"""A client of federated training: its rows, its memory and its training state, between rounds on the host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxcl.functional.client_drift import Proximal, Scaffold, finish_scaffold, start_proximal, start_scaffold
from jaxcl.models.trainable import Params, overlay, trained, without_a
from jaxcl.run.components import Components
from jaxcl.run.exchange import Order, Trained, leaving
from jaxcl.run.folder import RunFolder
from jaxcl.run.note import ClientNote, read_note
from jaxcl.run.rewinding import noted_watch, watch_of
from jaxcl.run.sequence import TaskSequence
from jaxcl.run.streams import task_stream, total_steps
from jaxcl.run.trunk import starts_anew
from jaxcl.sharding.layout import put
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.federated import FederatedConfig
from jaxcl.training.kept import mark_after
from jaxcl.training.loop import train_task
from jaxcl.training.low_bits import split, widen
from jaxcl.training.state import TrainState
from jaxcl.training.watch import NotFinite, Watch

# Orbax refuses an empty tree: a client's checkpoint has no params.
_NO_PARAMS = {"none": np.zeros(1, np.float32)}


class Client(TaskSequence):
    """One client: a run of its own whose training is cut into rounds, each of which begins with the server's params.

    Of its training state, the optimizer's and the method's stay on the host between rounds, and are what its
    checkpoints hold; what is trained comes from the server every time. The clock of the schedule is the server's: round
    `r` begins at step `r * steps`.

    Attributes:
      name: its name.
      number: its number.
      watch: what was watched in the training of the task.
      secrets: the secret of each pair that it is part of, by the number of the other client.
    """

    def __init__(
        self,
        number: int,
        parts: Components,
        folder: RunFolder,
        checkpoints: Checkpoints,
        base: Params,
        settings: FederatedConfig,
        *,
        before: Params | None = None,
    ) -> None:
        """Opens the client at its last checkpoint.

        Args:
          number: its number.
          parts: the parts of its run; its configuration has the steps of a whole task in `training.steps`.
          folder: its folder.
          checkpoints: the series in its folder.
          base: the params that the run begins with, on the host. What is not trained is taken from here.
          settings: the section `federated`.
          before: the server's params from before the task that the checkpoint is in; `None`: it is in none.
        """
        super().__init__(parts, folder, checkpoints)
        self.name, self.number = str(number), number
        self.secrets: Mapping[int, bytes] = {}
        self._settings = settings
        self._only_b = settings.only_adapters(parts.config.model.lora is not None)
        self._base = base
        self._before: Params = travelling(base, only_b=self._only_b) if before is None else before
        self._position: Any = None
        self.watch = Watch()
        self._logged = 0
        target = parts.trainer.target
        self._low_bits = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), target.low_bits)
        if self.saved is None:
            self._asleep: TrainState = _on_host(parts.trainer.init(jax.tree.map(np.array, base)))
        else:
            self._wake_from(self.saved)
        self._open_sinks(self._logged)
        self._note_attempt(self._logged)

    def _wake_from(self, saved: Saved) -> None:
        parts = self.parts
        whole = parts.layout.replicated
        nothing = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), _NO_PARAMS)
        state, self._position = self.checkpoints.restore(
            parts.trainer.target.replace(params=nothing, low_bits={}), saved
        )
        self._asleep = _on_host(state)
        note = read_note(saved, ClientNote)
        self._logged = note.logged
        if note.phase == "training":
            self.watch = watch_of(self.config.training, total_steps(parts, note.task), noted_watch(note))

    def answer(self, what: str, arrays: PyTree, words: Mapping[str, Any]) -> tuple[PyTree, dict[str, Any]]:
        """Does what the server asks for, by name; returns arrays and JSON values.

        Args:
          what: `begin`, `train`, `conclude`, `merge`, `store`, `save`, `score`, `describe` or `close`.
          arrays: the server's: `params`, with control variates `variate`; what is known, for `merge`.
          words: `task`; for `train` the fields of `Order`; for `save` `learned`; for `close` `finished`.

        Raises:
          NotFinite: see `train`.
          LeftOut: see `leaving`.
        """
        if what == "begin":
            shared = self.begin(words["task"], arrays["params"])
            return shared, {"weight": float(len(self.parts.train_rows(words["task"])))}
        if what == "train":
            order, before = Order(**words), arrays["params"]
            found = self.train(order.task, order.round, self._settings.steps, before, arrays.get("variate"))
            sent = leaving(self._settings, before, found, order, client=self.number, secrets=self.secrets)
            return sent, {}
        if what == "conclude":
            return self.conclude(words["task"], arrays["params"]), {}
        if what == "merge":
            self.merge(arrays)
        elif what == "store":
            self.store(words["task"], arrays["params"])
        elif what == "save":
            return {}, {"checkpoint": self.save(words["task"], learned=words["learned"])}
        elif what == "score":
            self._evaluate(self._awake(arrays["params"]), words["task"])
            return {}, {"matrix": self.board.results.matrix}
        elif what == "describe":
            described = self.parts.training_pipeline(words["task"]).describe()
            return {}, {"data": described, "skipped": self.watch.skipped}
        elif what == "close":
            self.close(finished=words["finished"])
        else:
            raise ValueError(f"what: nothing is known of {what!r}")
        return {}, {}

    def begin(self, index: int, params: Params) -> PyTree:
        """Prepares a task.

        Args:
          index: which task.
          params: the server's trained params, float32.

        Returns:
          What the method shares.
        """
        self._before, self._position = params, None
        trainer = self.parts.trainer
        state = self._prepare(self._awake(params), index)
        total = total_steps(self.parts, index)
        self.watch = watch_of(self.config.training, total, None)
        state = trainer.start_task(state, total, first=starts_anew(self.parts, index))
        self._asleep = _on_host(state)
        return self._shared(state)

    def train(
        self, index: int, round_number: int, steps: int, params: Params, variate: PyTree | None = None
    ) -> Trained:
        """A round.

        Args:
          index: which task.
          round_number: the round in the task, from 0.
          steps: optimizer steps.
          params: the server's trained params, float32.
          variate: the server's control variate, if there are any.

        Raises:
          NotFinite: see `train_task`; the client is as it was before the round.
        """
        parts, training = self.parts, self.config.training
        state, total = self._awake(params), total_steps(self.parts, index)
        done = round_number * steps
        self._logged = index * total + done + steps
        state = state.replace(opt_state=self._started(state.opt_state, state, variate))
        # A client that was not in every round goes by the server's clock.
        state = state.replace(
            step=put(jnp.int32(index * total + done), parts.layout.replicated),
            clock=state.clock._replace(step=put(jnp.int32(done), parts.layout.replicated)),
        )
        stored = bool(self.board.results.stored_bytes)
        stream = task_stream(self.parts, self.folder, self.kept, index, stored=stored)
        rows = stream.train(self.config.seed + index, jax.process_index(), jax.process_count())
        try:
            feed = parts.trainer.feed(rows, prefetch=training.prefetch)
            if self._position is not None:
                feed.set_state(self._position)
            state = train_task(
                parts.trainer,
                state,
                feed,
                total=done + steps,
                task=index,
                name=f"{parts.phase_name(index)}, client {self.name}, round {round_number + 1}",
                log_every=training.log_every,
                sinks=self.sinks,
                progress=self.main,
                watch=self.watch,
            )
            self._position = feed.get_state()
        except NotFinite:
            self.watch.streak = 0  # the next round begins with other params
            raise
        finally:
            rows.close()
        change, opt_state = self._finished(state.opt_state)
        self._asleep = _on_host(state.replace(opt_state=opt_state))
        after = travelling(widen(trained(state.params), state.low_bits), only_b=self._only_b)
        return Trained(_copied(after), float(len(parts.train_rows(index))), change)

    def _started(self, opt_state: PyTree, state: TrainState, variate: PyTree | None) -> PyTree:
        """The state of the optimizer at the start of a round."""
        if self._settings.drift is None:
            return opt_state

        def started(node: Any) -> Any:
            if isinstance(node, Proximal):
                return start_proximal(widen(trained(state.params), state.low_bits))
            if isinstance(node, Scaffold) and variate is not None:
                return start_scaffold(node, overlay(node.common, variate))
            return node

        changed = jax.tree.map(started, opt_state, is_leaf=_drifts)
        return put(_copied(changed), self.parts.trainer.shardings.opt_state)

    def _finished(self, opt_state: PyTree) -> tuple[PyTree | None, PyTree]:
        """The change of the client's control variate, if it has one, and the state of the optimizer after a round."""
        found: list[PyTree] = []

        def finished(node: Any) -> Any:
            if not isinstance(node, Scaffold):
                return node
            node, change = finish_scaffold(node)
            found.append(_copied(travelling(change, only_b=self._only_b)))
            return node

        if self._settings.control_variates:
            opt_state = jax.tree.map(finished, opt_state, is_leaf=_drifts)
        return (found[0] if found else None), opt_state

    def save(self, index: int, *, learned: bool) -> int:
        """Saves what the client is between rounds; returns the number of the checkpoint, once it is on disk.

        Args:
          index: which task.
          learned: whether it is learned, or trained on.
        """
        number = self._save(
            self._asleep.replace(params=_NO_PARAMS),
            task=index,
            phase="learned" if learned else "training",
            data=None if learned else self._position,
            mark=mark_after(index) if learned else None,
            watch=self.watch,
            more={"logged": self._logged},
        )
        self.checkpoints.wait()
        return number

    def conclude(self, index: int, params: Params) -> PyTree:
        """Remembers and consolidates a task that ended with the server's `params`; returns what the method shares.

        Args:
          index: which task.
          params: the server's trained params, float32.
        """
        state = self._consolidate(self.parts.trainer.finish_task(self._awake(params)), index)
        self._asleep = _on_host(state)
        return self._shared(state)

    def merge(self, shared: PyTree) -> None:
        """Takes over what all clients know; see `Method.merge`."""
        state = put(jax.tree.map(np.array, self._asleep.method_state), self.parts.trainer.shardings.method_state)
        merged = self.parts.trainer.compile(self.parts.method.merge)(state, shared)
        self._asleep = self._asleep.replace(method_state=_copied(merged))

    def store(self, index: int, params: Params) -> None:
        """Stores the method's signals for what is remembered of a task; see `Method.signals`.

        Args:
          index: which task.
          params: the server's trained params, float32.
        """
        self._store(self._awake(params), index)

    def close(self, *, finished: bool) -> None:
        """Closes the sinks.

        Args:
          finished: whether the run came to its end.
        """
        for sink in self.sinks:
            sink.close(finished=finished)

    def _shared(self, state: TrainState) -> PyTree:
        return _copied(self.parts.trainer.compile(self.parts.method.share)(state.method_state))

    def _awake(self, params: Params) -> TrainState:
        """The state on the devices, in arrays of its own, since a step deletes them."""
        part, low_bits = split(params, self._low_bits)
        state = self._asleep.replace(params=overlay(self._base, part), low_bits=low_bits)
        return put(jax.tree.map(np.array, state), self.parts.trainer.shardings)

    def _params_before(self, index: int) -> Params:
        return self._awake(self._before).params


def _copied(tree: PyTree) -> PyTree:
    """On the host, in arrays that share nothing with the devices'."""
    return jax.tree.map(np.array, tree)


def _on_host(state: TrainState) -> TrainState:
    """All but what comes from the server."""
    return _copied(state.replace(params={}, low_bits={}))


def _drifts(node: Any) -> bool:
    return isinstance(node, Proximal | Scaffold)


def travelling(tree: Params, *, only_b: bool) -> Params:
    """The part of a network's params that is trained and travels.

    Args:
      tree: all params, or what is trained.
      only_b: whether the first factor of each adapter stays as it is; see `FederatedConfig.share`.
    """
    return without_a(tree) if only_b else trained(tree)


def client_folder(output: str, name: str) -> Path:
    """The folder of a client in that of the run.

    Args:
      output: the run folder.
      name: the client's name.
    """
    return Path(output) / "clients" / name
