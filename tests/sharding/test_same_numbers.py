"""The same numbers on one device, on meshes of several, and on the devices of two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny.devices import host_devices

# One mesh for each method is always tried, the others by `make test-slow`.
PAIRS = ["das:2x4", "seekr:2x4"]
SLOW = [
    *("das_paper encoder:8x1", "das_paper encoder:2x4", "das_paper encoder:2x2x2"),
    *("das_paper uneven:2x4", "das_paper uneven:2x2x2"),
    *("das_paper experts:2x4", "das_paper experts:2x2x2"),
    *("seekr:8x1", "seekr:2x2x2", "seekr uneven:2x4", "seekr uneven:2x2x2"),
]
TWO_PROCESSES = ["das_paper encoder:4", "seekr:4"]
# axes of the params: layers, embed, heads or rank, size of a head
SPLIT = {"seekr:2x4": "(None, 'fsdp', 'tensor')"}


def start(output: Path, pairs: list[str], devices: int, **settings: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **host_devices(devices), **settings}
    command = [sys.executable, str(Path(__file__).with_name("same_numbers_script.py")), str(output), *pairs]
    with open(output.with_suffix(".err"), "wb") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors)


def finish(running: dict[Path, subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    try:
        for output, process in running.items():
            assert process.wait(timeout=1200) == 0, output.with_suffix(".err").read_text()[-3000:]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return [json.loads(output.read_text()) for output in running]


def on_one_device(pairs: list[str]) -> list[str]:
    return sorted({f"{pair.split(':')[0]}:1" for pair in pairs})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("meshes") / "results.json"
    return finish({output: start(output, on_one_device(PAIRS) + PAIRS, devices=8)})[0]


@pytest.fixture(scope="module")
def more_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("meshes") / "results.json"
    return finish({output: start(output, on_one_device(SLOW) + SLOW + TWO_PROCESSES, devices=8)})[0]


def on_two_processes(folder: Path, pairs: list[str]) -> list[dict[str, Any]]:
    """What each of them found, on two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = {}
    for index in range(2):
        settings = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        output = folder / f"process{index}.json"
        running[output] = start(output, pairs, devices=2, **settings)
    return finish(running)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(tmp_path_factory.mktemp("processes"), TWO_PROCESSES)


def check_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses of all steps; gradients of the first; params and the method's state after all; selected heads exactly."""
    np.testing.assert_allclose(got["losses"], expected["losses"], rtol=1e-5)
    assert got["heads"] == expected["heads"]
    for kind in ("gradients", "params", "state"):
        assert got[kind].keys() == expected[kind].keys()
        for name, values in expected[kind].items():
            size = np.abs(values).max(initial=0)
            # Softmax cancels it: what it has is rounding, and so have copies and squares of it.
            if name.endswith("key/bias") and (kind != "state" or size < 1e-6):
                assert max(size, np.abs(got[kind][name]).max()) < 1e-6
                continue
            atol = 1e-5 * size
            if kind == "params":  # 20 steps by the error of the first moment: learning rate and epsilon are 0.01 each
                atol += 20 * 1e-5 * np.abs(expected["gradients"].get(name, 0.0)).max()
            np.testing.assert_allclose(got[kind][name], values, rtol=1e-5, atol=atol, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("pair", PAIRS)
def test_one_device_and_many_learn_the_same(results: dict[str, Any], pair: str) -> None:
    check_same(results[pair], results[on_one_device([pair])[0]])


@pytest.mark.slow
@pytest.mark.parametrize("pair", SLOW)
def test_one_device_and_many_learn_the_same_on_more_meshes(more_results: dict[str, Any], pair: str) -> None:
    check_same(more_results[pair], more_results[on_one_device([pair])[0]])


@pytest.mark.slow
@pytest.mark.parametrize("pair", TWO_PROCESSES)
def test_one_process_and_two_learn_the_same(
    more_results: dict[str, Any], processes: list[dict[str, Any]], pair: str
) -> None:
    """Four devices of one process, and two of each of two."""
    for process in processes:
        check_same(process[pair], more_results[pair])


def test_there_was_something_to_learn(results: dict[str, Any]) -> None:
    """Two equal runs that do nothing would show nothing."""
    for result in results.values():
        assert len(set(result["losses"])) == len(result["losses"]) == 20
        for name, values in result["state"].items():
            assert len(set(values)) > 4 or len(values) <= 4, name
    heads = results["seekr:1"]["heads"]
    assert all(len(set(map(tuple, task))) == 3 for task in heads)
    assert heads[0] != [[0, 0], [0, 1], [0, 2]]


@pytest.mark.slow
def test_what_cannot_be_split_evenly_is_split_along_one_axis(more_results: dict[str, Any]) -> None:
    specs = more_results["das_paper uneven:2x4"]["specs"]
    assert [spec for path, spec in specs.items() if path.endswith("query/kernel")] == ["(None, 'fsdp')"] * 3


@pytest.mark.slow
def test_experts_are_split_over_devices(more_results: dict[str, Any]) -> None:
    specs = {path: spec for path, spec in more_results["das_paper experts:2x4"]["specs"].items() if "params" in path}
    kernels = {path.split("/")[-2]: spec for path, spec in specs.items() if "mlp/" in path}
    # axes of the params: layers, experts, embed, units of an expert
    assert kernels == {
        "router": "(None, 'fsdp')",
        "gate": "(None, 'tensor', 'fsdp')",
        "up": "(None, 'tensor', 'fsdp')",
        "down": "(None, 'tensor', None, 'fsdp')",
    }


@pytest.mark.parametrize("pair", SPLIT)
def test_moments_are_split_like_the_params(results: dict[str, Any], pair: str) -> None:
    specs = [spec for path, spec in results[pair]["specs"].items() if path.endswith("query/kernel")]
    assert specs == [SPLIT[pair]] * 3, "the param and two moments"


def test_the_anchor_is_split_like_the_params(results: dict[str, Any]) -> None:
    specs = results["das:2x4"]["specs"]
    anchors = {path.partition("anchor/")[2]: spec for path, spec in specs.items() if "/anchor/" in path}
    assert anchors == {path.partition("params/")[2]: spec for path, spec in specs.items() if path.startswith("params/")}
    assert "(None, 'fsdp', 'tensor')" in anchors.values()


def test_each_kind_of_step_is_compiled_once(results: dict[str, Any]) -> None:
    for pair, result in results.items():
        assert result["compilations"] == (2 if "seekr" in pair else 1), pair
