"""A client of federated training: its rows, its memory and its training state, between rounds on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxcl.models.trainable import Params, overlay, trained
from jaxcl.run.components import Components
from jaxcl.run.folder import RunFolder
from jaxcl.run.rewinding import watch_of
from jaxcl.run.sequence import TaskSequence
from jaxcl.run.streams import task_stream, total_steps
from jaxcl.run.trunk import starts_anew
from jaxcl.sharding.layout import put
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.loop import train_task
from jaxcl.training.low_bits import split, widen
from jaxcl.training.state import TrainState
from jaxcl.training.watch import NotFinite, Watch


class Trained(NamedTuple):
    """What a client sends after a round.

    Attributes:
      params: the trained params, float32, on the host.
      weight: its number of examples of the task.
    """

    params: Params
    weight: float


class Client(TaskSequence):
    """One client: a run of its own whose training is cut into rounds, each of which begins with the server's params.

    Of its training state, the optimizer's and the method's stay on the host between rounds; what is trained comes from
    the server every time. The clock of the schedule is the server's: round `r` begins at step `r * steps`.

    Attributes:
      name: its name.
      watch: what was watched in the training of the task.
    """

    def __init__(self, name: str, parts: Components, folder: RunFolder, checkpoints: Checkpoints, base: Params) -> None:
        """Prepares the client.

        Args:
          name: its name.
          parts: the parts of its run; its configuration has the steps of a whole task in `training.steps`.
          folder: its folder.
          checkpoints: an empty series in its folder.
          base: the params that the run begins with, on the host. What is not trained is taken from here.
        """
        super().__init__(parts, folder, checkpoints)
        self.name = name
        self._base = base
        self._before: Params = trained(base)
        self._position: Any = None
        self.watch = Watch()
        state = parts.trainer.init(jax.tree.map(np.array, base))
        self._asleep: TrainState = _on_host(state)
        self._low_bits = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.low_bits)
        self._open_sinks(state)

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

    def train(self, index: int, round_number: int, steps: int, params: Params) -> Trained:
        """A round.

        Args:
          index: which task.
          round_number: the round in the task, from 0.
          steps: optimizer steps.
          params: the server's trained params, float32.

        Raises:
          NotFinite: see `train_task`; the client is as it was before the round.
        """
        parts, training = self.parts, self.config.training
        state, total = self._awake(params), total_steps(self.parts, index)
        done = round_number * steps
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
        self._asleep = _on_host(state)
        return Trained(_copied(widen(trained(state.params), state.low_bits)), float(len(parts.train_rows(index))))

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

    def _forget_unneeded(self) -> None:
        """Nothing: a client of a run that is not resumed needs no earlier versions of its memory."""


def _copied(tree: PyTree) -> PyTree:
    """On the host, in arrays that share nothing with the devices'."""
    return jax.tree.map(np.array, tree)


def _on_host(state: TrainState) -> TrainState:
    """All but what comes from the server."""
    return _copied(state.replace(params={}, low_bits={}))


def client_folder(output: str, name: str) -> Path:
    """The folder of a client in that of the run.

    Args:
      output: the run folder.
      name: the client's name.
    """
    return Path(output) / "clients" / name
