"""`jaxcl join`: one client of a federated run over a network."""

from __future__ import annotations

import contextlib
import secrets as random
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Client as Connect
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.config import ExperimentConfig
from jaxcl.errors import UserError
from jaxcl.flower.link import check_installed, end, environment, tool
from jaxcl.flower.pairing import KeyPair
from jaxcl.models.trainable import Params
from jaxcl.run.agreement import agreed, difference
from jaxcl.run.client import Client, travelling
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.exchange import LeftOut
from jaxcl.run.federation import check_federated, opener, owned_root, whole_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.run.grid import Open
from jaxcl.run.wire import pack, paths, tree_like, unpack
from jaxcl.training.federated import FederatedConfig
from jaxcl.training.watch import NotFinite

_LAST = 15.0  # seconds that the SuperNode has to send the last answer


class Seat:
    """A client that answers messages; it is opened by the first one that asks for it."""

    def __init__(self, number: int, parts: Components, settings: FederatedConfig, open_client: Open) -> None:
        """Nothing is opened yet.

        Args:
          number: the client's number.
          parts: the parts of the run, for the shapes of what is sent.
          settings: the section `federated`.
          open_client: opens the client.
        """
        self._number = number
        self._parts = parts
        self._settings = settings
        self._open_client = open_client
        self._client: Client | None = None
        self._keys = KeyPair() if settings.secure else None
        self.finished = False
        self._last: tuple[Any, bytes] | None = None
        only_b = settings.only_adapters(parts.config.model.lora is not None)
        self._params = travelling(parts.trainer.target.params, only_b=only_b)
        state = jax.eval_shape(parts.trainer.init_method, parts.layout.shapes)
        self._shared = jax.eval_shape(parts.method.share, state)

    def answer(self, content: bytes) -> bytes:
        """Answers a message; what goes wrong with it is the answer.

        A message that is delivered again, because Flower took the process that brought it for dead, gets the same
        answer: a round is not trained twice.
        """
        try:
            arrays, said = unpack(content)
        except UserError as error:
            return pack({}, {"error": str(error)})
        if self._last is None or self._last[0] != said.get("message"):
            self._last = said.get("message"), self._answer_to(arrays, said)
        return self._last[1]

    def _answer_to(self, arrays: dict[str, np.ndarray], said: dict[str, Any]) -> bytes:
        try:
            found, words = self._answer(str(said["what"]), arrays, said["words"])
            return pack(found, words)
        except (NotFinite, LeftOut) as error:
            return pack({}, {"error": str(error)})
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(f"client {self._number}: {reason}", file=sys.stderr)
            return pack({}, {"error": reason})

    def close(self) -> None:
        """Closes the client, if it is open."""
        if self._client is not None:
            self._client.close(finished=self.finished)
            self._client = None

    def _answer(self, what: str, arrays: dict[str, np.ndarray], words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if what == "hello":
            return {}, {"client": self._number}
        if what == "open":
            return {}, self._open(words, self._tree(what, arrays) if arrays else {})
        if self._client is None:
            return {}, {"lost": "was started again"}
        if what == "secrets" and self._keys is not None:
            self._client.secrets = {
                int(other): self._keys.secret(bytes.fromhex(key))
                for other, key in words["keys"].items()
                if int(other) != self._number
            }
            return {}, {}
        if what == "close":
            self.finished = bool(words["finished"])
            return {}, {}
        return self._client.answer(what, self._tree(what, arrays), words)

    def _open(self, words: dict[str, Any], arrays: Any) -> dict[str, Any]:
        if words["tokenizer"] != self._parts.tokenizer.fingerprint:
            raise UserError("its tokenizer is not the server's; name the same one in tokenizer.path")
        if words["tasks"] != self._parts.names:
            raise UserError(
                f"its tasks are {', '.join(self._parts.names)}, and the server's {', '.join(words['tasks'])}"
            )
        if reason := difference(agreed(self._parts.config), words["config"]):
            raise UserError(reason)
        self.close()
        self._client = self._open_client(words["checkpoint"], arrays.get("params"))
        return {} if self._keys is None else {"key": self._keys.public.hex()}

    def _tree(self, what: str, arrays: dict[str, np.ndarray]) -> Any:
        params: Params = {"params": self._params}
        if what == "train" and self._settings.control_variates:
            params["variate"] = self._params
        like = self._shared if what == "merge" else {} if what in ("save", "describe") else params
        found = tree_like(arrays, like)
        shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (found, like)]
        if paths(found) != paths(like) or shapes[0] != shapes[1]:
            raise UserError("its model is not the server's; give both the same section model")
        return found


