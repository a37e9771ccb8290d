"""Loops that are asked to stop between two batches, and the files that they leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.training import halfway as module
from jaxcl.training.halfway import Halfway
from jaxcl.training.interrupt import StoppedTogether
from jaxcl.training.loops import Loops
from jaxcl.training.values_file import read_values, write_values
from tests.tiny.trainer import one_device

MESH = one_device().mesh


def make(folder: Path, *, checkpoint: int = 3, **about: Any) -> Halfway:
    return Halfway(folder, MESH, checkpoint=checkpoint, about=about, saved=lambda: None)


def items(stop_at: int | None = None, count: int = 5) -> Iterator[np.ndarray]:
    for number in range(count):
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        yield np.full(3, 0.1 * number, np.float32)


START: Any = {"sum": np.zeros(3, np.float32), "half": jnp.zeros((2, 3), jnp.bfloat16), "count": 0, "weak": 0.0}


@jax.jit
def added(total: Any, item: Any) -> Any:
    half, weak = total["half"] + item.astype(jnp.bfloat16), total["weak"] * 1.5 + 0.25
    return {"sum": total["sum"] * 0.7 + item, "half": half, "weak": weak}


def add(total: Any, item: np.ndarray) -> Any:
    calls.append(float(item[0]))
    rest = {name: value for name, value in total.items() if name != "count"}
    return {**added(rest, item), "count": total["count"] + 1}


calls: list[float] = []


@pytest.fixture(autouse=True)
def nothing_called() -> None:
    calls.clear()


def assert_same(found: Any, expected: Any) -> None:
    def same(one: Any, other: Any) -> None:
        assert getattr(one, "dtype", type(one)) == getattr(other, "dtype", type(other))
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()

    jax.tree.map(same, found, expected)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_fold_that_is_stopped_is_continued_to_the_same_bits(batch: int, tmp_path: Path) -> None:
    expected = Loops().fold(add, START, items())
    calls.clear()
    one = make(tmp_path)
    with pytest.raises(StoppedTogether), one.phase("x"):
        one.fold(add, START, items(batch))
    assert len(calls) == batch
    other = make(tmp_path)
    with other.phase("x"):
        found = other.fold(add, START, items())
    assert len(calls) == 5
    assert_same(found, expected)


def test_an_array_that_came_from_a_number_stays_one(tmp_path: Path) -> None:
    total = added({"sum": START["sum"], "half": START["half"], "weak": 0.0}, np.ones(3, np.float32))
    assert total["weak"].weak_type
    write_values(tmp_path / "x", {}, [total["weak"], total["half"]])
    found = read_values(tmp_path / "x", {}, MESH)
    assert found is not None
    assert_same(found, [total["weak"], total["half"]])
    assert (jnp.ones(1, jnp.bfloat16) * found[0]).dtype == jnp.bfloat16


def phases(loops: Loops, stop: tuple[int, int] | None = None) -> list[Any]:
    """Three loops of a phase; SIGTERM at a batch of one of them."""
    found = []
    with loops.phase("after 0"):
        for number in range(3):
            at = stop[1] if stop and stop[0] == number else None
            if number == 1:
                results = loops.each(lambda item: (calls.append(0.0), jnp.sum(item))[1], items(at))  # type: ignore[func-returns-value]
                found.append(np.array(jax.device_get(results), np.float64))
            else:
                found.append(loops.fold(add, START, items(at)))
    return found


def test_loops_that_had_ended_are_kept_with_the_one_that_is_stopped(tmp_path: Path) -> None:
    expected = phases(Loops())
    calls.clear()
    for stop, count in (((0, 2), 2), ((1, 3), 6), ((2, 2), 4)):
        before = len(calls)
        with pytest.raises(StoppedTogether):
            phases(make(tmp_path), stop)
        assert len(calls) - before == count
    assert_same(phases(make(tmp_path)), expected)
    assert len(calls) == 15


def test_a_signal_outside_of_loops_stops_the_phase_at_its_end(tmp_path: Path, capfd: Any) -> None:
    one = make(tmp_path)

    def measure() -> None:
        with one.phase("before 0"):
            one.fold(add, START, items())
            os.kill(os.getpid(), signal.SIGINT)
            calls.append(-1)

    with pytest.raises(StoppedTogether):
        measure()
    assert len(calls) == 6
    assert (
        capfd.readouterr().err == "\nstopping after this batch, with what is done so far; once more to stop at once\n"
    )
    other = make(tmp_path)
    with other.phase("before 0"):
        other.fold(add, START, items())
    assert len(calls) == 6


def test_a_loop_that_is_left_is_not_a_stop(tmp_path: Path) -> None:
    """A method that stores nothing leaves the loop over its memory at the first batch."""
    one = make(tmp_path)
    with one.phase("x"):
        loop = one.loop()
        next(iter(loop.rest(items())))
        assert not loop.stopped
        loop.end([""])


def test_an_item_that_is_stopped_in_between_begins_anew(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []

    def do(loops: Loops, item: int, stop: bool) -> list[int]:
        for step in range(3):
            loops.check()
            done.append((item, step))
            if stop and (item, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
        return [item]

    one, other = make(tmp_path), make(tmp_path)

    def score() -> None:
        with one.phase("x"):
            one.each(lambda item: do(one, item, True), range(3))
            done.append((-1, -1))  # a score of some of the items only

    with pytest.raises(StoppedTogether):
        score()
    assert done == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    done.clear()
    with other.phase("x"):
        assert other.each(lambda item: do(other, item, False), range(3)) == [[0], [1], [2]]
    assert done == [(item, step) for item in (1, 2) for step in range(3)]


def stopped(folder: Path) -> Path:
    one = make(folder, data="a")
    with pytest.raises(StoppedTogether), one.phase("x"):
        one.fold(add, START, items(2))
    calls.clear()
    (file,) = folder.iterdir()
    return file


def test_what_belongs_to_something_else_is_ignored(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    stopped(tmp_path / "halfway")

    def batches(one: Halfway, phase: str = "x", start: Any = START) -> int:
        calls.clear()
        with one.phase(phase):
            one.fold(add if start is START else lambda total, item: calls.append(0) or total, start, items())
        return len(calls)

    folder = tmp_path / "halfway"
    assert batches(make(folder, data="b")) == 5
    assert batches(make(folder, data="a", checkpoint=4)) == 5
    assert batches(make(folder, data="a"), "y") == 5
    assert batches(make(folder, data="a"), start=[np.zeros(3)]) == 5  # a method that adds something else
    with monkeypatch.context() as patched:
        patched.setattr(module.jax, "process_count", lambda: 2)
        two = make(folder, data="a")
    assert batches(two) == 5
    assert capsys.readouterr().err == ""
    assert batches(make(folder, data="a")) == 3
    make(folder, data="a").forget()
    assert not folder.exists()
    assert batches(make(folder, data="a")) == 5


def test_a_damaged_file_is_a_line_and_its_loop_begins_anew(tmp_path: Path, capsys: Any) -> None:
    file = stopped(tmp_path)
    whole, expected = file.read_bytes(), Loops().fold(add, START, items())
    changed = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 37)]
    for content in (*changed, whole[:-1], whole + b"x", whole[:40], b"", whole.replace(b'"count', b'"c0unt')):
        if content == whole:
            continue
        file.write_bytes(content)
        calls.clear()
        one = make(tmp_path, data="a")
        with one.phase("x"):
            assert_same(one.fold(add, START, items()), expected)
        assert len(calls) == 5
        assert capsys.readouterr().err == f"{file} is damaged; what it holds is done again\n"
    assert len(changed) > 10


def test_what_cannot_be_saved_is_a_line_and_the_run_stops(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "file").touch()
    one = make(tmp_path / "file" / "halfway")
    with pytest.raises(StoppedTogether), one.phase("x"):
        one.fold(add, START, items(2))
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cannot write {tmp_path}/file/halfway/x.0_process000.values: not a directory;")
    assert said.endswith("what is not in checkpoint 3 is done again")


@pytest.mark.parametrize("number", range(3))
def test_killed_while_it_is_saved_only_whole_files_are_used(number: int, tmp_path: Path, monkeypatch: Any) -> None:
    expected, written = phases(Loops()), list[Path]()

    def write(path: Path, *content: Any) -> None:
        if len(written) == number:
            path.with_name(f".{path.name}.0.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        write_values(path, *content)

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_values", write)
        with pytest.raises(KeyboardInterrupt):
            phases(make(tmp_path), (2, 2))
    calls.clear()
    assert_same(phases(make(tmp_path)), expected)
    assert len(calls) == 15 - 5 * number


def test_no_batch_is_added_before_the_one_before_the_last_is_computed() -> None:
    """Totals of batches that wait would be as many copies of them."""
    waited: list[int] = []

    class Total:
        def __init__(self, number: int) -> None:
            self.number = number

        def block_until_ready(self) -> Any:
            waited.append(self.number)
            return self

    Loops().fold(lambda total, item: Total(total.number + 1), Total(0), range(4))
    assert waited == [0, 1, 2, 3]
