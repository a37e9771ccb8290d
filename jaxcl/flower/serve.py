"""`jaxcl serve`: the server of a federated run over a network, and Flower's SuperLink for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxcl.config import ExperimentConfig
from jaxcl.config.file import dump_yaml, read_yaml, validate
from jaxcl.data.files import write_json, write_text
from jaxcl.errors import UserError
from jaxcl.flower.grid import FlowerGrid
from jaxcl.flower.link import check_installed, end, environment, tool
from jaxcl.reporting.report import write_report
from jaxcl.run.ending import finished_results
from jaxcl.run.federation import check_federated, open_server
from jaxcl.run.folder import RunFolder
from jaxcl.run.grid import Grid

_PROJECT = """[project]
name = "jaxcl-federated"
version = "1.0.0"
description = "Federated continual learning by jaxcl, which every machine has installed"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "jaxcl"
[tool.flwr.app.components]
serverapp = "jaxcl_federated:server_app"
clientapp = "jaxcl_federated:client_app"
[tool.flwr.app.config]
config = ""
"""
# Flower looks for assignments without importing the module.
_MODULE = """from jaxcl.flower import apps

server_app = apps.server_app
client_app = apps.client_app
"""
# Names in Flower's folder.
_APP, _SERVER, _OUTCOME, _PID = "app", "server.yaml", "outcome.json", "server.pid"
_STARTED = 60.0  # seconds that a SuperLink may take to start


def serve(
    config: ExperimentConfig,
    *,
    address: str,
    certificate: Path | None,
    key: Path | None,
    insecure: bool,
    timeout: float,
    patience: float,
) -> Path:
    """Runs the server until the last task is learned; started again after an interruption, it continues.

    Args:
      config: the configuration.
      address: `HOST:PORT` that clients connect to.
      certificate: the server's TLS certificate, with those that it is signed by.
      key: its private key.
      insecure: without TLS, for tests on one machine.
      timeout: seconds that a client has for an answer.
      patience: seconds that the server waits at the start for all clients to come.

    Returns:
      The path of the report.

    Raises:
      UserError: the configuration cannot be federated, Flower is not installed, or the server has failed.
    """
    if insecure and (certificate is not None or key is not None):
        raise UserError("serve: --insecure is without TLS; allowed without --certificate and --key", exit_code=2)
    check_installed()
    check_federated(config)
    if insecure:
        secured, trust = ["--insecure"], "insecure = true"
    elif certificate is None or key is None:
        raise UserError(
            "serve: --certificate and --key are needed, or --insecure for tests on one machine", exit_code=2
        )
    else:
        shown = str(certificate)
        secured = ["--ssl-ca-certfile", shown, "--ssl-certfile", shown, "--ssl-keyfile", str(key)]
        trust = f'root-certificates = "{certificate.absolute()}"'
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address {address}: expected HOST:PORT, such as 0.0.0.0:9092", exit_code=2)
    folder = Path(config.output)
    home = folder.absolute().with_name(f"{folder.name}.flower")  # not in the run folder, which is not there yet
    _write_app(home, superlink=f'[superlink.own]\naddress = "{address}"\n{trust}\n')
    limits = {"timeout": timeout, "patience": patience}
    write_text(home / _SERVER, dump_yaml({"config": config.plain(), **limits}))
    command = [tool("flower-superlink"), *secured, "--host", host, "--port", port]
    link = subprocess.Popen(
        [*command, "--disable-runtime-dependency-installation"], env=environment(home), start_new_session=True
    )
    try:
        _submit(home, link)
        found = _outcome(home / _OUTCOME, link)
    finally:
        end(link)
        _end_server(home / _PID)
    if "error" in found:
        raise UserError(found["error"])
    return Path(found["report"])


def _write_app(home: Path, *, superlink: str) -> None:
    """Writes what Flower needs to start the server, and removes what a server that was killed has left."""
    app = home / _APP
    app.mkdir(parents=True, exist_ok=True)
    for left in (_OUTCOME, _PID):
        (home / left).unlink(missing_ok=True)
    write_text(app / "pyproject.toml", _PROJECT)
    write_text(app / "jaxcl_federated.py", _MODULE)
    write_text(home / "config.toml", superlink)


def _outcome(path: Path, link: subprocess.Popen[bytes]) -> dict[str, str]:
    """How the server has ended, as soon as it has."""
    while not path.is_file():
        if link.poll() is not None:
            raise UserError("flower-superlink has ended; its messages are above")
        time.sleep(1.0)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    time.sleep(3.0)  # clients fetch the last message
    return found


def _end_server(path: Path) -> None:
    """Ends Flower's process of the server, which outlives the SuperLink: it would keep the run folder locked."""
    with contextlib.suppress(OSError, ValueError):
        number = int(path.read_text(encoding="utf-8"))
        # Whatever it was doing, the run can be resumed from its last checkpoint.
        os.kill(number, signal.SIGKILL)


def _submit(home: Path, link: subprocess.Popen[bytes]) -> None:
    """Gives the app to the SuperLink, as soon as it is there."""
    command = [tool("flwr"), "run", str(home / _APP), "own", "--run-config", f'config="{home / _SERVER}"']
    latest = time.monotonic() + _STARTED
    while True:
        tried = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return
        if time.monotonic() > latest or link.poll() is not None:
            print(tried.stdout, tried.stderr, file=sys.stderr)
            raise UserError("serve: Flower did not take the run; its messages are above")
        time.sleep(1.0)


def run_server(flower: Any, path: Path) -> None:
    """Runs the server within Flower's process, and writes how it ended.

    Args:
      flower: Flower's `Grid`.
      path: what `serve` has written.
    """
    content = read_yaml(path)
    outcome, own = path.with_name(_OUTCOME), path.with_name(_PID)
    write_text(own, str(os.getpid()))
    try:
        config = validate(ExperimentConfig, content["config"], "config")
        limits = {name: content[name] for name in ("timeout", "patience")}
        grid = FlowerGrid(flower, check_federated(config).clients, **limits)
        write_json(outcome, {"report": str(run_on(grid, config))})
    except UserError as error:
        write_json(outcome, {"error": str(error)})
    except BaseException as error:
        write_json(outcome, {"error": f"the server has failed: {type(error).__name__}: {error}"})
        raise
    finally:
        own.unlink(missing_ok=True)


def run_on(grid: Grid, config: ExperimentConfig) -> Path:
    """Runs the server with clients that are somewhere else; returns the path of the report.

    Args:
      grid: the clients.
      config: the configuration.

    Raises:
      UserError: see `serve`.
    """
    clients = range(check_federated(config).clients)
    folder = RunFolder(Path(config.output))
    try:
        folder.claim(config.plain())
        if finished_results(folder, config) is None:
            with contextlib.ExitStack() as stack:
                open_server(config, folder, grid, stack).run()
        for _ in grid.ask("close", {number: {"finished": True} for number in clients}, {}):
            pass
        return write_report(folder.path)
    finally:
        folder.release()


__all__ = ["run_on", "run_server", "serve"]
