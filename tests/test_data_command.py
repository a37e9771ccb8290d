"""`jaxcl data`: counts, repeated rows and samples, and the cache that it leaves behind."""

import json

import pytest

from jaxcl.cli import main
from jaxcl.commands.data import describe_data
from jaxcl.data import encode
from tests.tiny.texts import TEXTS

CONFIG = """
seed: 0
output: {folder}/run
model: {{architecture: llama, vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_layers: 2, num_heads: 2,
         max_length: 96}}
tokenizer: {{vocab_size: 300}}
data: {{prompt_length: 64, answer_length: 24, length: 32, cache: {folder}/cache}}
mesh: {{fsdp: 8}}
tasks:
  - {{name: pairs, source: "jsonl:{folder}/pairs", kind: pairs}}
  - {{name: news, source: "text:{folder}/news.txt", heldout: 0.2}}
training: {{batch_size: 8, epochs: 1}}
method: {{name: sequential}}
"""


@pytest.fixture
def config(tmp_path):
    rows = [{"prompt": f"number {n % 9}", "answer": str(n % 9)} for n in range(12)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs" / "test.jsonl").write_text('{"prompt": "NUMBER  3", "answer": "3"}\n')
    (tmp_path / "news.txt").write_text("".join(f"{TEXTS[n % 5]} {n}".replace("\n", " ") + "\n" for n in range(40)))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def test_counts_repeats_and_samples(config, capsys):
    assert main(["data", str(config), "--samples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "task",
        "split",
        "rows",
        "examples",
        "tokens",
        "learned",
        "cut",
        "fill",
        "MB",
        "seconds",
    ]
    assert lines[1].split()[:4] == ["pairs", "train", "12", "12"]
    assert [line.split()[:2] for line in lines[2:4]] == [["news", "train"], ["news", "test"]]
    assert ["pairs", "train", "itself", "3", "25.0%"] in [line.split() for line in lines]
    # Numbers 0 to 2 occur twice; number 3 is in the test set, too.
    assert ["pairs", "train", "pairs", "test", "1", "8.3%"] in [line.split() for line in lines]
    assert "- <bos>number 0⟦ 0<eos>⟧" in lines
    assert any(line.startswith("- <bos>⟦") for line in lines)


def test_a_run_finds_what_the_command_has_encoded(config, monkeypatch):
    describe_data(str(config), [], samples=0, colour=False)
    monkeypatch.setattr(encode, "write_shards", None)
    assert "pairs" in describe_data(str(config), [], samples=1, colour=True)


def test_repeated_rows_are_left_out(config):
    found = describe_data(str(config), ["data.deduplicate=true"], samples=0, colour=False)
    assert found.splitlines()[1].split()[:4] == ["pairs", "train", "9", "9"]
    assert "itself" not in found


def test_a_mixture_has_a_line_per_source_and_general_rows_have_one(config, tmp_path):
    content = config.read_text().replace(
        f'source: "jsonl:{tmp_path}/pairs", kind: pairs',
        f'mix_by: rows, mix: [{{source: "jsonl:{tmp_path}/pairs", weight: 3, name: own}}, '
        '{source: "stdlib:unicode_bidi", train: 20, weight: 1}]',
    )
    config.write_text(
        content.replace("length: 32,", f'length: 32, general: {{source: "text:{tmp_path}/news.txt", share: 0.1}},')
    )
    found = describe_data(str(config), [], samples=1, colour=False).splitlines()
    assert found[1].split()[:4] == ["pairs", "train", "32", "32"]
    assert found[2].startswith("- 75.0% of rows: own ")
    assert [line.split()[4:8] for line in found[2:4]] == [
        ["own", "train", "12", "12"],
        ["stdlib:unicode_bidi", "train", "20", "20"],
    ]
    assert any(line.split()[:2] == ["data.general", "train"] for line in found)
    assert any(line.split()[:2] == ["pairs", "train"] and "itself" in line for line in found[7:])
