"""The two apps that Flower starts: that of the server, and that of a client, which hands messages to `jaxcl join`.

Flower starts a process for each message of a client. So the app of a client is small, and this module imports no jax.
The app hands the message's bytes to the process of `jaxcl join`, which keeps the model, over a socket that only this
user can open.
"""

from __future__ import annotations

from multiprocessing.connection import Client as Connect
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from jaxcl.flower.link import MESSAGE

QUERIES = ("hello", "open", "secrets", "begin", "conclude", "merge", "store", "save", "score", "describe", "close")
"""What a client is asked besides training."""

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Runs the server of the configuration that `jaxcl serve` names."""
    from jaxcl.flower.serve import run_server

    run_server(grid, Path(str(context.run_config["config"])))


def forward(message: Message, context: Context) -> Message:
    """Hands a message to the process of `jaxcl join`, and its answer back."""
    content = message.content[MESSAGE][MESSAGE].numpy().tobytes()
    answer = np.frombuffer(_asked(context.node_config, content), np.uint8)
    return Message(RecordDict({MESSAGE: ArrayRecord({MESSAGE: Array(answer)})}), reply_to=message)


def _asked(config: Any, content: bytes) -> bytes:
    key = bytes.fromhex(Path(str(config["key"])).read_text())
    with Connect(str(config["socket"]), authkey=key) as connection:
        connection.send_bytes(content)
        return connection.recv_bytes()


client_app.train("train")(forward)
for _name in QUERIES:
    client_app.query(_name)(forward)