def open_seat(config: ExperimentConfig, number: int, stack: contextlib.ExitStack) -> Seat:
    """A client's seat, with its folder locked.

    Args:
      config: the client's configuration.
      number: its number.
      stack: closes what is opened.

    Raises:
      UserError: the configuration cannot be federated, or there is no such client.
    """
    settings = check_federated(config)
    if not 0 <= number < settings.clients:
        raise UserError(f"--client {number}: expected 0 to {settings.clients - 1}", exit_code=2)
    if settings.owners is not None:
        # As the client's own folder, so that it sees no other one's data.
        root, here = owned_root(config, settings.owners[number]), (".",) * settings.clients
        settings = settings.model_copy(update={"owners": here})
        config = config.model_copy(update={"data_root": root, "federated": settings})
    folder = RunFolder(Path(config.output))
    folder.claim(config.plain())
    stack.callback(folder.release)
    parts = build(whole_tasks(config, settings), folder)
    base: Params = jax.tree.map(np.array, initial_params(parts))
    seat = Seat(number, parts, settings, opener(parts, settings, number, base, {}, stack))
    stack.callback(seat.close)
    return seat


def join(
    config: ExperimentConfig, number: int, server: str, *, certificate: Path | None, insecure: bool, port: int
) -> None:
    """Runs a client until the server says that the run is over.

    Args:
      config: the client's configuration: the server's, with its own `output` and `data_root`.
      number: the client's number, from 0.
      server: `HOST:PORT` of the server.
      certificate: the server's certificate, or that of who has signed it; `None`: one that the system knows.
      insecure: without TLS, for tests on one machine.
      port: port on this machine, for Flower's own processes.

    Raises:
      UserError: the configuration cannot be federated, or Flower is not installed.
    """
    if insecure and certificate is not None:
        raise UserError("join: --insecure is without TLS; allowed without --certificate", exit_code=2)
    check_installed()
    with contextlib.ExitStack() as stack:
        seat = open_seat(config, number, stack)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcl-")))
        key = random.token_bytes(32)
        (place / "key").touch(mode=0o600)
        (place / "key").write_text(key.hex())
        address = str(place / "socket")
        listener = stack.enter_context(Listener(address, authkey=key))
        trust = ["--insecure"] if insecure else ["--root-certificates", str(certificate)] if certificate else []
        node = f'socket="{address}" key="{place / "key"}"'
        command = [tool("flower-supernode"), "--superlink", server, *trust, "--node-config", node, "--port", str(port)]
        process = subprocess.Popen(command, env=environment(place), start_new_session=True)
        stack.callback(end, process)
        _watch(process, address, key)
        print(f"client {number}: joined {server}", file=sys.stderr)
        _serve(listener, seat, process)


def _serve(listener: Listener, seat: Seat, process: subprocess.Popen[bytes]) -> None:
    """Answers messages until the run is over."""
    while not seat.finished:
        try:
            with listener.accept() as connection:
                connection.send_bytes(seat.answer(connection.recv_bytes()))
        except (EOFError, OSError):
            if process.poll() is not None:
                raise UserError("flower-supernode has ended; its messages are above") from None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST)


def _watch(process: subprocess.Popen[bytes], address: str, key: bytes) -> None:
    """Wakes the loop when the SuperNode has ended, whose messages it waits for."""

    def wait() -> None:
        process.wait()
        with contextlib.suppress(OSError, EOFError), Connect(address, authkey=key):
            pass

    threading.Thread(target=wait, daemon=True).start()


__all__ = ["Seat", "join"]
