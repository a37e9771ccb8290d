"""Every mistake in a configuration is one line that names the key, the value and what is allowed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxcl.config import ExperimentConfig, load_config, parse_config
from jaxcl.config.file import ConfigError, apply_overrides, dump_yaml, read_yaml, validate
from jaxcl.config.reference import reference
from jaxcl.methods import find_method
from jaxcl.methods.base import Method
from tests.tiny.runs import DECODER

ROOT = Path(__file__).parents[1]

MINIMAL: dict[str, Any] = {
    "output": "runs/x",
    "model": DECODER,
    "tasks": [{"name": "one", "source": "stdlib:unicode_bidi"}],
    "method": {"name": "sequential"},
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL), ["training.batch_size=8", "tasks.*.train=5", "optimizer.learning_rate=1e-3"]
    )
    assert config.training.batch_size == 8
    assert config.tasks[0].train == 5
    assert config.optimizer.learning_rate == 1e-3
    assert config.seed == 0


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs").glob("quickstart_*.yaml")):
        config = load_config(path)
        again = load_config(write(tmp_path, config.plain()))
        assert again == config
        assert again.method.options == config.method.options


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output=runs/exp #2", "runs/exp #2"),
        ("output=runs/a: b", "runs/a: b"),
        ("output=2024", "2024"),
        ("output='runs/x y'", "runs/x y"),
        (r'data.template="{prompt}\n"', "{prompt}\n"),
        ("data.template=<|user|>{prompt} # x", "<|user|>{prompt} # x"),
        ("tasks.0.name=no", "no"),
        ("tasks.*.name=2024-01-01", "2024-01-01"),
        ("tasks.0.pair_field=null", None),
        ("tasks.0.pair_field=010", "010"),
        ("weights=", None),
        ("method.replay.synthetic.prefix=[INST] #", "[INST] #"),
        ("seed=010", 10),
        ("seed=0x1F", 31),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=.5", 0.5),
        ("evaluation.before=yes", True),
        ("evaluation.before=false", False),
        ("training.keep_tasks=null", None),
        ("training.sinks=[jsonl]", ("jsonl",)),
    ],
)
def test_values_of_overrides(tmp_path: Path, override: str, expected: Any) -> None:
    content = {**MINIMAL, "method": {"name": "seekr", "layer_budget": 1, "head_budget": 1}}
    value: Any = load_config(write(tmp_path, content), [override]).plain()
    for part in override.partition("=")[0].split("."):
        value = value[0 if part in "0*" else part]
    expected = list(expected) if isinstance(expected, tuple) else expected
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.learning_rate=true"], ["optimizer.learning_rate: must be a number, got True"]),
        (["training.batch_size=true"], ["training.batch_size: must be a number, got True"]),
        (["data.bucket_lengths=[true, 64]"], ["data.bucket_lengths: must be a number, got [True, 64]"]),
        (["method.name=das", "method.importance_examples=false"], ["importance_examples: must be a number, got False"]),
        (["seed=1 #2"], ["'seed=1 #2'", "comment"]),
        (["seed=2024-99-99"], ["seed", "valid integer", "2024-99-99"]),
        (["seed=1:30"], ["seed", "valid integer", "1:30"]),
        (["seed=!!int x"], ["seed=!!int x", "not valid YAML"]),
        (["seed=!!int ''"], ["not valid YAML"]),
        (["seed=!!bool maybe"], ["not valid YAML"]),
        (["seed=!!timestamp 2024-99-99"], ["not valid YAML"]),
        (["seed=" + "9" * 5000], ["not valid YAML"]),
        (["tasks." + "1" * 5000 + "=1"], ["is not an item of a list of 1"]),
        (["method.name=.relative:M"], ["method", "cannot load '.relative:M'"]),
        (["tasks.0.prompt_template={prompt}{}"], ["prompt_template", "{} does not just name a field"]),
        (["tasks.0.prompt_template={prompt:d}"], ["prompt_template", "{prompt:d} does not just name a field"]),
        (["tasks.0.prompt_template={prompt!z}"], ["prompt_template", "{prompt!z} does not just name a field"]),
        (["tasks.0.prompt_template={prompt:>{answer}}"], ["prompt_template", "does not just name a field"]),
        (["tasks.0.prompt_template={prompt"], ["prompt_template", "is not a template"]),
        (["seed=" + "[" * 5000], ["not valid YAML"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate", "got nan"]),
        (["local_output=gs://b/run"], ["local_output", "is a URL, which is not supported yet", "gs://b/run"]),
        (["local_output=runs/y"], ["local_output: output is a folder already", "local_output is for URLs"]),
        (["data_root=s3://bucket"], ["data_root", "is a URL"]),
        (["tokenizer.path=hf://x/y"], ["tokenizer.path", "is a URL"]),
        (["tasks.0.source=tfds:gs://bucket/x"], ["tasks.0.source", "a URL needs one of json, jsonl, text"]),
        (["output=~no_such_user_here/x"], ["output", "home folder is not known"]),
        (["training.batch_sise=8"], ["training.batch_sise", "unknown key", "did you mean batch_size?", "accumulate"]),
        (["model.hiden_size=8"], ["model.hiden_size", "did you mean hidden_size?"]),
        (["model.architecture=lama"], ["model.architecture", "'lama'", "did you mean llama?", "roberta"]),
        (["training.batch_size=0"], ["training.batch_size", "greater than or equal to 1", "got 0"]),
        (["training.batch_size=many"], ["training.batch_size", "valid integer", "'many'"]),
        (["method.name=seker"], ["no method 'seker'", "did you mean seekr?", "das"]),
        (["method.name=das_paper", "method.mask_onn=update"], ["mask_onn", "did you mean mask_on?"]),
        (["method.name=das_paper", "method.mask_on=updates"], ["mask_on", "'update'", "'updates'"]),
        (["method.name=seekr", "method.layer_budget=2", "method.head_budget=99"], ["head_budget", "99", "4"]),
        (["tasks.0.sorce=x"], ["tasks.0.sorce", "did you mean source?"]),
        (["tasks.3.train=5"], ["tasks.3.train=5", "list of 1"]),
        (["seed"], ["'seed'", "KEY=VALUE"]),
        (["tasks=[]"], ["tasks", "at least 1"]),
        (["mesh.data=0"], ["mesh"]),
        (["training.steps=5", "training.epochs=2"], ["training", "not both"]),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    for part in expected:
        assert part in message, message


def test_a_name_used_twice_is_refused() -> None:
    tasks = [MINIMAL["tasks"][0]] * 2
    with pytest.raises(ConfigError, match="'one' appears twice"):
        parse_config({**MINIMAL, "tasks": tasks})


# Nine levels of nine aliases each: 400 million values in half a kilobyte.
BOMB = "a0: &a0 [1]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", ["line 2", "'seed' appears twice"]),
        ("seed: [1\n", ["line", "not valid YAML"]),
        ("- a\n", ["expected a mapping", "list"]),
        ("seed: " + "[" * 50_000, ["line 1", "brackets are nested too deeply"]),
        ("a: &a [1, 2, *a]\n", ["more than 100,000 values"]),
        (BOMB, ["more than 100,000 values"]),
    ],
)
def test_unreadable_files_name_the_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(write(tmp_path, text))
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: No such file"):
        read_yaml(tmp_path / "nothing.yaml")


def test_missing_key_is_reported_as_missing() -> None:
    content = {key: value for key, value in MINIMAL.items() if key != "output"}
    with pytest.raises(ConfigError, match="output: missing"):
        parse_config(content)


def test_an_unknown_key_is_reported_before_the_missing_one_it_causes() -> None:
    content = {**{key: value for key, value in MINIMAL.items() if key != "output"}, "outptu": "runs/x"}
    with pytest.raises(ConfigError, match="outptu: unknown key; did you mean output"):
        parse_config(content)


def test_overrides_reach_into_lists_and_make_sections() -> None:
    assert apply_overrides({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}
    with pytest.raises(ConfigError, match="below a plain value"):
        apply_overrides({"a": [1]}, ["a.0.b=2"])


def test_a_method_in_a_file_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "one_of_my_own.py").write_text("from jaxcl.methods.base import Method\nclass Mine(Method): pass\n")
    monkeypatch.chdir(tmp_path)
    assert find_method("one_of_my_own:Mine").__name__ == "Mine"


def test_a_method_from_outside_by_module_and_class() -> None:
    config = parse_config({**MINIMAL, "method": {"name": f"{__name__}:Outside"}})
    assert config.method.name.endswith(":Outside")
    with pytest.raises(ConfigError, match="cannot load"):
        parse_config({**MINIMAL, "method": "nowhere:Nothing"})


class Outside(Method):
    """A method that jaxcl does not know."""


def test_environment_names_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXCL_DATA", "/elsewhere")
    assert parse_config({**MINIMAL, "data_root": "here"}).data_root == "/elsewhere"


def test_validate_names_union_members_by_their_key_alone() -> None:
    with pytest.raises(ConfigError, match=r"config: model\.num_layers: "):
        validate(ExperimentConfig, {**MINIMAL, "model": {**MINIMAL["model"], "num_layers": -1}}, "config")


def test_the_reference_in_the_docs_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(ExperimentConfig), "run `make docs`"


@pytest.mark.parametrize("text", ["seed: 2024-99-99", "seed: !!int x", "seed: 1" + "0" * 5000, "seed: " + "[" * 5000])
def test_odd_values_in_files_are_one_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text + "\n" + yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_in_stored_configurations_stays_text(tmp_path: Path) -> None:
    plain = {
        "a": "1e-4",
        "b": "010",
        "c": "no",
        "d": "2024-01-01",
        "e": 1e-5,
        "f": "0o7",
        "g": 8,
        "h": "1:30",
        "i": "~",
    }
    assert read_yaml(write(tmp_path, dump_yaml(plain))) == plain
    assert yaml.safe_load(dump_yaml(plain)) == plain


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    task = {"name": "one", "source": "jsonl:~/rows", "data_dir": "~/kept"}
    end_task = {"source": "text:~/end", "data_dir": "~/kept"}
    content = {**MINIMAL, "output": "~/run", "data_root": "~", "tokenizer": {"path": "~/tokens"}}
    config = parse_config({**content, "tasks": [{**task, "end_task": end_task}]})
    assert (config.output, config.data_root) == (f"{tmp_path}/run", str(tmp_path))
    assert config.tokenizer.path == f"{tmp_path}/tokens"
    assert (config.tasks[0].source, config.tasks[0].data_dir) == (f"jsonl:{tmp_path}/rows", f"{tmp_path}/kept")
    assert config.tasks[0].end_task is not None
    assert config.tasks[0].end_task.source == f"text:{tmp_path}/end"
    behind_url = {**content, "tasks": [{**task, "source": "jsonl:gs://bucket/x"}]}
    assert parse_config(behind_url).tasks[0].source == "jsonl:gs://bucket/x"
    monkeypatch.setenv("JAXCL_DATA", "~/elsewhere")
    assert parse_config(content).data_root == f"{tmp_path}/elsewhere"
