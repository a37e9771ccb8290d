"""The command line: help, exit codes, one-line errors."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxcl.cli import _ACTIONS, main
from jaxcl.commands.parser import build_parser

COMMANDS = tuple(_ACTIONS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, jaxcl.cli\n"
        "try: jaxcl.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "jaxcl.cli.main(['configs'])\n"
        "heavy = {'jax', 'numpy', 'flax', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert f"    {command} " in result.stdout
    assert re.findall(r"^    (\w+) ", result.stdout, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example:\n  jaxcl {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["rn"],
        [],
        ["run"],
        ["run", "x.yaml", "--nonsense"],
        ["compare", "x.yaml", "--methods", "a"],
        ["compare", "x.yaml", "--methods", ",", "--out", "o"],
        ["compare", "x.yaml", "--methods", "a", "--out", "o", "--seeds", "one"],
        ["prepare", "trace"],
        ["report", "x", "a=b", "--c=d"],
        ["extend", "run"],
        ["extend", "run", "name=x", "--length", "long"],
        ["importance"],
        ["convert", "run", "gs://bucket/model"],
        ["compare", "x.yaml", "--methods", "a", "--out", "s3://bucket"],
        ["show", "~no_such_user_here/run"],
        ["generate", "model", "caf\udce9"],
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--help" in message


def test_bad_configuration_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"jaxcl run: {tmp_path}/no.yaml: No such file or directory\n"


def test_a_url_without_its_driver_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(["run", "quickstart_seekr", "output=gs://bucket/run"]) == 1
    error = capsys.readouterr().err
    assert "gs://bucket/run needs the package gcsfs" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*run*"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["convert", "run", "~/x"], "destination"),
        (["convert", "~/x", "model"], "source"),
        (["importance", "run", "--out=~/x"], "out"),
        (["compare", "c", "--methods=a", "--out=~/x"], "out"),
        (["run", "~/x"], "config"),
        (["extend", "~/x", "name=a"], "run"),
        (["generate", "~/x", "hi"], "model"),
        (["prepare", "trace", "--manual-dir=~/x"], "manual_dir"),
        (["prepare", "trace", "--manual-dir=y", "--data-dir=~/x"], "data_dir"),
        (["configs", "--copy", "a", "~/x"], "destination"),
        (["show", "~/x"], "run"),
        (["report", "~/x"], "runs"),
    ],
)
def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    value = getattr(build_parser().parse_args(arguments), name)
    assert value == (["/home/me/x"] if name == "runs" else "/home/me/x")


def test_failure_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "hello"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxcl.config.load_config", interrupted)
    assert main(["run", "x.yaml"]) == 130
    assert "again to resume" in capsys.readouterr().err
    assert main(["plan", "x.yaml", "--topology", "v5e:4x4"]) == 130
    assert capsys.readouterr().err == "jaxcl plan: interrupted\n"


def test_a_search_compiles_as_many_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []
    monkeypatch.setattr("jaxcl.config.load_config", lambda *_: "config")
    monkeypatch.setattr("jaxcl.planning.search.search", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr("jaxcl.planning.table.as_table", lambda _: "table")
    words = ["plan", "c.yaml", "--topology", "v5e:4x4", "--search", "train"]
    assert main(words) == main([*words, "--tries", "1"]) == 0
    assert seen == [("config", "v5e:4x4", "train", tries, None) for tries in (3, 1)]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--tries", "0"])
    assert "--tries: expected a whole number above 0, got '0'" in capsys.readouterr().err


def test_overrides_may_follow_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("jaxcl.commands.compare.compare", lambda *arguments: seen.extend(arguments) or "page")
    assert main(["compare", "c.yaml", "--methods", "a,b", "seed=3", "--out", "o", "x.y=1"]) == 0
    assert seen[:4] == ["c.yaml", ["seed=3", "x.y=1"], ["a", "b"], None]


def test_extend_and_importance_hand_their_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    outcome = SimpleNamespace(report="page")
    monkeypatch.setattr(
        "jaxcl.commands.extend.extend",
        lambda *arguments, **flags: seen.append((*arguments, *flags.values())) or outcome,
    )
    monkeypatch.setattr(
        "jaxcl.commands.importance.measure_importance",
        lambda *arguments, **flags: seen.append((*arguments, *flags.values())) or "page",
    )
    assert main(["extend", "run", "name=x", "--length", "100", "source=y"]) == 0
    assert main(["extend", "run", "name=x", "--length", "0.5", "--data-gone", "--data-changed"]) == 0
    assert main(["importance", "c.yaml", "seed=1", "--out", "o"]) == 0
    assert main(["importance", "run"]) == 0
    assert seen == [
        (Path("run"), ["name=x", "source=y"], 100, False, False, False),
        (Path("run"), ["name=x"], 0.5, True, True, False),
        ("c.yaml", ["seed=1"], Path("o"), False),
        ("run", [], None, False),
    ]
    assert isinstance(seen[0][2], int)  # type: ignore[index]  # steps are whole numbers


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(args: object) -> None:
        raise MemoryError

    monkeypatch.setitem(_ACTIONS, "show", full)
    assert main(["show", "run"]) == 1
    assert capsys.readouterr().err == "jaxcl show: out of memory\n"


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError, RuntimeError])
def test_the_end_of_another_process_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(args: object) -> None:
        raise kind("UNKNOWN: Gloo: connection closed by peer\nmore\nlines")

    monkeypatch.setitem(_ACTIONS, "run", lost)
    with pytest.raises(kind):  # alone, it is jax's own failure
        main(["run", "c.yaml"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert main(["run", "c.yaml"]) == 75
    assert capsys.readouterr().err == (
        "jaxcl run: another process of the run is gone: UNKNOWN: Gloo: connection closed by peer; run the same command "
        "again to resume\n"
    )


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), ValueError("width 5: not even"), RuntimeError()],
)
def test_a_fault_of_its_own_is_not_laid_to_another_process(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setitem(_ACTIONS, "run", fail)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(type(error)):
        main(["run", "c.yaml"])
