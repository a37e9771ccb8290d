import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcl.data.cache import Cache, Share
from jaxcl.data.formats import lines
from jaxcl.data.pairs import PairRows
from jaxcl.data.sources import load_task
from jaxcl.data.spec import DataConfig, TaskSpec
from jaxcl.data.split import StreamedRows
from jaxcl.data.text import TextRows
from jaxcl.errors import UserError
from tests.tiny.texts import TEXTS, small_tokenizer

CONFIG = DataConfig(length=64, prompt_length=80, answer_length=16)


def write_pairs(path, count=400):
    rows = [{"prompt": f"{TEXTS[n % 5]} number {n}", "answer": f"answer {n % 7}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_text(path, count=400):
    path.write_text("".join(f"{TEXTS[n % 5]} {n}".replace("\n", " ") + "\n" * (1 + n % 2) for n in range(count)))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(lines, "RANGE", 3000)


def opened(path, cache, **options):
    scheme = "jsonl" if path.suffix == ".jsonl" else "text"
    return load_task(TaskSpec(name="task", source=f"{scheme}:{path}", heldout=0.1, **options), 3, cache)


@pytest.mark.parametrize("options", [{}, {"train": 50, "test": 5}])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_streamed_rows_are_those_in_memory(tmp_path, small_parts, name, options):
    path = tmp_path / name
    (write_pairs if name.endswith("jsonl") else write_text)(path)
    cache = Cache(tmp_path / "cache")
    here, streamed = opened(path, None, **options), opened(path, cache, **options)
    assert isinstance(streamed.train, StreamedRows)
    assert len(streamed.train.parts) > 5
    for split in ("train", "dev", "test"):
        whole, rows = getattr(here, split), getattr(streamed, split)
        assert list(rows) == whole
        assert len(rows) == len(whole)
        assert rows.fingerprint == whole.fingerprint
        some = list(range(1, len(whole), 3))
        assert rows.pick(some) == [whole[number] for number in some]


@pytest.mark.parametrize("options", [{}, {"train": 50}])
def test_cached_examples_are_those_in_memory(tmp_path, small_parts, options):
    write_pairs(tmp_path / "rows.jsonl")
    cache = Cache(tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        here, cached = (
            PairRows(
                opened(tmp_path / "rows.jsonl", one, **options).train,
                small_tokenizer(),
                CONFIG,
                task=0,
                name="x",
                cache=one,
            )
            for one in (None, cache)
        )
        assert len(cached) == len(here)
        assert cached.sizes.tolist() == here.sizes.tolist()
        assert cached.describe() == here.describe()
        for index in range(len(here)):
            assert cached.prompt(index).tolist() == here.prompt(index).tolist()
            assert cached.answer(index).tolist() == here.answer(index).tolist()


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("packing", [True, False])
def test_cached_text_is_that_in_memory(tmp_path, objective, packing):
    write_text(tmp_path / "rows.txt")
    config = CONFIG.model_copy(update={"packing": packing})
    cache = Cache(tmp_path / "cache")
    here, cached = (
        TextRows(
            opened(tmp_path / "rows.txt", one).train,
            small_tokenizer(),
            config,
            objective=objective,
            task=0,
            name="x",
            cache=one,
        )
        for one in (None, cache)
    )
    assert cached.describe() == here.describe()
    shape = here.shapes([])[0]
    for index in range(len(here)):
        for one, other in zip(
            here.row(index, shape, (1,)).values(), cached.row(index, shape, (1,)).values(), strict=True
        ):
            assert np.array_equal(one, other)


def test_parts_of_a_text_are_packed_apart_and_lose_nothing(tmp_path, small_parts):
    write_text(tmp_path / "rows.txt")
    cache = Cache(tmp_path / "cache")
    task = opened(tmp_path / "rows.txt", cache)
    rows = TextRows(task.train, small_tokenizer(), CONFIG, objective="causal", task=0, name="x", cache=cache)
    assert len(rows.table.shards) > 5
    kept = [i for index in range(len(rows)) for i in rows.table[index][0].tolist()]
    framed = [[1, *small_tokenizer().encode(row["text"]), 2] for row in task.train]
    assert sorted(kept) == sorted(i for ids in framed for i in ids)


def test_what_an_example_follows_from_is_in_the_key(tmp_path):
    write_pairs(tmp_path / "rows.jsonl", 40)
    cache = Cache(tmp_path / "cache")

    def encoded(config=CONFIG):
        task = opened(tmp_path / "rows.jsonl", cache)
        return PairRows(task.train, small_tokenizer(), config, task=0, name="x", cache=cache)

    first = encoded()
    other = encoded(CONFIG.model_copy(update={"template": "USER: {prompt}\n"}))
    assert other.prompt(0).tolist() != first.prompt(0).tolist()
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace("answer 3", "answer 9"))
    assert [encoded().answer(n).tolist() for n in range(10)] != [first.answer(n).tolist() for n in range(10)]


class Recorder:
    """Makes parts and counts how often."""

    def __init__(self):
        self.made = []

    def __call__(self, part, path):
        self.made.append(part)
        path.write_text(f"part {part}")


def test_parts_are_made_once(tmp_path):
    make = Recorder()
    for _ in range(2):
        paths = Cache(tmp_path).build("kind", {"a": 1}, 3, make, ".txt")
        assert [path.read_text() for path in paths] == ["part 0", "part 1", "part 2"]
    assert make.made == [0, 1, 2]
    Cache(tmp_path).build("kind", {"a": 2}, 3, make, ".txt")
    assert len(make.made) == 6


def test_an_interruption_loses_one_part_and_a_cut_file_is_made_again(tmp_path):
    make = Recorder()

    def failing(part, path):
        if part == 2:
            path.write_text("half")
            raise UserError("rows.jsonl line 7: no")
        make(part, path)

    with pytest.raises(UserError, match="line 7"):
        Cache(tmp_path).build("kind", {}, 4, failing, ".txt")
    assert not list(tmp_path.rglob("*.tmp"))
    paths = Cache(tmp_path).build("kind", {}, 4, make, ".txt")
    assert make.made == [0, 1, 2, 3]
    paths[1].write_text("cut")
    Cache(tmp_path).build("kind", {}, 4, make, ".txt")
    assert make.made == [0, 1, 2, 3, 1]
    assert paths[1].read_text() == "part 1"


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    make = Recorder()

    def full(part, path):
        if part == 1:
            raise OSError(28, "No space left on device")
        make(part, path)

    with pytest.raises(UserError, match=r"data\.cache .*: cannot write .*: no space left on device; .* kept"):
        Cache(tmp_path).build("kind", {}, 2, full, ".txt")
    Cache(tmp_path).build("kind", {}, 2, make, ".txt")
    assert make.made == [0, 1]


class Team:
    """Processes as threads, which share a folder or not."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count)
        self.flags = [False] * count

    def member(self, index):
        team = self

        class Member(Share):
            count = team.barrier.parties

            def agree(self, found):
                team.flags[index] = found
                team.barrier.wait()
                agreed = all(team.flags)
                team.barrier.wait()
                return agreed

            def together(self, action):
                action()
                team.barrier.wait()

        member = Member()
        member.index = index
        return member


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work_where_they_share_the_folder(tmp_path, count, shared):
    team, makes = Team(count), [Recorder() for _ in range(count)]
    found = [None] * count

    def process(index):
        folder = tmp_path if shared else tmp_path / str(index)
        found[index] = Cache(folder, team.member(index)).build("kind", {}, 9, makes[index], ".txt")

    threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for paths in found:
        assert [path.read_text() for path in paths] == [f"part {n}" for n in range(9)]
    if shared:
        assert sorted(part for make in makes for part in make.made) == list(range(9))
        assert makes[1].made == list(range(1, 9, count))
    else:
        assert all(sorted(make.made) == list(range(9)) for make in makes)


BUILD = """
import sys
from jaxcl.data.formats import lines
lines.RANGE = 3000
from tests.data.test_cache import CONFIG, Cache, PairRows, Path, opened, small_tokenizer
cache = Cache(sys.argv[2])
print("begun", flush=True)
PairRows(opened(Path(sys.argv[1]), cache).train, small_tokenizer(), CONFIG, task=0, name="x", cache=cache)
"""


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_killed_at_random_points_the_bytes_are_those_of_an_undisturbed_build(tmp_path):
    write_pairs(tmp_path / "rows.jsonl", 3000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(cache):
        command = [sys.executable, "-c", BUILD, str(tmp_path / "rows.jsonl"), str(cache)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        with process.stdout as printed:
            assert printed.readline() == b"begun\n"
        return process

    begun = time.monotonic()
    assert start(tmp_path / "undisturbed").wait() == 0
    seconds = time.monotonic() - begun
    draw = random.Random(0)
    for _ in range(20):
        process = start(tmp_path / "killed")
        time.sleep(draw.random() * seconds / 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    found = {path: content for path, content in files_of(tmp_path / "killed").items() if path.suffix != ".tmp"}
    assert found == files_of(tmp_path / "undisturbed")


def test_the_default_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("JAXCL_DATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Cache().folder == Path("/somewhere/jaxcl/data")
