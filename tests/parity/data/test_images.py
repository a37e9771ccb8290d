"""Tiles of images and the text that they become against the image processors of transformers."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from jaxcl.data.conversations import encode_conversations
from jaxcl.data.images.decode import decode, encode_png
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.reference import Reference
from tests.tiny.chats import SMOLVLM, seeing_tokenizer

SIZES = [(40, 30), (30, 40), (16, 16), (17, 64), (7, 90), (1, 40), (128, 128), (129, 65), (200, 31), (33, 33)]
SETTINGS: list[dict[str, Any]] = [
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 14}, "resample": 3},
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False},
    {"size": {"longest_edge": 20}, "max_image_size": {"longest_edge": 20}},
]


def picture(height: int, width: int) -> np.ndarray:
    """Neither flat nor noise only."""
    rng = np.random.default_rng(height * 1000 + width)
    waves = np.sin(np.arange(height)[:, None, None] / 3) + np.cos(np.arange(width)[None, :, None] / 5)
    return np.clip(90 * waves + 128 + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(size: tuple[int, int], kind: Any, settings: dict[str, Any]) -> None:
    image = picture(*size)
    theirs = kind(**settings)
    found = theirs.preprocess([[Image.fromarray(image)]], return_row_col_info=True)
    tiles = ImageProcessor.read(settings, settings["max_image_size"]["longest_edge"], 4, "x").tiles(image)
    assert [(tiles.rows, tiles.columns)] == list(zip(found["rows"][0], found["cols"][0], strict=True))
    normal = (tiles.pixels / 255 - 0.5) / 0.5
    np.testing.assert_allclose(np.moveaxis(normal, -1, 1), found["pixel_values"][0], atol=1e-6)
    assert np.all(found["pixel_attention_mask"] == 1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_text_of_an_image_is_that_of_transformers(settings: dict[str, Any]) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    theirs = Idefics3Processor(Idefics3ImageProcessorPil(**settings), tokenizer, image_seq_len=4)
    ours = ImageProcessor.read(settings, settings["max_image_size"]["longest_edge"], 4, "x")
    for size in SIZES:
        image = picture(*size)
        inputs = theirs.image_processor.preprocess([[Image.fromarray(image)]], return_row_col_info=True)
        tiles = ours.tiles(image)
        assert ours.text(tiles.rows, tiles.columns) == theirs.replace_image_token(inputs, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK"])
def test_colours_are_those_of_transformers(mode: str) -> None:
    image = Image.fromarray(picture(20, 24)).convert(mode.replace("LA", "L"))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(picture(20, 24)[..., 0]))
    file = io.BytesIO()
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    opened = Image.open(io.BytesIO(file.getvalue()))
    expected = Idefics3ImageProcessorPil().process_image(opened, do_convert_rgb=True)
    np.testing.assert_array_equal(np.moveaxis(decode(file.getvalue(), "x"), -1, 0), expected)


@pytest.mark.parametrize("split", [False, True])
def test_a_conversation_has_the_tokens_and_pixels_of_transformers(split: bool) -> None:
    ours = ImageProcessor(tile=16, longest_edge=32, split=split, image_tokens=4)
    tokenizer = seeing_tokenizer(ours)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, pad_token="<pad>", eos_token="<end_of_utterance>", chat_template=SMOLVLM
    )
    settings = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": split}
    theirs = Idefics3Processor(Idefics3ImageProcessorPil(**settings), wrapped, image_seq_len=4, chat_template=SMOLVLM)
    images = [picture(20, 30), picture(40, 9)]
    references = [Reference("", encode_png(image, "x")).write() for image in images]
    parts = [
        [{"type": "image"}, {"type": "text", "text": "And"}, {"type": "image"}],
        [{"type": "text", "text": "Yes."}],
    ]
    messages = [{"role": role, "content": part} for role, part in zip(("user", "assistant"), parts, strict=True)]
    text = theirs.apply_chat_template(messages)
    found = theirs(text=text, images=[[Image.fromarray(image) for image in images]])
    given: list[Any] = [
        {"role": "user", "content": f"{references[0]}And{references[1]}"},
        {"role": "assistant", "content": "Yes."},
    ]
    encoded = encode_conversations([given], tokenizer, length=500, learn="all", where=lambda _: "x")
    assert encoded.ids[0] == list(found["input_ids"][0])
    pixels = (encoded.pixels[0] / 255 - 0.5) / 0.5
    np.testing.assert_allclose(np.moveaxis(pixels, -1, 1), found["pixel_values"][0], atol=1e-6)
