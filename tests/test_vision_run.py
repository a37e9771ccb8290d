"""Runs that learn from images, and their models asked about images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.cli import main
from jaxcl.config import parse_config
from jaxcl.data.images.decode import decode
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.reference import Reference
from jaxcl.data.images.tokens import image_index
from jaxcl.data.pairs import encode_prompts
from jaxcl.data.spec import ImageConfig
from jaxcl.errors import UserError
from jaxcl.models.images import Images
from jaxcl.models.vision_config import VisionConfig
from jaxcl.reporting.report import write_report
from jaxcl.run import sequence
from jaxcl.run.images import image_processor
from jaxcl.run.model import load_model
from tests.tiny.batches import batch_of
from tests.tiny.runs import DECODER, numbers
from tests.tiny.vision import COLOURS, VISION, png, write_colours


def content(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    tasks = [
        {"name": name, "source": write_colours(folder / "data", name, 16, question), "image_field": "image", "test": 4}
        for name, question in (("one", "Which colour?"), ("two", "What is it?"))
    ]
    return {
        "output": str(folder / method),
        "model": {**DECODER, "vision": VISION},
        "tokenizer": {"vocab_size": 300},
        "data": {"prompt_length": 64, "answer_length": 8, "buckets": 1, "cache": str(folder / "cache")},
        "tasks": tasks,
        "training": {"batch_size": 4, "epochs": 1, "log_every": 1, "checkpoint_every": 2},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"batch_size": 4, "max_new_tokens": 8},
        "method": {"name": method} | ({"replay": {"fraction": 0.5}} if method == "replay" else {}),
        **changes,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for method in ("sequential", "replay"):
        sequence.run(parse_config(content(folder, method)))
    return {method: folder / method for method in ("sequential", "replay")}


@pytest.mark.parametrize("method", ["sequential", "replay"])
def test_a_run_learns_from_images(runs: dict[str, Path], method: str) -> None:
    losses = [row["loss"] for row in numbers(runs[method]) if "loss" in row]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    network, params, *_ = load_model(str(runs[method]))
    start = network.init(jax.random.key(0))
    for part in ("tower", "connector"):
        old, new = (jax.tree.leaves(tree["vision"][part]) for tree in (start, params))
        assert any(np.any(np.asarray(one) != np.asarray(other)) for one, other in zip(old, new, strict=True))


def test_remembered_examples_keep_their_images(runs: dict[str, Path]) -> None:
    import pyarrow as pa

    table = pa.ipc.open_file(str(runs["replay"] / "memory" / "task00.arrow")).read_all()
    pixels = [np.array(one, np.uint8) for one in table["pixels"].to_pylist()]
    assert {one.shape for one in pixels} == {(8 * 8 * 3,)}
    assert {tuple(one[:3]) for one in pixels} <= set(COLOURS.values())
    assert len({one.tobytes() for one in pixels}) > 1


def test_predictions_name_images(runs: dict[str, Path]) -> None:
    (file,) = sorted((runs["sequential"] / "predictions").glob("*"))[-1:]
    text = file.read_text()
    assert "[image one" in text or "[image two" in text
    assert "iVBOR" not in text  # how PNG files begin, in base 64


def test_the_report_shows_the_images_that_were_asked_about(runs: dict[str, Path]) -> None:
    folder = runs["replay"]
    rows = [json.loads(line) for line in (folder / "predictions" / "after01_task00.jsonl").read_text().splitlines()]
    with np.load(folder / "thumbnails" / "task00.npz") as stored:
        small = {name: decode(stored[name].tobytes(), name) for name in stored.files}
    # Of the test rows with one image each, those of one colour share a picture.
    assert {name for row in rows for name in row["images"]} == small.keys()
    assert all(tuple(small[row["images"][0]][0, 0]) == COLOURS[row["answer"]] for row in rows)
    assert write_report(folder).read_text().count('class="thumbnail"') == 2 * len(rows)


def test_an_answer_depends_on_the_image(runs: dict[str, Path]) -> None:
    model = load_model(str(runs["replay"]))
    prompts = [Reference("", png(colour, 5, 9)).write() + "Which colour? 1" for colour in COLOURS.values()]
    encoded = encode_prompts(prompts, model.tokenizer, model.config.data)
    assert [one.shape for one in encoded.pixels] == len(COLOURS) * [(1, 8, 8, 3)]
    assert len({tuple(row) for row in encoded.ids}) == 1  # the text alone is the same
    tokens = np.array(encoded.ids)
    images = Images(jnp.asarray(np.stack(encoded.pixels)), jnp.asarray(image_index(tokens, VISION["image_token_id"])))
    batch = batch_of(np.ones_like(tokens), tokens, images=images)
    states = jax.jit(model.network.hidden)(model.params, batch).states[:, -1]
    scores = np.asarray(model.network.logits(model.params, states))
    assert min(np.abs(one - other).max() for one, other in itertools.combinations(scores, 2)) > 1e-3


def test_generate_takes_images(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    image = str(tmp_path / "a.png")
    command = ["generate", str(runs["sequential"]), "Which colour? 1", "--max-new-tokens", "4"]
    assert main([*command, "--image", image]) == 0
    assert main([*command, "--image", image, "--image", image]) == 0
    capsys.readouterr()
    assert main([*command, "--image", str(tmp_path / "b.png")]) == 1
    assert "--image: cannot read the image" in capsys.readouterr().err


def test_a_model_that_does_not_see_refuses_images(tmp_path: Path) -> None:
    given = content(tmp_path, "sequential", model=DECODER)
    words = r"task one: scored test row 1: an image, but the model does not see \(model.vision is none\)"
    with pytest.raises(UserError, match=words):
        sequence.run(parse_config(given))


def test_an_image_token_of_another_id_is_refused(tmp_path: Path) -> None:
    given = content(tmp_path, "sequential")
    given["model"] = {**DECODER, "vision": {**VISION, "image_token_id": 9}}
    with pytest.raises(UserError, match="image_token_id is 9; the tokenizer's <image> is 6"):
        sequence.run(parse_config(given))


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = content(tmp_path, "sequential")
    given["data"] |= {"prompt_length": 8}
    words = r"task one: scored test row 1: the prompt has \d+ tokens with its images.*leaves room for 7"
    with pytest.raises(UserError, match=words):
        sequence.run(parse_config(given))


def test_prompts_that_are_scored_are_checked_before_training(tmp_path: Path) -> None:
    given = content(tmp_path, "sequential")
    source = Path(given["tasks"][1]["source"].removeprefix("jsonl:"))
    folder = source.parent / "named"
    folder.mkdir()
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        row["image"] = str(source.parent / row["image"])
    rows[-1]["image"] = [rows[-1]["image"]] * 12
    for split, own in (("train", rows[:12]), ("test", rows[12:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    given["tasks"][1]["source"] = f"jsonl:{folder}"
    given["evaluation"] |= {"batch_size": 3}
    with pytest.raises(UserError, match=r"^task two: scored test row 4: the prompt has \d+ tokens with its images"):
        sequence.run(parse_config(given))
    assert not (tmp_path / "sequential" / "metrics.jsonl").exists()


def test_settings_of_images_are_found_from_the_folder_and_from_a_file_of_the_weights(tmp_path: Path) -> None:
    settings = ImageProcessor(8, 32, True, 4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings.content()))
    (tmp_path / "model.safetensors").touch()
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert image_processor(VisionConfig(**VISION), ImageConfig(), place) == settings
    changed = image_processor(VisionConfig(**VISION), ImageConfig(split=False), tmp_path)
    assert changed == settings._replace(split=False)


def test_rows_with_images_are_not_packed(tmp_path: Path) -> None:
    given = content(tmp_path, "sequential")
    given["data"] |= {"pack_pairs": True}
    with pytest.raises(UserError, match=r"data.pack_pairs: rows with images are not packed"):
        sequence.run(parse_config(given))


SEEKR = {
    "name": "seekr",
    "layer_budget": 2,
    "query_budget": 8,
    "modality_budgets": [1, 1, 0, 1],
    "modality_weights": [1, 1, 2],
    "distil_heads": "rows",
    "replay": {"fraction": 0.25},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", [SEEKR, {"name": "das"}, {"name": "das_paper"}], ids=lambda one: one["name"])
def test_other_methods_learn_from_images(tmp_path: Path, method: dict[str, Any]) -> None:
    given = {**content(tmp_path, "sequential"), "method": method}
    done = sequence.run(parse_config(given))
    assert len(done.results.matrix) == 2
    assert all(np.isfinite(row["loss"]) for row in numbers(tmp_path / "sequential") if "loss" in row)


def test_split_images_and_bytes_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": f"<image>What colour is {number}?",
            "answer": name,
            "picture": {"bytes": png(colour, 8 + 8 * (number % 2), 16), "path": None},
        }
        for number, (name, colour) in enumerate([*COLOURS.items()] * 4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    given = content(tmp_path, "sequential")
    given["tasks"] = [
        {"name": "one", "source": f"parquet:{tmp_path}/rows.parquet", "image_field": "picture", "test": 4}
    ]
    given["data"] |= {"images": {"longest_edge": 16, "split": True}, "prompt_length": 80, "length_multiple": 1}
    done = sequence.run(parse_config(given))
    assert done.results.matrix
    settings = json.loads((tmp_path / "sequential" / "tokenizer" / "preprocessor_config.json").read_text())
    assert settings["do_image_splitting"] is True
    assert settings["size"] == {"longest_edge": 16}
