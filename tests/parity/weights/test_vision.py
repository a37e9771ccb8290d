"""SmolVLM and Idefics3 against transformers: logits with no, one, several and split images, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.images import Images
from jaxcl.models.lora import LoraConfig
from jaxcl.models.network import Network
from jaxcl.weights import load_peft, load_weights, read_lora, save_hf, save_peft
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.networks import random_params
from tests.tiny.vision import IMAGE_TOKEN, content

TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}
PAD, LENGTH = 1, 40


def torch_model(name: str) -> Any:
    """Random in every parameter: biases and norms too, which transformers starts at constants."""
    torch.manual_seed(0)
    keys = dict(content(name))
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=["smolvlm", "idefics3", "smolvlm-old-style"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network, Any]:
    """transformers' model, and jaxcl's network and params from its file, with the keys as they were given."""
    folder = tmp_path_factory.mktemp("models") / "model"
    model = torch_model(request.param)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content(request.param)))
    return (model, *load_weights(folder))


def rows(images: list[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows with the given numbers of images, and which positions are not padding."""
    rng = np.random.default_rng(0)
    found = []
    for count in images:
        row = rng.integers(6, 50, size=3).tolist()
        for _ in range(count):
            row += [IMAGE_TOKEN] * tokens + rng.integers(6, 50, size=2).tolist()
        found.append(row)
    real = np.array([[place < len(row) for place in range(LENGTH)] for row in found])
    return np.array([row + [PAD] * (LENGTH - len(row)) for row in found], np.int32), real


def pixels_of(images: list[int], side: int) -> np.ndarray:
    """Random images; frames that fill up a row are zero, as transformers has them."""
    rng = np.random.default_rng(1)
    count = max(1, *images)
    pixels = rng.normal(size=(len(images), count, side, side, 3)).astype(np.float32)
    for row, own in enumerate(images):
        pixels[row, own:] = 0.0
    return pixels


def index_of(rows: np.ndarray) -> np.ndarray:
    is_image = rows == IMAGE_TOKEN
    return np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32)


def batch(rows: np.ndarray, real: np.ndarray, images: Images | None) -> Batch:
    positions = jnp.broadcast_to(jnp.arange(LENGTH), rows.shape)
    none = jnp.zeros(len(rows), jnp.int32)
    return Batch(
        tokens=jnp.asarray(rows),
        segments=jnp.asarray(real.astype(np.int32)),
        positions=positions,
        predict=None,
        targets=jnp.asarray(rows),
        weights=jnp.ones(rows.shape),
        task=none,
        example=none,
        images=images,
    )


def ours(network: Network, params: Any, given: Batch) -> np.ndarray:
    states = jax.jit(lambda params, given: network.hidden(params, given).states)(params, given)
    return np.asarray(network.logits(params, states))


def theirs(model: Any, tokens: np.ndarray, real: np.ndarray, **images: Any) -> np.ndarray:
    with torch.no_grad():
        inputs = torch.tensor(tokens.astype(np.int64)), torch.tensor(real.astype(np.int64))
        return model(input_ids=inputs[0], attention_mask=inputs[1], **images).logits.numpy()


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(pixels, -1, 2))


@pytest.mark.parametrize("images", [[1], [2, 0, 1], [0, 3], [5, 4]])
def test_logits_are_those_of_transformers(both: Any, images: list[int]) -> None:
    model, network, params = both
    vision = network.config.vision
    tokens, real = rows(images, vision.image_tokens)
    pixels = pixels_of(images, vision.image_size)
    expected = theirs(model, tokens, real, pixel_values=channels_first(pixels))
    found = ours(network, params, batch(tokens, real, Images(jnp.asarray(pixels), jnp.asarray(index_of(tokens)))))
    assert np.std(expected[real]) > 0.05
    np.testing.assert_allclose(found[real], expected[real], **TOLERANCE)
    blind = ours(network, params, batch(tokens, real, None))
    assert np.abs(blind - found)[real].max() > 1e-2  # what the images show matters


