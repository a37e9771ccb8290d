"""Worker programs do what this process would, and their errors are its errors."""

import functools
import os
from pathlib import Path

import pytest

from jaxcl.data import cache as caches
from jaxcl.data import workers
from jaxcl.data.cache import Cache
from jaxcl.data.sources import load_task
from jaxcl.data.spec import DataConfig, TaskSpec
from jaxcl.data.text import TextRows
from jaxcl.data.workers import in_workers
from jaxcl.errors import UserError
from tests.tiny.texts import TEXTS, small_tokenizer


def write(folder, number):
    if number == 5:
        raise UserError("rows.jsonl line 6: no", exit_code=2)
    (folder / str(number)).write_text(str(os.getpid()))


def end(number):
    os._exit(3)


def misuse(number):
    print("not an answer")
    raise KeyError(number)


def test_every_item_is_worked_on_once_by_several_programs(tmp_path):
    in_workers(functools.partial(write, tmp_path), [6, 7, 8, 9, 10, 11], 2)
    found = [(tmp_path / str(number)).read_text() for number in range(6, 12)]
    assert 1 <= len(set(found)) <= 2
    assert str(os.getpid()) not in found


def test_what_cannot_be_pickled_is_done_here():
    done = []
    in_workers(lambda number: done.append(number), [1, 2, 3], 2)
    assert done == [1, 2, 3]


def test_errors_come_back_and_nothing_further_is_begun(tmp_path):
    with pytest.raises(UserError, match=r"^rows\.jsonl line 6: no$") as caught:
        in_workers(functools.partial(write, tmp_path), [5, *range(6, 3000)], 2)
    assert caught.value.exit_code == 2
    assert len(list(tmp_path.iterdir())) < 2990
    with pytest.raises(RuntimeError, match="ended with code 3"):
        in_workers(end, [1, 2], 2)
    with pytest.raises(RuntimeError, match="KeyError: 1"):
        in_workers(misuse, [1, 2], 2)


def test_workers_encode_what_this_process_would(tmp_path, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("".join(f"{text} {number}".replace("\n", " ") + "\n" for text in TEXTS))
    found = []
    for count in (1, 2):
        monkeypatch.setattr(caches, "in_workers", functools.partial(workers.in_workers, count=count))
        cache = Cache(tmp_path / f"cache{count}")
        task = load_task(TaskSpec(name="x", source=f"text:{tmp_path}/*.txt", heldout=0.2), cache=cache)
        config = DataConfig(length=32)
        rows = TextRows(task.train, small_tokenizer(), config, objective="causal", task=0, name="x", cache=cache)
        assert len(task.train.parts) == 5
        files = sorted(path for path in Path(cache.folder).rglob("*") if path.is_file())
        found.append([(path.relative_to(cache.folder), path.read_bytes()) for path in files])
        assert len(rows) > 5
    assert found[0] == found[1]
