"""Models that see learn the same on one device, on meshes of several, and on the devices of two processes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.test_same_numbers import check_same, finish, on_one_device, on_two_processes, start

pytestmark = pytest.mark.slow

MESHES = ("8x1", "2x4", "2x2x2", "4", "fsdp", "4x2", "2x4 data")
PAIRS = [*(f"seekr sees:{mesh}" for mesh in MESHES), "das sees:2x2x2", "das_paper sees:2x4", "das_paper sees:4"]
TWO_PROCESSES = ["seekr sees:4", "das_paper sees:4"]
# axes of the params: layers of the tower, embed, heads, size of a head
QUERY = "params/vision/tower/blocks/query/kernel"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("meshes") / "results.json"
    return finish({output: start(output, on_one_device(PAIRS) + PAIRS, devices=8)})[0]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(tmp_path_factory.mktemp("processes"), TWO_PROCESSES)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_device_and_many_learn_the_same(results: dict[str, Any], pair: str) -> None:
    check_same(results[pair], results[on_one_device([pair])[0]])


@pytest.mark.parametrize("pair", TWO_PROCESSES)
def test_one_process_and_two_learn_the_same(
    results: dict[str, Any], processes: list[dict[str, Any]], pair: str
) -> None:
    for process in processes:
        check_same(process[pair], results[pair])


def test_the_tower_learns_and_is_split_over_devices(results: dict[str, Any]) -> None:
    assert any(results["seekr sees:1"]["gradients"][QUERY.removeprefix("params/")])
    assert results["seekr sees:fsdp"]["specs"][QUERY] == "(None, 'fsdp')"
    assert results["seekr sees:4"]["specs"][QUERY] == "(None, 'fsdp', 'tensor')"
