"""Configurations by name, from any folder: which file a name means, the list, a copy."""

from pathlib import Path

import pytest

from jaxcl.cli import main
from jaxcl.config import find_config, load_config, shipped
from jaxcl.config.file import read_yaml
from jaxcl.errors import UserError

NAME = "quickstart_das"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_configs_in_a_checkout_are_those_of_the_package() -> None:
    link = Path(__file__).parents[1] / "configs"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert {path.stem: path.resolve() for path in link.glob("*.yaml")} == shipped()


def test_a_name_is_found_from_any_folder() -> None:
    assert find_config(NAME) == shipped()[NAME]
    assert load_config(NAME, ["seed=7"]) == load_config(shipped()[NAME], ["seed=7"])


def test_a_file_is_taken_before_a_name(elsewhere: Path) -> None:
    (elsewhere / NAME).write_text("seed: 1")
    assert find_config(NAME) == Path(NAME)
    (elsewhere / "mine.yaml").write_text("seed: 2")
    assert read_yaml(find_config("mine.yaml")) == {"seed": 2}


def test_a_run_folder_of_that_name_is_not_a_configuration(elsewhere: Path) -> None:
    (elsewhere / NAME).mkdir()
    assert find_config(NAME) == shipped()[NAME]


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_changed_copy_beside_is_ambiguous_and_an_unchanged_one_is_not(elsewhere: Path, suffix: str) -> None:
    copy = elsewhere / f"{NAME}{suffix}"
    copy.write_bytes(shipped()[NAME].read_bytes())
    assert find_config(NAME) == shipped()[NAME]
    copy.write_text(copy.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=f"{NAME}{suffix} or /.*/shipped/{NAME}.yaml") as caught:
        find_config(NAME)
    assert caught.value.exit_code == 2
    assert find_config(copy.name) == Path(copy.name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstart_dass", "did you mean quickstart_das? `jaxcl configs` lists them"),
        ("x", "; `jaxcl configs` lists them"),
        ("configs/quickstart_das.yaml", "quickstart_das comes with jaxcl: give that name alone"),
        ("./quickstart_das", "quickstart_das comes with jaxcl: give that name alone"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["importance"], ["plan", "--topology", "v5e:2x2"]])
def test_an_unknown_name_is_one_line_that_says_where_to_look(
    command: list[str], name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], name, *command[1:]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message


def test_compare_takes_a_name(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    outputs: list[str] = []
    monkeypatch.setattr("jaxcl.commands.compare.run", lambda config: outputs.append(config.output))
    monkeypatch.setattr("jaxcl.commands.compare.write_comparison", lambda *_: None)
    monkeypatch.setattr("jaxcl.commands.compare.read_comparison", lambda _: None)
    monkeypatch.setattr("jaxcl.commands.compare.comparison_table", lambda _: "")
    assert main(["compare", NAME, "--methods", "sequential,das", "--out", "o"]) == 0
    assert outputs == ["o/sequential-seed0", "o/das-seed0"]


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    first = shipped()[NAME].read_text().splitlines()[0].removeprefix("# ")
    assert [line.split(None, 1)[1] for line in lines if line.startswith(NAME)] == [first]
    assert all(len(line.split(None, 1)[1]) > 20 for line in lines)


def test_a_copy_is_written_once(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "folder").mkdir()
    for destination, path in ([], f"{NAME}.yaml"), (["mine.yaml"], "mine.yaml"), (["folder"], f"folder/{NAME}.yaml"):
        assert main(["configs", "--copy", NAME, *destination]) == 0
        assert capsys.readouterr().out == f"{path}\n"
        assert (elsewhere / path).read_bytes() == shipped()[NAME].read_bytes()
        (elsewhere / path).write_text("mine")
        assert main(["configs", "--copy", NAME, *destination]) == 1
        assert f"{path}: is there already" in capsys.readouterr().err
        assert (elsewhere / path).read_text() == "mine"


def test_a_copy_that_cannot_be_made_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        (["--copy", "quickstart_dass"], 2, "did you mean quickstart_das?"),
        (["--copy", NAME, "nowhere/x.yaml"], 1, "nowhere/x.yaml: cannot be written"),
        (["mine.yaml"], 2, "needs --copy NAME"),
    ):
        assert main(["configs", *arguments]) == code
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert words in message
