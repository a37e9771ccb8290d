"""A run folder from elsewhere runs no code of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxcl import cli
from jaxcl.config import parse_config
from jaxcl.config.file import ConfigError, dump_yaml
from jaxcl.errors import UserError
from jaxcl.run.folder import RunFolder
from tests.tiny import runs

BROUGHT = """
import pathlib
pathlib.Path("code_ran").touch()
from jaxcl.methods.sequential import Sequential
class Mine(Sequential): pass
"""
COMMANDS = {
    "generate": ["generate", "dl", "hello"],
    "convert": ["convert", "dl", "out"],
    "importance": ["importance", "dl"],
    "teacher": ["teacher", "dl"],
    "extend": ["extend", "dl", "name=more", "source=json:more"],
    "show": ["show", "dl", "--params"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a run in `dl` that brings a module along, and the modules loaded before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    write({"name": "dl.evil:Mine"})
    (tmp_path / "dl" / "evil.py").write_text(BROUGHT)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "dl":
            del sys.modules[name]


def write(method: Any, **changes: Any) -> None:
    RunFolder(Path("dl")).path.mkdir(exist_ok=True)
    content = {"output": "dl", **runs.PAIRS, "method": method, **changes}
    RunFolder(Path("dl")).config_file.write_text(dump_yaml(content))


@pytest.mark.parametrize("method", [{"name": "dl.evil:Mine"}, "dl.evil:Mine"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_stored_configuration_imports_nothing(
    command: str, method: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(method)
    monkeypatch.setattr("jaxcl.commands.show.show", lambda *_: "")
    assert cli.main(COMMANDS[command]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"jaxcl {command}: dl/config.yaml: method.name: dl.evil:Mine is code outside jaxcl")
    assert not (here / "code_ran").exists()


@pytest.mark.parametrize("source", ["tfds:dl.evil", "tfds:someone:dataset"])
@pytest.mark.parametrize("place", ["tasks", "mix"])
def test_nor_does_a_source(source: str, place: str, here: Path) -> None:
    task = {"name": "a", "source": source} if place == "tasks" else {"name": "a", "mix": [{"source": source}]}
    write({"name": "sequential"}, tasks=[task])
    with pytest.raises(ConfigError, match=f"{source} is code outside jaxcl"):
        RunFolder(here / "dl").content()


@pytest.mark.parametrize("command", COMMANDS)
def test_with_trust_it_is_imported_but_not_from_the_current_folder(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxcl.commands.show.show", lambda *_: "")
    path = list(sys.path)
    assert cli.main([*COMMANDS[command], "--trust"]) == 2
    assert "cannot be imported: No module named 'dl'; the current folder is not searched" in capsys.readouterr().err
    assert not (here / "code_ran").exists()
    assert sys.path == path


def test_a_folder_on_the_path_may_be_the_current_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))
    assert parse_config(RunFolder(here / "dl").content(trust=True)).method.name == "dl.evil:Mine"
    assert (here / "code_ran").exists()


def test_a_run_of_ones_own_goes_on_without(here: Path) -> None:
    folder = RunFolder(here / "own")
    resolved = parse_config({"output": "own", **runs.PAIRS, "method": "dl.evil:Mine"}).plain()
    for _ in range(2):
        folder.claim(resolved)
        folder.release()
    assert "dl.evil:Mine" in folder.config_file.read_text()
    with pytest.raises(ConfigError, match=r"dl\.evil:Mine is code outside jaxcl"):
        folder.content()


def test_another_run_in_the_output_is_refused_without_its_code(here: Path) -> None:
    mine = parse_config({"output": "dl", **runs.PAIRS, "method": "sequential"}).plain()
    folder = RunFolder(here / "dl")
    with pytest.raises(UserError, match="contains a run with"):
        folder.claim(mine)
    folder.release()
    assert not (here / "code_ran").exists()


def test_a_registered_method_opens_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [one for one in sys.path if one not in ("", str(here))]
    monkeypatch.setattr(sys, "path", list(path))
    parse_config({"output": "x", **runs.PAIRS, "method": "jaxcl.methods.das:Das"})
    parse_config({"output": "x", **runs.PAIRS, "method": "sequential"})
    assert sys.path == path


def test_a_link_as_lock_is_not_followed(here: Path) -> None:
    (here / "other").write_text("mine")
    (here / "dl" / ".lock").symlink_to(here / "other")
    with pytest.raises(UserError, match=r"dl/\.lock: cannot be opened"):
        RunFolder(here / "dl").claim({})
    assert (here / "other").read_text() == "mine"


def test_a_start_that_was_killed_before_its_configuration_can_be_repeated(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(here / "new")
    resolved = parse_config({"output": "new", **runs.PAIRS, "method": "sequential"}).plain()
    with monkeypatch.context() as patched:
        patched.setattr("jaxcl.run.folder.dump_yaml", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.claim(resolved)
    folder.release()
    assert not list(folder.path.glob("[!.]*")), "nothing is there before the configuration"
    (folder.path / ".config.yaml.0123.tmp").touch()
    folder.claim(resolved)
    folder.release()
    (folder.path / "config.yaml").unlink()
    with pytest.raises(UserError, match="contains files but no run"):
        folder.claim(resolved)


def killed(content: object) -> str:
    raise KeyboardInterrupt


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a: !!python/object:os.system x", b"seed: !!int x", b"a: [1"])
def test_a_damaged_configuration_is_one_line(content: bytes, here: Path) -> None:
    resolved = parse_config({"output": "dl", **runs.PAIRS, "method": "sequential"}).plain()
    folder = RunFolder(here / "dl")
    folder.config_file.write_bytes(content)
    for use in (folder.content, lambda: folder.claim(resolved)):
        with pytest.raises(ConfigError, match=r"dl/config\.yaml"):
            use()
        folder.release()
