import json
from pathlib import Path

import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluation.results import Measure, Results, installed_versions, measure, write_predictions, write_tables
from jaxcl.functional.matrix import ContinualMatrix


def results() -> Results:
    matrix = ContinualMatrix.from_lists([[80.0], [60.0, 90.0]], None, [True, True])
    text = ContinualMatrix.from_lists([[9.0], [12.0, 7.0]], None, [False, False])
    return Results(
        method="seekr",
        seed=1,
        tasks=["first", "zweite/Aufgabe"],
        seconds=12.5,
        versions=installed_versions(),
        further={"perplexity": Measure(**measure(text, ["perplexity"] * 2))},
        **measure(matrix, ["exact_match"] * 2, reference=[85.0, 95.0]),
    )


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results().write(path)
    assert Results.read(path) == results()
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_documented_fields(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results().write(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    documented = {"method", "seed", "tasks", "metric", "matrix", "op", "bwt", "fwt", "forgetting", "seconds"}
    assert documented | {"versions"} <= set(content)
    assert content["matrix"] == [[80.0, None], [60.0, 90.0]]
    assert (content["op"], content["bwt"], content["fwt"], content["forgetting"]) == (75.0, -20.0, None, 20.0)
    assert content["intransigence"] == 5.0
    assert content["further"]["perplexity"]["bwt"] == -3.0
    assert {"python", "jax", "jaxcl"} <= set(content["versions"])


def test_a_resumed_run_goes_on_from_the_file(tmp_path: Path) -> None:
    results().write(tmp_path / "results.json")
    again = Results.read(tmp_path / "results.json").continual_matrix()
    assert again.backward_transfer() == -20.0


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    results().write(path)

    def write_half(self: Path, text: str, **_: object) -> None:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(UserError, match=r"cannot write .*no space left.*the previous file is intact"):
        results().model_copy(update={"seconds": 99.0}).write(path)
    assert Results.read(path) == results()


def test_numbers_that_json_has_not_are_written_as_null(tmp_path: Path) -> None:
    matrix = ContinualMatrix.from_lists([[float("inf")]], None, [False])
    infinite = Results(
        method="das",
        seed=0,
        tasks=["a"],
        seconds=float("nan"),
        versions={},
        extra={"epsilon": np.float32(0.5), "counts": np.arange(2)},
        **measure(matrix, ["perplexity"]),
    )
    infinite.write(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert content["op"] is None
    assert content["matrix"] == [[None]]
    assert content["extra"] == {"epsilon": 0.5, "counts": [0, 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not a jaxcl result"),
        ('{"method": "das"}', "not a jaxcl result: "),
    ],
)
def test_an_unusable_file_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        Results.read(path)
    assert str(path) in str(caught.value)


def test_predictions_survive_hostile_names_and_half_characters(tmp_path: Path) -> None:
    rows = [{"prompt": "a\nb", "prediction": "\ud83d", "answer": "😀", "score": 0.0, "correct": False}]
    path = write_predictions(tmp_path / "predictions", 1, 0, "../../etc/<passwd>", rows)
    assert path.parent == tmp_path / "predictions"
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert read == [{"after": 1, "task": "../../etc/<passwd>", **rows[0], "prediction": "?"}]
    assert write_predictions(tmp_path, -1, 2, "x", []).name == "before_task02.jsonl"


def test_tables_are_written_whole(tmp_path: Path) -> None:
    path = write_tables(tmp_path / "importance", 3, {"heads": np.eye(2, dtype=np.float32)})
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["heads"], np.eye(2))
    assert [file.name for file in path.parent.iterdir()] == ["after03.npz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": [[1.0, 2.0, 3.0]]}, "matrix: rows: expected at most 2 of at most 2 scores, got more"),
        ({"matrix": [[1.0]] * 3}, "matrix: rows"),
        ({"initial": [1.0] * 3}, "matrix: rows"),
        ({"deviation": [[1.0] * 3]}, "matrix: rows"),
        ({"versions": [1]}, "versions: "),
    ],
)
def test_odd_content_is_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        Results.read(path)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match="not a jaxcl result"):
        Results.read(path)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    for name in ("results.json.partial", "after00.npz.partial"):
        (tmp_path / name).symlink_to(tmp_path / "other")
    results().write(tmp_path / "results.json")
    write_tables(tmp_path, 0, {"a": np.zeros(1)})
    assert (tmp_path / "other").read_text() == "mine"
