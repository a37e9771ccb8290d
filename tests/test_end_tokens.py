"""Every token that ends a text by the model's files ends generation, wherever a model generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxcl.commands.convert import convert
from jaxcl.commands.generate import generate_text
from jaxcl.config import parse_config
from jaxcl.data.synthetic import Frame
from jaxcl.run.components import build
from jaxcl.run.evaluator import Evaluator
from jaxcl.run.folder import RunFolder
from jaxcl.run.synthesis import Writer
from jaxcl.weights import save_hf
from tests.test_synthetic_run import WRITTEN, chain
from tests.tiny.runs import PAIRS

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "raw": True}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    return build(parse_config({**PAIRS, "output": str(folder), "method": WRITTEN}), RunFolder(folder))


@pytest.fixture(scope="module")
def params(parts: Any) -> Any:
    """Answers ` L` to what ends in a colon, then `<sep>`, then `D` for as long as it may."""
    encode = parts.tokenizer.encode
    return chain(parts, [*encode(": L"), parts.tokenizer.sep_id, *encode("D") * 2])


@pytest.mark.parametrize("ends", [True, False])
def test_evaluation_and_synthesis_end_at_each_of_them(parts: Any, params: Any, ends: bool, monkeypatch: Any) -> None:
    eos, sep = parts.tokenizer.eos_id, parts.tokenizer.sep_id
    monkeypatch.setattr(parts.tokenizer, "end_ids", (eos, sep) if ends else (eos,))
    answer = Evaluator(parts)._answer(params, 0, ["What is it:"])[0]
    (sample,) = Writer(parts, 0, params, params).samples(Frame("Say ", ":"), ["dog"])
    if ends:
        assert (answer, sample.answer, sample.ended) == ("L", "L", True)
    else:
        assert answer.startswith("LD")
        assert not sample.ended


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_checkpoints_files_name_them(parts: Any, params: Any, file: str, tmp_path: Path) -> None:
    ends = [parts.tokenizer.eos_id, parts.tokenizer.sep_id]
    ids = {"eos_token_id": ends if file == "config.json" else ends[0]}
    source = save_hf(tmp_path / "model", parts.network, jax.tree.map(jax.numpy.asarray, params), token_ids=ids)
    parts.tokenizer.save(source)
    kept = {"eos_token_id": ends if file == "generation_config.json" else ends[0], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(kept))
    assert generate_text(str(source), "What is it:", **OPTIONS) == "L"
    for format in ("hf", "orbax"):
        target = convert(str(source), tmp_path / format, format, "float32")
        assert json.loads((target / "generation_config.json").read_text()) == kept


def test_ids_of_config_json_survive_orbax(parts: Any, params: Any, tmp_path: Path) -> None:
    ends = [parts.tokenizer.eos_id, parts.tokenizer.sep_id]
    params = jax.tree.map(jax.numpy.asarray, params)
    source = save_hf(tmp_path / "model", parts.network, params, token_ids={"eos_token_id": ends})
    parts.tokenizer.save(source)
    (source / "generation_config.json").unlink()
    convert(str(source), tmp_path / "orbax", "orbax", "float32")
    assert generate_text(str(tmp_path / "orbax"), "What is it:", **OPTIONS) == "L"
    convert(str(tmp_path / "orbax"), tmp_path / "again", "hf", "float32")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == ends
