"""A run whose output is a URL: killed, its machine lost, it ends as a run in a folder does, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.same_runs import differences
from jaxcl import cli
from jaxcl.config import parse_config
from jaxcl.config.file import ConfigError
from jaxcl.data.pipeline import Pipeline
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run import sequence
from jaxcl.run.remote.reading import local_copy, local_folder
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS
from tests.tiny.storage import FaultySystem

URL = "faulty://bucket/run"
CONTENT: dict[str, Any] = {
    **PAIRS,
    "method": {"name": "replay", "replay": {"fraction": 0.25}},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}


def run(output: str, local: Path | None = None) -> Results:
    places = {"output": output} if local is None else {"output": output, "local_output": str(local)}
    return sequence.run(parse_config({**CONTENT, **places})).results


def test_why_a_run_stopped_is_at_its_url(
    storage: type[FaultySystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    batch_at = Pipeline.batch_at

    def poisoned(self: Any, step: int, **where: Any) -> Any:
        batch = batch_at(self, step, **where)
        return {**batch, "weights": np.full_like(batch["weights"], np.nan)} if self.origin == "task" else batch

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "batch_at", poisoned)
        with pytest.raises(UserError, match="loss is nan"):
            run(URL, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost")
    copy = local_copy(URL)
    assert json.loads((copy / "not_finite.json").read_text())["task"] == CONTENT["tasks"][0]["name"]

    # On another machine it goes on, as if nothing had been.
    run(str(tmp_path / "plain"))
    run(URL, tmp_path / "other")
    assert not list(differences(tmp_path / "plain", tmp_path / "other"))
    assert not (local_copy(URL) / "not_finite.json").exists()


def test_a_lost_machine_changes_no_bit(
    storage: type[FaultySystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(str(tmp_path / "plain"))
    storage.latency = 0.005
    for number, save in enumerate((3, 2)):
        with killed_at_save(save):
            run(URL, tmp_path / f"life{number}")
        shutil.rmtree(tmp_path / f"life{number}")
    run(URL, tmp_path / "last")
    copy = local_copy(URL)
    assert copy == local_folder(URL)
    for other in (tmp_path / "last", copy):
        assert not list(differences(tmp_path / "plain", other))
        for name in ("memory.json", "tokenizer/tokenizer.json"):
            assert (tmp_path / "plain" / name).read_bytes() == (other / name).read_bytes()

    # Finished: nothing is trained again, on any machine.
    monkeypatch.setattr(sequence, "build", None)
    assert run(URL, tmp_path / "another").finished

    shutil.rmtree(copy)
    assert cli.main(["show", URL]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{URL}: replay, seed 0, 2 tasks\n")
    assert "finished" in shown
    assert not copy.exists()  # a summary needs no arrays
    assert cli.main(["generate", URL, "A", "--max-new-tokens", "2"]) == 0
    answer = capsys.readouterr().out
    assert cli.main(["generate", str(tmp_path / "plain"), "A", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == answer


def test_what_is_not_at_a_url_is_said(storage: type[FaultySystem], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="faulty://bucket/nothing: there is no run"):
        local_copy("faulty://bucket/nothing")
    assert cli.main(["show", "faulty://bucket/nothing"]) == 1
    with pytest.raises(UserError, match=r"nowhere://x/run cannot be opened|cannot read nowhere://x/run"):
        run("nowhere://x/run")
    for words in (["extend", URL, "name=x"], ["compare", "quickstart_seekr", "--methods", "replay", "--out", URL]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "is a URL, which is not supported yet" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="local_output is for URLs"):
        parse_config({**CONTENT, "output": "runs/x", "local_output": "runs/y"})


def test_each_url_has_a_local_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [local_folder(url) for url in ("gs://b/run", "gs://b/run/", "s3://b/run", "gs://b/r un", "gs://b/r-un")]
    assert [folders.index(folder) for folder in folders] == [0, 0, 2, 3, 4]
    assert all(folder.parent == tmp_path / "jaxcl/runs" for folder in folders)
    assert local_folder("gs://b/run", "here") == Path("here")
