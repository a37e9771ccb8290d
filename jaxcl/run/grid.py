"""How a server of federated training reaches its clients: in this process, or over a network (`jaxcl.flower`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxtyping import PyTree

from jaxcl.models.trainable import Params
from jaxcl.run.client import Client
from jaxcl.run.exchange import LeftOut
from jaxcl.training.watch import NotFinite

Open = Callable[[int | None, Params | None], Client]
"""`open(checkpoint, before)`: a client at one of its checkpoints, `None`: at the start; see `Client`."""


class Reply(NamedTuple):
    """What a client answers.

    Attributes:
      arrays: a tree of arrays on the host.
      words: JSON values by name.
    """

    arrays: PyTree
    words: Mapping[str, Any]


class Lost(str):
    """Why a client does not answer that has to be opened again."""

    __slots__ = ()


class Grid(Protocol):
    """The clients of a run, by number."""

    def ask(
        self,
        what: str,
        clients: Sequence[int],
        arrays: PyTree,
        words: Mapping[int, Mapping[str, Any]],
        like: PyTree = None,
    ) -> Iterator[tuple[int, Reply | str]]:
        """Asks clients, and yields their answers in the order of `clients`.

        Args:
          what: see `Client.answer`; or `open`: opens the client at the checkpoint `checkpoint`, `None`: at the start.
          clients: their numbers.
          arrays: what is sent to all of them: a tree of arrays on the host.
          words: what is sent to each.
          like: a tree like that of a reply's arrays; `None`: there are none.

        Returns:
          Each client's number and its reply; in its place words, if there is none: why.
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

    def ask(
        self,
        what: str,
        clients: Sequence[int],
        arrays: PyTree,
        words: Mapping[int, Mapping[str, Any]],
        like: PyTree = None,
    ) -> Iterator[tuple[int, Reply | str]]:
        """See `Grid.ask`."""
        for number in clients:
            said = words[number]
            if what == "open":
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


__all__ = ["Grid", "InProcess", "Lost", "Open", "Reply"]
