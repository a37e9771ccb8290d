from __future__ import annotations

import socket

import pytest

from jaxcl.errors import UserError
from jaxcl.sharding import clusters
from jaxcl.sharding.clusters import ProcessId, find_process_id

SETTINGS = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a.sub,b.sub", "TPU_WORKER_ID": "1"}


def test_one_process_is_no_place() -> None:
    assert find_process_id({}) is None
    assert find_process_id({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}) is None


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SETTINGS, ProcessId("host", 1, 4, 2)),
        (SETTINGS | SLURM | GKE, ProcessId("host", 1, 4, 2)),
        ({"JAXCL_HOSTS": "a:9, b ,c", "JAX_PROCESS_ID": "2"}, ProcessId("a", 9, 3, 2)),
        ({"JAXCL_HOSTS": "a,b", "JAX_PROCESS_ID": "0"}, ProcessId("a", 8476, 2, 0)),
        (SLURM, ProcessId("gpu07", 61440 + (16000 + 2) % 4096, 8, 5)),
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, ProcessId("gpu07", 77, 8, 5)),
        (GKE, ProcessId("a.sub", 8476, 2, 1)),
        (
            GKE
            | {
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "first.sub:8080",
            },
            ProcessId("first.sub", 8476, 6, 5),
        ),
    ],
)
def test_places(environment: dict[str, str], place: ProcessId) -> None:
    assert find_process_id(environment) == place


@pytest.mark.parametrize("workers", ["10.0.0.1,10.0.0.2", "unknown:0:10.0.0.1,unknown:1:10.0.0.2"])
def test_a_tpu_vm_is_told_by_its_metadata(workers: str) -> None:
    told = {"worker-network-endpoints": workers, "agent-worker-number": "1", "tpu-env": "ZONE: 'x'\nTYPE: 'V5'\n"}
    assert find_process_id({}, told.__getitem__) == ProcessId("10.0.0.1", 8476, 2, 1)
    sliced = told | {"tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"}
    assert find_process_id({}, sliced.__getitem__) == ProcessId("10.0.0.1", 8476, 4, 3)
    assert find_process_id({}, lambda attribute: "") is None


def test_this_machine_finds_itself_in_a_list_of_hosts() -> None:
    own = socket.gethostname()
    assert find_process_id({"JAXCL_HOSTS": f"elsewhere:5,{own}"}) == ProcessId("elsewhere", 5, 2, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "is set but JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"),
        (SETTINGS | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 must be from 0 to JAX_NUM_PROCESSES-1 = 3"),
        (SETTINGS | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        (SETTINGS | {"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host: expected host:port"),
        ({"JAXCL_HOSTS": "a,,b", "JAX_PROCESS_ID": "0"}, "a name between two commas is empty"),
        ({"JAXCL_HOSTS": "a,b", "JAX_PROCESS_ID": "2"}, "must be from 0 to the number of hosts in JAXCL_HOSTS - 1 = 1"),
        ({"JAXCL_HOSTS": "a,b", "JAX_NUM_PROCESSES": "2"}, "JAXCL_HOSTS and JAX_NUM_PROCESSES are both set"),
        (SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID=: expected a whole number"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "expected node names"),
    ],
)
def test_incomplete_settings_are_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_process_id(environment)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_list_without_this_machine_says_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "own_names", lambda: {"gamma", "10.0.0.3"})
    with pytest.raises(UserError, match=r"this machine \(10.0.0.3, gamma\) is not in the list"):
        find_process_id({"JAXCL_HOSTS": "alpha,beta"})
    with pytest.raises(UserError, match="appears several times"):
        find_process_id({"JAXCL_HOSTS": "gamma,10.0.0.3"})
