"""How a server of federated training reaches its clients: in this process, or over a network (`jaxcl.flower`)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from jaxtyping import PyTree

from jaxcl.models.trainable import Params
from jaxcl.run.client import Client
from jaxcl.run.exchange import LeftOut
from jaxcl.training.watch import NotFinite

Open = Callable[[int | None, Params | None], Client]
"""`open(checkpoint, before)`: a client at one of its checkpoints, `None`: at the start; see `Client`."""

Words: TypeAlias = Mapping[str, Any]
"""JSON values by name."""


# What the answers of clients must say, and its type.
_SAID: dict[str, dict[str, type[Any]]] = {
    "begin": {"weight": numbers.Real},
    "describe": {"data": dict, "skipped": int},
    "save": {"checkpoint": int},
    "score": {"matrix": list},
}


class Reply(NamedTuple):
    """What a client answers.

    Attributes:
      arrays: a tree of arrays on the host.
      words: what is not an array.
    """

    arrays: PyTree
    words: Words


class Lost(str):
    """Why a client does not answer that has to be opened again."""

    __slots__ = ()


Answers: TypeAlias = Iterator[tuple[int, Reply | str]]
"""Each client's number and its reply, or why there is none."""


class Grid(Protocol):
    """The clients of a run, by number."""

    def ask(self, what: str, words: Mapping[int, Words], arrays: PyTree, like: PyTree = None) -> Answers:
        """Asks clients, and yields their answers in the order of `words`.

        Args:
          what: see `Client.answer`; or `open`: opens the client at the checkpoint `checkpoint`, `None`: at the start.
          words: what is sent to each client that is asked, by its number.
          arrays: what is sent to all of them: a tree of arrays on the host.
          like: a tree like that of a reply's arrays; `None`: there are none.
        """
        ...


class InProcess:
    """Clients in this process, one after another on the devices."""

    def __init__(self, opens: Sequence[Open]) -> None:
        """Clients are opened when they are asked to.

        Args:
          opens: how to open each client.
        """
        self._opens = opens
        self._clients: dict[int, Client] = {}

    def ask(self, what: str, words: Mapping[int, Words], arrays: PyTree, like: PyTree = None) -> Answers:
        """See `Grid.ask`."""
        for number, said in words.items():
            if what == "open":
                if number in self._clients:
                    self._clients.pop(number).close(finished=False)
                self._clients[number] = self._opens[number](said["checkpoint"], arrays.get("params"))
                yield number, Reply({}, {})
                continue
            try:
                yield number, Reply(*self._clients[number].answer(what, arrays, said))
            except (NotFinite, LeftOut) as error:
                yield number, str(error)

    def close(self, *, finished: bool) -> None:
        """Closes the clients; see `Client.close`."""
        for client in self._clients.values():
            client.close(finished=finished)


def why_unusable(what: str, words: Words) -> str | None:
    """Why a run could not continue with what a client says; `None`: it can.

    Args:
      what: what it was asked for.
      words: of its reply.

    >>> why_unusable("begin", {"weight": 3.0}), why_unusable("begin", {"weight": -1.0}), why_unusable("save", {})
    (None, 'its weight is -1.0', 'its checkpoint is None')
    """
    for name, kind in _SAID.get(what, {}).items():
        value = words.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"its {name} is {value!r}"
        if name == "weight" and not 0 < value < math.inf:  # it would spoil every mean
            return f"its weight is {value}"
    return None


__all__ = ["Answers", "Grid", "InProcess", "Lost", "Open", "Reply", "Words", "why_unusable"]
