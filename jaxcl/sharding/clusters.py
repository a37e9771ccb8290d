"""Index and number of processes and the coordinator's address, from arguments, a list of hosts, SLURM or a TPU pod."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxcl.errors import UserError

DEFAULT_PORT = 8476

_ADDRESS, _COUNT, _INDEX = _KEYS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HOSTS = "JAXCL_HOSTS"
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_GOOGLE = "0x1ae0"

Environment = Mapping[str, str]
Metadata = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class ProcessId:
    """This process among the processes of its run.

    Attributes:
      host: name or address of the host of process 0.
      port: port on which process 0 listens.
      count: number of processes.
      index: index of this process, from 0.
    """

    host: str
    port: int
    count: int
    index: int

    @property
    def coordinator(self) -> str:
        """`host:port` of process 0."""
        return f"{self.host}:{self.port}"


def find_process_id(environment: Environment, metadata: Metadata | None = None) -> ProcessId | None:
    """This process, inferred from the first of these sources that is present.

    1. `JAXCL_HOSTS`: one host per process, separated by commas; the first with the coordinator's port, if that is not
       8476. The index is `JAX_PROCESS_ID`; without it, the host that is one of this machine's names and addresses.
    2. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, all three.
    3. A SLURM step with several tasks.
    4. A TPU pod, of one or several slices: GKE's variables, or the metadata of the TPU VM.

    `JAX_COORDINATOR_PORT` replaces the port in 3 and 4.

    Args:
      environment: environment variables.
      metadata: reads an attribute of the machine's metadata; `None` if it is not a TPU VM.

    Returns:
      This process, or `None` if no source mentions several processes.

    Raises:
      UserError: the settings are incomplete or contradict each other.

    Examples:
      >>> find_process_id({"JAXCL_HOSTS": "alpha:1234,beta", "JAX_PROCESS_ID": "1"})
      ProcessId(host='alpha', port=1234, count=2, index=1)
    """
    if environment.get(_HOSTS):
        return _of_hosts(environment)
    if any(environment.get(key) for key in _KEYS):
        return _of_settings(environment)
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _of_slurm(environment)
    return _of_tpu(environment, metadata)


def tpu_metadata() -> Metadata | None:
    """Reads the metadata of a TPU VM; `None` on machines without a TPU."""
    vendors = (Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    if _GOOGLE not in vendors or "TPU_SKIP_MDS_QUERY" in os.environ:
        return None

    def read(attribute: str) -> str:
        request = urllib.request.Request(_METADATA + attribute, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:  # not on Google Cloud, or no such attribute
            return ""

    return read


def _of_settings(environment: Environment) -> ProcessId:
    present = [key for key in _KEYS if environment.get(key)]
    if len(present) < len(_KEYS):
        missing = ", ".join(key for key in _KEYS if key not in present)
        raise UserError(f"{', '.join(present)} is set but {missing} is not; set all three or none", exit_code=2)
    try:
        count, index = int(environment[_COUNT]), int(environment[_INDEX])
    except ValueError as error:
        raise UserError(
            f"{_COUNT}={environment[_COUNT]}, {_INDEX}={environment[_INDEX]}: both must be whole numbers", exit_code=2
        ) from error
    _check_index(index, count, f"{_COUNT}-1")
    host, port = _split(environment[_ADDRESS], _ADDRESS, None)
    return ProcessId(host, port, count, index)


def _of_hosts(environment: Environment) -> ProcessId:
    clashing = [key for key in (_ADDRESS, _COUNT) if environment.get(key)]
    if clashing:
        raise UserError(f"{_HOSTS} and {', '.join(clashing)} are both set; set one of the two", exit_code=2)
    hosts = [host.strip() for host in environment[_HOSTS].split(",")]
    if "" in hosts:
        raise UserError(f"{_HOSTS}={environment[_HOSTS]}: a name between two commas is empty", exit_code=2)
    first, port = _split(hosts[0], _HOSTS, DEFAULT_PORT)
    names = [first, *hosts[1:]]
    if environment.get(_INDEX):
        index = _number(environment, _INDEX)
        _check_index(index, len(names), f"the number of hosts in {_HOSTS} - 1")
    else:
        index = _own_index(names)
    return ProcessId(first, port, len(names), index)


def _own_index(hosts: Sequence[str]) -> int:
    """Index of the host that is this machine."""
    own = own_names()
    found = [index for index, host in enumerate(hosts) if host.lower() in own]
    if len(found) != 1:
        which = "is not" if not found else "appears several times"
        raise UserError(
            f"{_HOSTS}={','.join(hosts)}: this machine ({', '.join(sorted(own))}) {which} in the list; "
            f"name it once, or set {_INDEX} on each host",
            exit_code=2,
        )
    return found[0]


def own_names() -> set[str]:
    """Names and addresses of this machine."""
    name = socket.gethostname().lower()
    names = {name, name.partition(".")[0], socket.getfqdn().lower()}
    with contextlib.suppress(OSError):
        names |= {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; selects the outgoing address (192.0.2.0/24 is reserved)
        names.add(str(probe.getsockname()[0]))
    return names


def _of_slurm(environment: Environment) -> ProcessId:
    count, index = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_PROCID")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    # Jobs and steps that share a node must not share a port; steps are few.
    offset = 16 * _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    return ProcessId(first_node(nodes), _port(environment, 61440 + offset % 4096), count, index)


def first_node(nodes: str) -> str:
    """The first node of SLURM's compressed list of nodes.

    Examples:
      >>> first_node("tux[03-05,7],other"), first_node("alpha,beta"), first_node("rack[1-2]node[4-9]")
      ('tux03', 'alpha', 'rack1node4')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: expected node names", exit_code=2)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _of_tpu(environment: Environment, metadata: Metadata | None) -> ProcessId | None:
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices: Environment = environment
    if workers:
        index = _number(environment, "TPU_WORKER_ID", 0)
    elif metadata is not None and (workers := metadata("worker-network-endpoints")):
        index = _number({"agent-worker-number": metadata("agent-worker-number")}, "agent-worker-number")
        # Lines like MEGASCALE_NUM_SLICES: '2'.
        slices = dict(re.findall(r"^\s*(\w+):\s*'?([^'\n]*)'?\s*$", metadata("tpu-env"), re.MULTILINE))
    else:
        return None
    # Endpoints are hosts, or name:id:address triples.
    hosts = [worker.strip().split(":")[-1 if worker.count(":") == 2 else 0] for worker in workers.split(",")]
    number, which = _number(slices, "MEGASCALE_NUM_SLICES", 1), _number(slices, "MEGASCALE_SLICE_ID", 0)
    host = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    count = number * len(hosts)
    return ProcessId(host, _port(environment, DEFAULT_PORT), count, which * len(hosts) + index) if count > 1 else None


def _split(address: str, key: str, default: int | None) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon and default is not None:
        return address, default
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{key}={address}: expected host:port", exit_code=2)
    return host, int(port)


def _check_index(index: int, count: int, words: str) -> None:
    if not 0 <= index < count:
        raise UserError(f"{_INDEX}={index} must be from 0 to {words} = {count - 1}", exit_code=2)


def _port(environment: Environment, default: int) -> int:
    return _number(environment, "JAX_COORDINATOR_PORT", default)


def _number(environment: Environment, key: str, default: int | None = None) -> int:
    value = environment.get(key) or ("" if default is None else str(default))
    if not value.isdecimal():
        raise UserError(f"{key}={value}: expected a whole number", exit_code=2)
    return int(value)
