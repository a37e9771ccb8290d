from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.training import checksums
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.checksums import write_checksums
from jaxcl.training.feed import place_batch
from jaxcl.training.trainer import Trainer
from tests.tiny.trainer import Rows, assert_same, host, make_params, make_rows, make_trainer


def trained(trainer: Trainer, steps: int = 2) -> Any:
    state = trainer.start_task(trainer.init(make_params()), 50)
    for index in range(steps):
        state, _ = trainer.step(state, place_batch(make_rows(index), trainer.layout.batch))
    return state


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_saved_is_what_comes_back(tmp_path: Path, offload: bool) -> None:
    trainer = make_trainer(offload=offload)
    state = trained(trainer)
    before = host(state)
    progress = {"task": 1, "phase": "train", "matrix": [[0.5, None], [0.25, 1.0]]}
    with Checkpoints(tmp_path / "deep" / "folder") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state, progress=progress, data={"position": 2})
        # Training goes on at once, in the very buffers that are being written.
        for index in range(20):
            state, _ = trainer.step(state, place_batch(make_rows(index), trainer.layout.batch))
    with Checkpoints(tmp_path / "deep" / "folder") as checkpoints:
        saved = checkpoints.latest()
        assert saved is not None
        assert saved.progress == progress
        restored, data = checkpoints.restore(trainer.target, saved)
        assert data == {"position": 2}
        assert_same(before, restored)
        assert jax.tree.all(jax.tree.map(lambda leaf, goal: leaf.sharding == goal.sharding, restored, trainer.target))
        assert_same(before.params, checkpoints.params(trainer.target.params, saved))


@pytest.mark.parametrize("offload", [False, True])
def test_what_the_optimizer_works_on_comes_back_alone(tmp_path: Path, offload: bool) -> None:
    """Also into a state whose method part has another shape, as after a task was added."""
    trainer = make_trainer(offload=offload, schedule="wsd", decay=3)
    state = trained(trainer)
    before = host(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, progress={})
        saved = checkpoints.latest()
        assert saved is not None
        target = trainer.target.replace(method_state={"other": jax.ShapeDtypeStruct((2,), jnp.float32)})
        found = checkpoints.params_and_moments(target, saved)
        assert sorted(found) == ["low_bits", "opt_state", "params"]
        assert_same(before.params, found["params"])
        assert_same(before.opt_state, found["opt_state"])
        for name in ("params", "opt_state"):
            expected = getattr(trainer.target, name)
            assert jax.tree.all(jax.tree.map(lambda leaf, goal: leaf.sharding == goal.sharding, found[name], expected))
        assert_same(before.clock, checkpoints.restore(trainer.target, saved)[0].clock)
        assert before.clock.decay == 3


def test_clocks_without_a_decay_are_written_as_before_there_was_one(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(make_trainer()), progress={})
        checkpoints.wait()
        stored = checkpoints._manager.item_metadata(0)["state"]
    assert sorted(stored["clock"]) == ["step", "total", "warmup"]


def test_arrays_are_not_compressed(tmp_path: Path) -> None:
    """Processor time beside the training is dearer than bytes."""
    zeros = jnp.zeros(1_000_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(make_trainer()).replace(method_state={"zeros": zeros}), progress={})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > zeros.nbytes


def test_large_arrays_are_copied_before_the_next_step_reuses_them(tmp_path: Path) -> None:
    """Donation on the CPU writes into the same memory; a checkpoint written later must not see it."""
    trainer = make_trainer()
    state = trained(trainer)
    big = {"snapshot": state.method_state["snapshot"], "seen": jnp.arange(4_000_000, dtype=jnp.float32)}
    state = state.replace(method_state=big)
    target = trainer.target.replace(
        method_state={**trainer.target.method_state, "seen": jax.ShapeDtypeStruct((4_000_000,), jnp.float32)}
    )
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = add(state)
    expected = np.array(state.method_state["seen"], copy=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, progress={})
        for _ in range(5):
            state = add(state)
        saved = checkpoints.latest()
        assert saved is not None
        whole = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=trainer.layout.replicated), target
        )
        np.testing.assert_array_equal(checkpoints.restore(whole, saved)[0].method_state["seen"], expected)


