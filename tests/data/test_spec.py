import gzip
import re

import pytest
from pydantic import ValidationError

from jaxcl.data import files, spec
from jaxcl.data.files import read_data_text, read_text, replacing, write_json
from jaxcl.data.spec import DataConfig, TaskSpec, TokenizerConfig
from jaxcl.errors import UserError


@pytest.mark.parametrize("section", [spec.SourceSpec, spec.EndTaskSpec, spec.TaskSpec, DataConfig, TokenizerConfig])
def test_every_field_is_described(section):
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "no place"}, "contain {prompt} exactly once"),
        ({"template": "{prompt} {prompt}"}, "exactly once"),
        ({"bucket_lengths": [64, 32]}, "increasing lengths"),
        ({"bucket_lengths": []}, "increasing lengths"),
        ({"mask_replace": 0.8, "mask_random": 0.3}, "must not exceed 1"),
        ({"on_long_answer": "drop"}, "'error' or 'cut'"),
        ({"lenght": 3}, "not permitted"),
        ({"prompt_length": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        DataConfig(**values)


def test_tasks_are_nested_and_checked():
    task = TaskSpec(name="reviews", source="text:x", end_task={"source": "jsonl:y", "pair_field": "aspect"})
    assert task.end_task is not None
    assert task.end_task.pair_field == "aspect"
    for values in ({"name": "a/b"}, {"name": ""}, {"prompt_template": "{"}, {"prompt_template": "none"}):
        with pytest.raises(ValidationError):
            TaskSpec(**{"name": "x", "source": "text:x", **values})
    with pytest.raises(ValidationError, match="262"):
        TokenizerConfig(vocab_size=100)


def test_settings_are_not_unpacked_and_data_within_bounds(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_bytes(gzip.compress(b"a" * 4000))
    with pytest.raises(UserError, match="line 1 is not UTF-8 text"):
        read_text(path)
    assert read_data_text(path) == "a" * 4000
    monkeypatch.setattr(files, "_UNPACKED", 3999)
    monkeypatch.setattr(files, "_TIMES", 1)
    with pytest.raises(UserError, match="would be more than 0 MiB of text, decompressed"):
        read_data_text(path)
    monkeypatch.setattr(files, "_TIMES", 4000)
    assert read_data_text(path) == "a" * 4000


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a" / "file.json", {"x": 1})

    def fail():
        with replacing(tmp_path / "a" / "file.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_text(tmp_path / "a" / "file.json") == '{\n "x": 1\n}\n'
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["file.json"]


def test_a_write_never_touches_the_old_file(tmp_path):
    """Whoever reads while it is replaced sees all of the old or all of the new content."""
    write_json(tmp_path / "file.json", "old")
    (tmp_path / "reader").hardlink_to(tmp_path / "file.json")
    write_json(tmp_path / "file.json", "new")
    assert read_text(tmp_path / "reader") == '"old"\n'
    assert read_text(tmp_path / "file.json") == '"new"\n'


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*the previous file is intact"):
        write_json(tmp_path / "file" / "x.json", 1)
