"""The clients of a run over a network, as the server's side of Flower sees them."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxcl.errors import UserError
from jaxcl.flower.link import MESSAGE
from jaxcl.run.grid import Answers, Lost, Reply, Words
from jaxcl.run.wire import pack, tree_like, unpack

_POLL = 1.0  # seconds
_HELLO = 60.0  # seconds that a new node has to say which client it is


class FlowerGrid:
    """Clients behind a SuperLink. All are asked at once; answers are used in the order of their numbers."""

    def __init__(self, grid: Any, clients: int, *, timeout: float, patience: float) -> None:
        """Waits for nobody yet.

        Args:
          grid: Flower's `Grid`.
          clients: how many clients there are.
          timeout: seconds that a client has for an answer.
          patience: seconds that the server waits at the start for all to come.
        """
        self._grid = grid
        self._clients = clients
        self._timeout = timeout
        self._nodes: dict[int, int] = {}
        self._known: set[int] = set()
        self._run, self._count = secrets.token_hex(8), 0
        self._wait(patience)

    def ask(self, what: str, words: Mapping[int, Words], arrays: PyTree, like: PyTree = None) -> Answers:
        """See `jaxcl.run.grid.Grid.ask`."""
        self._look()
        there = {number: self._nodes[number] for number in words if number in self._nodes}
        contents = {node: self._packed(what, arrays, words[number]) for number, node in there.items()}
        answers = self._send(contents, what, self._timeout)
        for number in words:
            if number not in there:
                yield number, Lost("is not connected")
                continue
            yield number, self._reply(answers.get(there[number]), like)

    def _packed(self, what: str, arrays: PyTree, words: Words) -> bytes:
        """A message, with a number of its own: Flower may deliver one twice."""
        self._count += 1
        return pack(arrays, {"what": what, "words": dict(words), "message": f"{self._run}-{self._count}"})

    def _reply(self, answer: bytes | str | None, like: PyTree) -> Reply | str:
        if answer is None:
            return Lost(f"gave no answer in {self._timeout:g} s")
        if isinstance(answer, str):
            return Lost(answer)
        try:
            found, words = unpack(answer)
        except UserError as error:
            return str(error)
        if "lost" in words:
            return Lost(str(words["lost"]))
        if "error" in words:
            return str(words["error"])
        return Reply(tree_like(found, {} if like is None else like), words)

    def _wait(self, patience: float) -> None:
        """Waits until all clients are there."""
        end = time.monotonic() + patience
        while len(self._nodes) < self._clients:
            self._look()
            if time.monotonic() > end:
                missing = sorted(set(range(self._clients)) - set(self._nodes))
                if not self._nodes:
                    raise UserError(f"federated: no client has joined in {patience:g} s")
                names = ", ".join(map(str, missing))
                print(f"clients {names} have not joined; the run begins without them", file=sys.stderr)
                return
            time.sleep(_POLL)

    def _look(self) -> None:
        """Asks nodes that are new which client they are."""
        present = set(self._grid.get_node_ids())
        self._known &= present
        self._nodes = {number: node for number, node in self._nodes.items() if node in present}
        hello = dict.fromkeys(present - self._known, self._packed("hello", {}, {}))
        for node, answer in self._send(hello, "hello", min(self._timeout, _HELLO)).items():
            if isinstance(answer, str):
                continue
            self._known.add(node)
            reply = self._reply(answer, None)
            number = reply.words.get("client") if isinstance(reply, Reply) else None
            if isinstance(number, int) and 0 <= number < self._clients:
                self._nodes[number] = node  # a client that was started again is another node

    def _send(self, contents: Mapping[int, bytes], what: str, timeout: float) -> dict[int, bytes | str]:
        """The bytes that nodes answer with, or why there are none."""
        from flwr.app import Array, ArrayRecord, Message, RecordDict

        if not contents:
            return {}
        messages = []
        for node, content in contents.items():
            record = ArrayRecord({MESSAGE: Array(np.frombuffer(content, np.uint8))})
            messages.append(Message(RecordDict({MESSAGE: record}), message_type=kind_of(what), dst_node_id=node))
        found: dict[int, bytes | str] = {}
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                found[node] = f"failed: {reply.error.reason}"
            else:
                found[node] = reply.content[MESSAGE][MESSAGE].numpy().tobytes()
        return found


def kind_of(what: str) -> str:
    """Flower's type of a message: its category, and what is asked."""
    return "train.train" if what == "train" else f"query.{what}"


__all__ = ["FlowerGrid", "kind_of"]
