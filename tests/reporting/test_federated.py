"""The part of a report about clients."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxcl.reporting.federated import rounds_picture
from jaxcl.reporting.report import write_report
from jaxcl.reporting.style import DASH
from tests.tiny.invented_runs import make_run
from tests.tiny.pages import check_page


def row(task: int, number: int, **changes: Any) -> dict[str, Any]:
    """A round of three clients, in which the last one is not."""
    plain = {"kind": "round", "task": task, "round": number, "clients": ["0", "1"], "refused": {}, "bytes_down": 2048}
    return {**plain, "bytes_up": 1024, "update_norm": 0.5, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", "replay", tasks=2)
    results = json.loads((folder / "results.json").read_text())
    results["extra"]["federated"] = {
        "epsilon": {"0": 1.25, "1": 0.0, "10": None},
        "delta": 1e-5,
        "scores": {"0": [[90.0, None], [50.0, 70.0]], "1": [[80.0, None], [30.0, 70.0]]},
    }
    (folder / "results.json").write_text(json.dumps(results))
    rows = [
        row(0, 0),
        row(0, 1, clients=["0", "10"], refused={"10": "lora: not finite"}),
        row(1, 0, lost="clients 1 dropped out"),
        {"kind": "shared", "task": 1, "bytes_up": 512, "bytes_down": 512},
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_rounds_bytes_scores_and_epsilon_are_shown(run: Path) -> None:
    before = check_page(write_report(run).read_text(encoding="utf-8"))
    first, second = json.loads((run / "results.json").read_text())["tasks"]
    text = before.text
    # Rounds, clients left out, bytes per round up and down, all of them, what the method shared.
    assert f"{first}211.0 KiB2.0 KiB6.0 KiB{DASH}" in text
    assert f"{second}101.0 KiB2.0 KiB3.0 KiB1.0 KiB" in text
    assert "1 of 3 rounds changed nothing" in text
    # After the last task, with the deviation over clients.
    assert "050.070.0130.070.0standard deviation10.00.0" in text
    assert "01.2510.0010∞" in text
    (run / "rounds.jsonl").unlink()
    after = check_page(write_report(run).read_text(encoding="utf-8"))
    assert "Clients" not in after.text
    assert before.counts["svg"] == after.counts["svg"] + 1


def test_the_picture_has_a_cell_per_round_and_client() -> None:
    rows = [row(0, 0), row(0, 1, clients=["0", "2"], refused={"2": "gone"}), row(1, 0)]
    picture = rounds_picture(rows, ["one", "two"])
    assert picture.count("<svg") == 1
    for words in ("took part", "left out", "1 one", "2 two"):
        assert words in picture
    # Clients 0, 1 and 2 in three rounds.
    assert "left out" not in rounds_picture(rows[:1], ["one", "two"])


def test_many_cells_are_one_image() -> None:
    rows = [row(0, number, clients=[str(name) for name in range(100)]) for number in range(50)]
    assert rounds_picture(rows, ["one"]).count("<image") == 1
    assert "<image" not in rounds_picture(rows[:3], ["one"])