def test_logits_without_images_are_those_of_transformers(both: Any) -> None:
    model, network, params = both
    tokens, real = rows([0, 0], 4)
    found = ours(network, params, batch(tokens, real, None))
    np.testing.assert_allclose(found[real], theirs(model, tokens, real)[real], **TOLERANCE)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_images_of_other_sizes_and_padded_ones(both: Any, scale: float) -> None:
    model, network, params = both
    vision = network.config.vision
    side = int(vision.image_size * scale)
    count = (side // vision.patch_size // vision.shuffle) ** 2
    images = [1, 2]
    tokens, real = rows(images, count)
    pixels, mask = pixels_of(images, side), np.ones((2, 2, side, side), bool)
    # Part of a patch is enough to see it.
    for row, image, height, width in ((0, 0, side - vision.patch_size - 3, side), (1, 1, side, side // 2 + 1)):
        mask[row, image, height:] = False
        mask[row, image, :, width:] = False
        pixels[row, image][~mask[row, image]] = 0.0
    given = {"pixel_values": channels_first(pixels), "pixel_attention_mask": torch.tensor(mask)}
    expected = theirs(model, tokens, real, **given)
    whole = side // vision.patch_size * vision.patch_size
    cut = mask[:, :, :whole, :whole]
    patches = cut.reshape(2, 2, side // vision.patch_size, vision.patch_size, side // vision.patch_size, -1)
    seen = jnp.asarray(patches.any(axis=(3, 5)))
    placed = Images(jnp.asarray(pixels), jnp.asarray(index_of(tokens)), seen)
    found = ours(network, params, batch(tokens, real, placed))
    np.testing.assert_allclose(found[real], expected[real], **TOLERANCE)
    unmasked = Images(jnp.asarray(pixels), jnp.asarray(index_of(tokens)))
    assert np.abs(ours(network, params, batch(tokens, real, unmasked)) - found)[real].max() > 1e-3


def test_an_export_gives_transformers_the_same_logits(both: Any, tmp_path: Path) -> None:
    model, network, params = both
    save_hf(tmp_path / "model", network, params)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    assert type(again) is type(model)
    images = [2, 1]
    tokens, real = rows(images, network.config.vision.image_tokens)
    pixels = channels_first(pixels_of(images, network.config.vision.image_size))
    expected, found = (theirs(one, tokens, real, pixel_values=pixels) for one in (model, again))
    np.testing.assert_array_equal(found, expected)
    same, leaves = load_weights(tmp_path / "model")
    assert same == network
    jax.tree.map(np.testing.assert_array_equal, leaves, params)


@pytest.mark.filterwarnings("default::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_adapters_of_the_tower_are_read_by_peft_and_merged(both: Any, tmp_path: Path) -> None:
    _, plain, params = both
    # Of the decoder's and the tower's projections of the same name, one of each.
    lora = LoraConfig(
        rank=2, alpha=3.0, targets=("query", "down", "tower_value", "tower_up", "tower_down", "connector")
    )
    network = Network.create(plain.config.model_copy(update={"lora": lora}))
    drawn = random_params(network)
    adapters = {path: leaf for path, leaf in flatten(drawn).items() if "lora" in path}
    own = unflatten(flatten(params) | adapters)
    save_hf(tmp_path / "base", plain, params)
    save_hf(tmp_path / "merged", network, own)
    save_peft(tmp_path / "adapter", network, own, base=str(tmp_path / "base"))
    images = [2, 1]
    tokens, real = rows(images, plain.config.vision.image_tokens)
    pixels = pixels_of(images, plain.config.vision.image_size)
    found = ours(network, own, batch(tokens, real, Images(jnp.asarray(pixels), jnp.asarray(index_of(tokens)))))
    shown = {"pixel_values": channels_first(pixels)}
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(found[real], theirs(merged, tokens, real, **shown)[real], **TOLERANCE)
    # And back.
    read = read_lora(tmp_path / "adapter", plain)
    assert (set(read.targets), read.rank, read.alpha) == (set(lora.targets), 2, 3.0)
    again = flatten(load_peft(tmp_path / "adapter", network))
    assert again.keys() == adapters.keys()
    for path, leaf in adapters.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install --no-deps peft accelerate psutil")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(found[real], theirs(model, tokens, real, **shown)[real], **TOLERANCE)
    loaded = {name for name, _ in model.named_parameters() if "lora" in name}
    assert len(loaded) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_generation_with_images_is_that_of_transformers(both: Any) -> None:
    model, network, params = both
    vision = network.config.vision
    tokens, real = rows([2, 0, 1], vision.image_tokens)
    raw = np.random.default_rng(2).integers(0, 256, (3, 2, vision.image_size, vision.image_size, 3)).astype(np.uint8)
    images = [raw[0], None, raw[2, :1]]
    prompts = [row[own].tolist() for row, own in zip(tokens, real, strict=True)]
    sizes = {"batch_size": 2, "prompt_length": LENGTH, "max_new_tokens": 6}
    found = Generator(network, **sizes, eos_id=None, pad_id=PAD)(params, prompts, images=images)
    for prompt, pixels, new in zip(prompts, images, found, strict=True):
        normal = None if pixels is None else channels_first((pixels[None] / 255 - 0.5).astype(np.float32) / 0.5)
        given = {} if normal is None else {"pixel_values": normal}
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([prompt]), **given, max_new_tokens=6, do_sample=False, eos_token_id=None
            )
        assert new == out[0, len(prompt) :].tolist()
    assert Generator(network, **sizes, eos_id=None, pad_id=PAD)(params, prompts) != found


def test_a_model_without_a_tower_is_asked_about_no_images(both: Any) -> None:
    _, network, params = both
    text = Network.create(network.config.model_copy(update={"vision": None}))
    with pytest.raises(ValueError, match="images: expected a network with vision"):
        Generator(text, batch_size=1, prompt_length=8, max_new_tokens=1, eos_id=None, pad_id=PAD)(
            params, [[7]], images=[np.zeros((1, 8, 8, 3), np.uint8)]
        )
