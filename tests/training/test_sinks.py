from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from jaxcl.errors import UserError
from jaxcl.run.rounds import Rounds
from jaxcl.training.sinks import JsonLines, Progress, TensorBoard, open_sinks


def row(step: int, kind: str = "task") -> dict[str, Any]:
    return {"step": step, "task": 0, "kind": kind, "loss": 1.0 / step}


def messages(folder: Path) -> Iterator[event_pb2.Event]:
    """What event files hold: records of length, checksum, message, checksum."""
    for path in folder.glob("events*"):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            yield event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size


def events(folder: Path) -> list[tuple[str, int, float]]:
    """Scalars of the event files."""
    return [(value.tag, event.step, value.simple_value) for event in messages(folder) for value in event.summary.value]


def test_a_line_a_row(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(row(1))
    sink.write(row(2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(1), row(2)], "rows must be there before the file is closed"
    sink.close()


def test_rows_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    sink = JsonLines(path, after=5)
    sink.write(row(6, "memory"))
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["kind"] == "memory"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: Is a directory"):
        JsonLines(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_one_line() -> None:
    sink = JsonLines("/dev/full")
    with pytest.raises(UserError, match="/dev/full: cannot be written: No space left on device"):
        sink.write(row(1))
    sink.close()


def test_tensorboard_has_a_curve_a_metric_and_kind(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    sink.write(row(2))
    sink.write(row(4, "memory"))
    sink.close()
    assert events(tmp_path) == [("task/loss", 2, 0.5), ("memory/loss", 4, 0.25)]


def test_a_full_disk_ends_tensorboard_with_one_line_and_nothing_else(tmp_path: Path) -> None:
    script = Path(__file__).with_name("full_tensorboard_script.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=60)
    words = f"tensorboard: {tmp_path}/tensorboard: cannot be written: File too large; the run goes on without it\n"
    assert (done.returncode, done.stderr) == (0, words)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


def test_tensorboard_that_cannot_begin_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").touch()
    for sink in open_sinks(tmp_path):
        sink.write(row(1))
        sink.close()
    words = f"tensorboard: {tmp_path}/tensorboard: cannot be written: File exists; the run goes on without it\n"
    assert capsys.readouterr().err == words


def test_events_of_steps_that_are_made_again_are_hidden(tmp_path: Path) -> None:
    TensorBoard(tmp_path, after=5).close()
    logs = [(event.step, event.session_log.status) for event in messages(tmp_path) if event.HasField("session_log")]
    assert logs == [(6, event_pb2.SessionLog.START)]


def test_one_opened_in_the_same_second_leaves_the_events_of_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        sink = TensorBoard(tmp_path, after=step - 1)
        sink.write(row(step))
        sink.close()
    assert sorted(step for _, step, _ in events(tmp_path)) == [1, 2, 3]


def test_the_sinks_of_a_run_folder(tmp_path: Path) -> None:
    for sink in open_sinks(tmp_path):
        sink.write(row(1))
        sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert events(tmp_path / "tensorboard")


def test_progress_says_rate_and_remaining_time(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    clock = [100.0]
    monkeypatch.setattr("jaxcl.training.sinks.time.monotonic", lambda: clock[0])
    progress = Progress("numbers", done=2, total=6)
    for _ in range(3):
        clock[0] += 20.0
        progress.advance(loss=1.5, tokens=500)
    # A line at 40 s: two steps done, the second of them, 500 tokens, in the last 20 s; three more at 20 s each.
    assert capsys.readouterr().err == "numbers: step 4/6, loss 1.500, 25 tokens/s, 40 s left\n"
    clock[0] += 1.0
    progress.advance(loss=1.25, tokens=500)
    progress.close()
    assert "step 6/6, loss 1.250" in capsys.readouterr().err


def test_progress_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("numbers", done=0, total=1, enabled=False)
    progress.advance(1.0, 1.0)
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.symlink_to(other)  # that is not there
    for after in (None, 2):
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: it is a link$"):
            JsonLines(path, after=after)
    assert not other.exists()
    other.write_text(line := json.dumps(row(1)) + "\n")
    with pytest.raises(UserError, match="it is a link"):
        JsonLines(path)
    sink = JsonLines(path, after=1)  # is replaced
    sink.write(row(2))
    sink.close()
    assert other.read_text() == line
    assert not path.is_symlink()
    rounds = Rounds(tmp_path / "rounds.jsonl")
    rounds.note("round", task=0)
    assert (tmp_path / "rounds.jsonl").read_text() == '{"kind": "round", "task": 0}\n'
    (tmp_path / "rounds.jsonl").unlink()
    (tmp_path / "rounds.jsonl").symlink_to(other)
    with pytest.raises(UserError, match=r"rounds\.jsonl: cannot be written: it is a link$"):
        rounds.note("round", task=0)
    assert other.read_text() == line


@pytest.mark.parametrize("line", [b"5", b"[1]", b'{"step": "x"}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"null"])
def test_what_is_no_row_is_dropped(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps(row(step)).encode() for step in (1, 2)]
    path.write_bytes(b"\n".join([rows[0], line, rows[1], b""]))
    JsonLines(path, after=2).close()
    assert path.read_bytes() == b"\n".join([*rows, b""])
    assert list(tmp_path.iterdir()) == [path]
