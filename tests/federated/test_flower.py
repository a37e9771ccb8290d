"""Federated runs over real Flower processes on this machine: SuperLink, SuperNodes, TLS."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxcl.config.file import dump_yaml
from jaxcl.run.model import load_model
from tests.federated.helpers import DOMAINS, rounds
from tests.tiny.networks import assert_equal_bits
from tests.tiny.runs import numbers

pytest.importorskip("flwr")

pytestmark = [pytest.mark.optimised, pytest.mark.slow]

METHOD: dict[str, Any] = {"name": "ewc"}  # shares the Fisher
SECTION: dict[str, Any] = {"clients": 2, "rounds": 2, "steps": 1}
CONTENT: dict[str, Any] = {
    **DOMAINS,
    "tasks": DOMAINS["tasks"][:1],
    "training": {**DOMAINS["training"], "checkpoint_every": 1},
}
LIMIT = 900.0  # seconds, so that a hanging test ends


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine, signed by itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    places = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(places, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return paths


class Network:
    """A server and clients, each a process of its own with a folder of its own."""

    def __init__(self, folder: Path, content: dict[str, Any], *, timeout: float = 300.0) -> None:
        self.folder = folder
        self.content = content
        self.timeout = timeout
        self.certificate, self.key = certificate(folder)
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        content = {**self.content, "output": str(self.folder / name)}
        path = self.folder / f"{name}.yaml"
        path.write_text(dump_yaml(content))
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115
        whole = [sys.executable, "-m", "jaxcl", command[0], str(path), *command[1:]]
        self.processes[name] = subprocess.Popen(whole, stdout=log, stderr=log, start_new_session=True)
        log.close()

    def serve(self) -> None:
        options = ("--timeout", str(self.timeout), "--patience", "600")
        secured = ("--certificate", str(self.certificate), "--key", str(self.key))
        self.start("server", "serve", "--address", self.address, *secured, *options)

    def join(self, number: int) -> None:
        secured = ("--certificate", str(self.certificate), "--port", str(free_port()))
        self.start(f"client{number}", "join", "--client", str(number), "--server", self.address, *secured)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        # The SuperNode is in a group of its own, so that Ctrl-C is for `jaxcl join` alone.
        groups = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
        for group in (process.pid, *map(int, groups.split())):
            os.killpg(group, signal.SIGKILL)
        process.wait()

    def wait(self, there: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not there():
            assert time.monotonic() < end, self.logs()
            assert self.processes["server"].poll() is None, self.logs()
            time.sleep(0.5)

    def finish(self) -> None:
        for name, process in self.processes.items():
            assert process.wait(LIMIT) == 0, (name, self.logs())

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def rounds(self) -> list[dict[str, Any]]:
        path = self.folder / "server" / "rounds.jsonl"
        return rounds(path.parent) if path.is_file() else []


@contextlib.contextmanager
def network(folder: Path, content: dict[str, Any], **options: Any) -> Iterator[Network]:
    found = Network(folder, content, **options)
    try:
        yield found
    finally:
        for process in found.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_over_a_network_the_numbers_are_those_in_one_process(tmp_path: Path) -> None:
    with network(tmp_path, {**CONTENT, "method": METHOD, "federated": SECTION}) as found:
        # Also a process of its own: tests compile with other settings.
        found.start("alone", "federate")
        found.finish()
        found.processes.clear()
        found.serve()
        found.join(0)
        found.join(1)
        found.finish()
    results = json.loads((tmp_path / "server" / "results.json").read_text())
    assert results["finished"]
    assert results["matrix"] == json.loads((tmp_path / "alone" / "results.json").read_text())["matrix"]
    rows = rounds(tmp_path / "server")
    assert rows == rounds(tmp_path / "alone")
    assert [row["kind"] for row in rows] == ["shared", "round", "round", "shared"]
    assert_equal_bits(load_model(str(tmp_path / "server")).params, load_model(str(tmp_path / "alone")).params)
    for number in "01":
        own = tmp_path / f"client{number}" / "clients" / number
        assert numbers(own) == numbers(tmp_path / "alone" / "clients" / number)


def test_a_client_that_dies_in_a_round_is_left_out_and_comes_back(tmp_path: Path) -> None:
    content = {**CONTENT, "method": "sequential"}
    section = {**SECTION, "rounds": 12}
    with network(tmp_path, {**content, "federated": section}, timeout=60.0) as found:
        found.serve()
        found.join(0)
        found.join(1)
        found.wait(lambda: len(found.rounds()) >= 2)
        found.kill("client1")
        found.wait(lambda: any("1" in row["refused"] for row in found.rounds()))
        found.join(1)
        found.finish()
    rows = rounds(tmp_path / "server")
    assert len(rows) == 12
    assert all("0" not in row["refused"] for row in rows)
    assert "1" not in rows[-1]["refused"]
    assert json.loads((tmp_path / "server" / "results.json").read_text())["finished"]
