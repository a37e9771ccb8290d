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
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.flower.grid import FlowerGrid
from jaxcl.flower.link import check_installed, environment, tool
from jaxcl.reporting.report import write_report
from jaxcl.run.components import build
from jaxcl.run.federation import check_federated, whole_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.run.grid import Grid
from jaxcl.run.server import Server
from jaxcl.training.checkpoint import Checkpoints

_APP = """[project]
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
_PID = "server.pid"
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
    """Runs the server until the last task is learned; started again after an interruption, it goes on.

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
    check_installed()
    check_federated(config)
    if not insecure and (certificate is None or key is None):
        raise UserError(
            "serve: --certificate and --key are needed, or --insecure for tests on one machine", exit_code=2
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address {address}: expected HOST:PORT, such as 0.0.0.0:9092", exit_code=2)
    folder = Path(config.output)
    home = folder.absolute().with_name(f"{folder.name}.flower")  # not in the run folder, which is not there yet
    home.mkdir(parents=True, exist_ok=True)
    outcome = home / "outcome.json"
    for left in (outcome, home / _PID):  # of a server that was killed
        left.unlink(missing_ok=True)
    plain = {"config": config.plain(), "timeout": timeout, "patience": patience, "outcome": str(outcome)}
    (home / "server.yaml").write_text(dump_yaml(plain), encoding="utf-8")
    app = home / "app"
    app.mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
    (app / "jaxcl_federated.py").write_text(_MODULE, encoding="utf-8")
    trust = "insecure = true" if insecure else f'root-certificates = "{Path(certificate or "").absolute()}"'
    (home / "config.toml").write_text(f'[superlink.own]\naddress = "{address}"\n{trust}\n', encoding="utf-8")
    secured = ["--insecure"] if insecure else _secured(Path(certificate or ""), Path(key or ""))
    command = [tool("flower-superlink"), *secured, "--host", host, "--port", port]
    link = subprocess.Popen(
        [*command, "--disable-runtime-dependency-installation"], env=environment(home), start_new_session=True
    )
    try:
        _submit(home, app, link)
        while not outcome.is_file():
            if link.poll() is not None:
                raise UserError("flower-superlink has ended; its messages are above")
            time.sleep(1.0)
        found = json.loads(outcome.read_text(encoding="utf-8"))
        time.sleep(3.0)  # clients fetch the last message
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(link.pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            link.wait(10)
        _end_server(home / _PID)
    if "error" in found:
        raise UserError(found["error"])
    return Path(found["report"])


def _end_server(path: Path) -> None:
    """Ends Flower's process of the server, which outlives the SuperLink: it would keep the run folder locked."""
    with contextlib.suppress(OSError, ValueError):
        number = int(path.read_text(encoding="utf-8"))
        # Whatever it was doing, the run goes on from its last checkpoint.
        os.kill(number, signal.SIGKILL)


def _secured(certificate: Path, key: Path) -> list[str]:
    return ["--ssl-ca-certfile", str(certificate), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]


def _submit(home: Path, app: Path, link: subprocess.Popen[bytes]) -> None:
    """Gives the app to the SuperLink, as soon as it is there."""
    command = [tool("flwr"), "run", str(app), "own", "--run-config", f'config="{home / "server.yaml"}"']
    end = time.monotonic() + _STARTED
    while True:
        tried = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return
        if time.monotonic() > end or link.poll() is not None:
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
    outcome = Path(content["outcome"])
    own = outcome.with_name(_PID)
    own.write_text(str(os.getpid()), encoding="utf-8")

    def ended(**values: str) -> None:
        partial = outcome.with_suffix(".partial")
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(outcome)

    try:
        config = validate(ExperimentConfig, content["config"], "config")
        ended(report=str(_run(flower, config, content["timeout"], content["patience"])))
    except UserError as error:
        ended(error=str(error))
    except BaseException as error:
        ended(error=f"the server has failed: {type(error).__name__}: {error}")
        raise
    finally:
        own.unlink(missing_ok=True)


def _run(flower: Any, config: ExperimentConfig, timeout: float, patience: float) -> Path:
    settings = check_federated(config)
    return run_on(FlowerGrid(flower, settings.clients, timeout=timeout, patience=patience), config)


def run_on(grid: Grid, config: ExperimentConfig) -> Path:
    """Runs the server with clients that are somewhere else; returns the path of the report.

    Args:
      grid: the clients.
      config: the configuration.

    Raises:
      UserError: see `serve`.
    """
    settings = check_federated(config)
    folder = RunFolder(Path(config.output))
    everybody = range(settings.clients)
    try:
        folder.claim(config.plain())
        if not (folder.results.is_file() and Results.read(folder.results).finished):
            parts = build(whole_tasks(config, settings), folder)
            keep = config.training.keep, config.training.keep_tasks
            with Checkpoints(folder.checkpoints, keep=keep[0], keep_marked=keep[1]) as checkpoints:
                server = Server(parts, folder, checkpoints, settings, grid)
                server.board.evaluator.check()
                server.check_schedule()
                server.run()
        for _ in grid.ask("close", everybody, {}, {number: {"finished": True} for number in everybody}):
            pass
        return write_report(folder.path)
    finally:
        folder.release()


__all__ = ["run_on", "run_server", "serve"]
