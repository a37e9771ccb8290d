"""`jaxcl join`: one client of a federated run over a network."""

from __future__ import annotations

import contextlib
import os
import secrets as random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.config import ExperimentConfig
from jaxcl.errors import UserError
from jaxcl.flower.link import check_installed, environment, tool
from jaxcl.flower.secrets import KeyPair
from jaxcl.models.trainable import Params
from jaxcl.run.client import Client, client_folder, travelling
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.exchange import LeftOut
from jaxcl.run.federation import check_federated, opener, whole_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.run.grid import Open
from jaxcl.run.wire import pack, tree_like, unpack
from jaxcl.training.federated import FederatedConfig
from jaxcl.training.watch import NotFinite


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
        only_b = settings.only_adapters(parts.config.model.lora is not None)
        self._params = travelling(parts.trainer.target.params, only_b=only_b)
        state = jax.eval_shape(parts.trainer.init_method, parts.layout.shapes)
        self._shared = jax.eval_shape(parts.method.share, state)

    def answer(self, content: bytes) -> bytes:
        """Answers a message; what goes wrong with it is the answer."""
        try:
            arrays, said = unpack(content)
            found, words = self._answer(str(said["what"]), arrays, said["words"])
            return pack(found, words)
        except (NotFinite, LeftOut) as error:
            return pack({}, {"error": str(error)})
        except (UserError, KeyError, TypeError, ValueError) as error:
            words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(f"client {self._number}: {words}", file=sys.stderr)
            return pack({}, {"error": words})

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
        self.close()
        self._client = self._open_client(words["checkpoint"], arrays.get("params"))
        return {} if self._keys is None else {"key": self._keys.public.hex()}

    def _tree(self, what: str, arrays: dict[str, np.ndarray]) -> Any:
        params: Params = {"params": self._params}
        if what == "train" and self._settings.control_variates:
            params["variate"] = self._params
        like = self._shared if what == "merge" else {} if what in ("save", "describe") else params
        found = tree_like(arrays, like)
        shapes = [
            (np.shape(one), other.shape) for one, other in zip(*map(jax.tree.leaves, (found, like)), strict=False)
        ]
        if jax.tree.structure(found) != jax.tree.structure(like) or any(one != other for one, other in shapes):
            raise UserError("its model is not the server's; give both the same section model")
        return found


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
    check_installed()
    settings = check_federated(config)
    if not 0 <= number < settings.clients:
        raise UserError(f"--client {number}: expected 0 to {settings.clients - 1}", exit_code=2)
    folder = RunFolder(client_folder(config.output, str(number)) / "run")
    with contextlib.ExitStack() as stack:
        folder.claim(config.plain())
        stack.callback(folder.release)
        parts = build(whole_tasks(config, settings), folder)
        base: list[Params] = []

        def initial() -> Params:
            if not base:
                base.append(jax.tree.map(np.array, initial_params(parts)))
            return base[0]

        seat = Seat(number, parts, settings, opener(parts, settings, number, initial, {}, stack))
        stack.callback(seat.close)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcl-")))
        key = random.token_bytes(32)
        (place / "key").touch(mode=0o600)
        (place / "key").write_text(key.hex())
        listener = stack.enter_context(Listener(str(place / "socket"), authkey=key))
        trust = ["--insecure"] if insecure else ["--root-certificates", str(certificate)] if certificate else []
        node = f'socket="{place / "socket"}" key="{place / "key"}"'
        command = [tool("flower-supernode"), "--superlink", server, *trust, "--node-config", node, "--port", str(port)]
        process = subprocess.Popen(command, env=environment(place), start_new_session=True)
        stack.callback(_end, process)
        _watch(process, listener)
        print(f"client {number}: joined {server}", file=sys.stderr)
        _serve(listener, seat.answer, lambda: seat.finished, process)


def _serve(
    listener: Listener, answer: Callable[[bytes], bytes], finished: Callable[[], bool], process: subprocess.Popen[bytes]
) -> None:
    while not finished():
        try:
            with listener.accept() as connection:
                connection.send_bytes(answer(connection.recv_bytes()))
        except (EOFError, ConnectionError, OSError):
            if process.poll() is not None:
                raise UserError("flower-supernode has ended; its messages are above") from None
    process.wait(timeout=None) if process.poll() is not None else None


def _watch(process: subprocess.Popen[bytes], listener: Listener) -> None:
    """Lets the loop go on when the SuperNode has ended, which it would wait for."""

    def wait() -> None:
        process.wait()
        with contextlib.suppress(OSError):
            listener.close()

    threading.Thread(target=wait, daemon=True).start()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 15)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


__all__ = ["Seat", "join"]