def test_the_latest_and_the_marked_are_kept_also_after_a_restart(tmp_path: Path) -> None:
    trainer = make_trainer()
    state = trained(trainer, 1)
    with Checkpoints(tmp_path, keep=2, keep_marked=2) as checkpoints:
        for index in range(4):
            checkpoints.save(state, progress={"index": index}, mark=f"task-{index}" if index < 2 else None)
    assert numbers(tmp_path) == [0, 1, 2, 3]
    with Checkpoints(tmp_path, keep=2, keep_marked=2) as checkpoints:
        for index in range(4, 8):
            checkpoints.save(state, progress={"index": index}, mark="task-4" if index == 4 else None)
        found = checkpoints.find("task-4")
        assert found is not None
        assert (found.number, found.progress, found.mark) == (4, {"index": 4}, "task-4")
        assert checkpoints.find("task-7") is None
        assert checkpoints.find("task-0") is None, "more marked ones than are kept"
        assert checkpoints.find("task-1") is not None
        latest = checkpoints.latest()
        assert latest is not None
        assert latest.progress == {"index": 7}
    assert numbers(tmp_path) == [1, 4, 6, 7]


@pytest.mark.parametrize("fails", [False, True])
def test_the_one_before_is_removed_only_when_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Of a single checkpoint that is kept, there is a whole one at every moment."""
    state, seal, seen = trained(make_trainer(), 1), Checkpoints._seal, list[list[int]]()

    def late(self: Checkpoints) -> None:
        seen.append(numbers(tmp_path))
        if fails and self._saving == 1:
            raise OSError(errno.EIO, "Input/output error")
        seal(self)

    monkeypatch.setattr(Checkpoints, "_seal", late)
    with contextlib.suppress(UserError), Checkpoints(tmp_path, keep=1) as checkpoints:
        for index in range(2):
            checkpoints.save(state, progress={"index": index})
            checkpoints.wait()
    assert seen == [[], [0]]
    assert numbers(tmp_path) == [0] if fails else [1]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        saved = checkpoints.latest_whole()
    assert saved is not None
    assert saved.progress == {"index": 0 if fails else 1}


def test_remains_of_an_interrupted_save_are_ignored_and_removed(tmp_path: Path) -> None:
    trainer = make_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(trainer, 1), progress={"index": 0})
    remains = tmp_path / "1.orbax-checkpoint-tmp"
    remains.mkdir()
    (remains / "params").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        latest = checkpoints.latest()
        assert latest is not None
        assert latest.number == 0
        checkpoints.save(trained(trainer, 1), progress={"index": 1})
    assert numbers(tmp_path) == [1]
    assert not remains.exists()


def test_a_full_disk_is_said_clearly_and_spares_earlier_checkpoints(tmp_path: Path) -> None:
    """In a process of its own: the limit on the size of files that stands in for a full disk holds for all of it."""
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-m", "tests.training.full_disk_script", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "still there: {'index': 0}\n", done.stderr
    assert done.returncode == 1
    message = f"checkpoints {folder}: could not be written: the disk is full; earlier checkpoints are intact"
    assert done.stderr.splitlines() == [message]
    with Checkpoints(folder) as again:
        latest = again.latest()
        assert latest is not None
        assert latest.progress == {"index": 0}
        restored, data = again.restore(make_trainer().target, latest)
        assert data == 1
        assert_same(restored.params, make_params())


def test_any_failure_to_write_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        for number, words in ((errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")):

            def fail(*_: Any, number: int = number, **__: Any) -> None:
                raise OSError(number, "Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(checkpoints._manager, "save", fail)
                with pytest.raises(UserError, match=words):
                    checkpoints.save(trained(trainer, 1), progress={})


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(trainer, 1), progress={})
        saved = checkpoints.latest()
        assert saved is not None
        wrong = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype, sharding=trainer.layout.replicated),
            trainer.target.params,
        )
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.params(wrong, saved)


def test_a_state_of_another_structure_is_told_to_be_the_methods(tmp_path: Path) -> None:
    trainer = make_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(trainer, 1), progress={})
        saved = checkpoints.latest()
        assert saved is not None
        changed = trainer.target.replace(method_state={"snapshot": trainer.target.method_state["snapshot"]})
        with pytest.raises(UserError, match=r"another structure; Method.init has changed since they were written$"):
            checkpoints.restore(changed, saved)


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def rewrite_note(folder: Path, note: Any) -> None:
    """Another note, with checksums that fit."""
    (folder / "progress" / "metadata").write_text(json.dumps(note))
    write_checksums(folder)


DAMAGES: dict[str, Any] = {
    "a flipped bit of params": lambda folder: flip(largest(folder / "params")),
    "a flipped bit of state": lambda folder: flip(largest(folder / "state")),
    "an empty array file": lambda folder: largest(folder / "params").write_bytes(b""),
    "no position": lambda folder: next((folder / "data").glob("process_*")).unlink(),
    "a file of another": lambda folder: (folder / "params" / "stray").write_text("x"),
    "no note": lambda folder: (folder / "progress" / "metadata").unlink(),
    "a changed note": lambda folder: flip(folder / "progress" / "metadata"),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "nothing in it": lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()],
    "a note of another kind": lambda folder: rewrite_note(folder, {}),
    "a file beside the others": lambda folder: (folder / "stray").write_text("x"),
    "half the checksums": lambda folder: (folder / "checksums.json").write_text('{"params'),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, trainer = tmp_path_factory.mktemp("two") / "checkpoints", make_trainer()
    with Checkpoints(folder, keep=2) as checkpoints:
        for index in range(2):
            checkpoints.save(trained(trainer, 1), progress={"index": index}, data=index, mark=f"mark {index}")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    two_checkpoints: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    DAMAGES[damage](folder / "1")
    with Checkpoints.reading(folder) as checkpoints:  # what only reads takes no other model instead
        with pytest.raises(UserError, match=r"^checkpoint 1 cannot be used: .*/checkpoints") as caught:
            checkpoints.latest()
        assert "\n" not in str(caught.value)
    assert numbers(folder) == [0, 1]
    with Checkpoints(folder, keep=2) as checkpoints:
        saved = checkpoints.latest_whole()
        assert saved is not None
        assert (saved.number, saved.progress) == (0, {"index": 0})
        assert checkpoints.restore(make_trainer().target, saved)[1] == 0
        assert checkpoints.find("mark 1") is None
        line = capsys.readouterr().err.strip()
        assert line.startswith("checkpoint 1 cannot be used: ")
        assert line.endswith("; removed, the run goes on from checkpoint 0")
        checkpoints.save(trained(make_trainer(), 1), progress={"index": 2}, mark="mark 1")
        again = checkpoints.find("mark 1")
        assert again is not None
        assert again.progress == {"index": 2}
    assert numbers(folder) == [0, 1]


@pytest.mark.parametrize("where", ["an array", "the note", "the checksums"])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_read_that_fails_is_tried_again_and_removes_nothing(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, lasting: bool
) -> None:
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    place = {"an array": "params", "the note": "progress/metadata", "the checksums": "checksums.json"}[where]
    left, waited = 99 if lasting else 1, list[float]()

    def failing(read: Any) -> Any:
        def reads(path: Path, *arguments: Any) -> Any:
            nonlocal left
            if left and str(path).startswith(str(folder / "1" / place)):
                left -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            return read(path, *arguments)

        return reads

    monkeypatch.setattr(checksums, "_measure", failing(checksums._measure))
    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
    monkeypatch.setattr(checksums, "sleep", waited.append)
    if lasting:
        words = rf"/1/{place}.* cannot be read: Stale file handle \(4 attempts\); nothing was removed"
        with pytest.raises(UserError, match=words) as caught, Checkpoints(folder, keep=2) as checkpoints:
            checkpoints.latest_whole()
        assert "\n" not in str(caught.value)
        assert len(waited) == 3
    else:
        with Checkpoints(folder, keep=2) as checkpoints:
            saved = checkpoints.latest_whole()
        assert saved is not None
        assert (saved.number, left, len(waited)) == (1, 0, 1)
    assert numbers(folder) == [0, 1]


def test_without_a_whole_checkpoint_nothing_is_removed(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    for number in ("0", "1"):
        flip(largest(folder / number / "params"))
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(UserError, match=r"^checkpoint 1 .* is damaged .*; no earlier checkpoint is whole$"),
    ):
        checkpoints.latest_whole()
    assert numbers(folder) == [0, 1]


def test_an_older_damaged_checkpoint_does_not_matter(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    shutil.rmtree(folder / "0" / "progress")  # as a kill leaves it while Orbax deletes it
    with Checkpoints(folder, keep=2) as checkpoints:
        saved = checkpoints.latest_whole()
        assert saved is not None
        assert saved.number == 1
        assert checkpoints.find("mark 0") is None


def test_a_missing_position_is_not_taken_for_a_stop_between_two_tasks(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    with Checkpoints.reading(folder) as checkpoints:
        saved = checkpoints.latest()
        assert saved is not None
        position = next((folder / "1" / "data").glob("process_*"))
        position.unlink()  # after the files were compared
        with pytest.raises(UserError, match="the position in the data is missing"):
            checkpoints.restore(make_trainer().target, saved)
        (position.parent / "process_0_of_3.json").write_text("7")
        with pytest.raises(UserError, match="written within a task by 3 processes"):
            checkpoints.restore(make_trainer().target, saved)


@pytest.mark.parametrize("change", ["gone", "empty", "flipped", "of another checkpoint", "more"])
def test_what_orbax_writes_beside_the_arrays_changes_nothing(
    two_checkpoints: Path, tmp_path: Path, change: str
) -> None:
    """It writes them after the checksums, so they are not compared."""
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    files = [folder / "1" / name for name in ("_CHECKPOINT_METADATA", "commit_success.txt")]
    assert json.loads(files[0].read_text())["commit_timestamp_nsecs"], "set when the checkpoint is complete"
    for path in files:
        if change == "gone":
            path.unlink()
        elif change == "empty":
            path.write_text("")
        elif change == "flipped":
            flip(path)
        elif change == "of another checkpoint":
            shutil.copy(folder / "0" / path.name, path)
        else:
            (folder / "1" / f"_{path.name}").write_text("x")
            (folder / "1" / f".nfs{path.name}").write_text("x")
    trainer = make_trainer()
    with Checkpoints(folder, keep=2) as checkpoints:
        saved = checkpoints.latest_whole()
        assert saved is not None
        assert saved.number == 1
        state, position = checkpoints.restore(trainer.target, saved)
        assert position == 1
        assert_same(host(trained(trainer, 1)), state)
        checkpoints.save(state, progress={"index": 2})
    assert numbers(folder) == [0, 1, 2]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_another_number_of_processes_is_refused_within_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(trainer, 1), progress={}, data=Rows().get_state())
        saved = checkpoints.latest()
        assert saved is not None
        folder = tmp_path / str(saved.number) / "data"
        next(folder.glob("process_*.json")).rename(folder / "process_0_of_2.json")
        (folder / "process_1_of_2.json").write_text("0")
        with pytest.raises(UserError, match="within a task by 2 processes and cannot be resumed with 1"):
            checkpoints.restore(trainer.target, saved)
        for path in folder.glob("process_*.json"):
            path.write_text("null")  # between two tasks there is no position
        assert checkpoints.restore(trainer.target, saved)[1] is None
