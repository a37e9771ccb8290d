"""How a run's images become tokens and tiles."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxcl.data.files import parse_json, read_text, write_json
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.tokens import see
from jaxcl.data.spec import ImageConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.models.vision_config import VisionConfig
from jaxcl.weights.folder import IMAGE_FILE


def image_processor(vision: VisionConfig, config: ImageConfig, place: Path | None) -> ImageProcessor:
    """How images become tiles.

    Args:
      vision: the model's tower.
      config: what the run says about it.
      place: the model's folder or file; next to the latter or in the former is its `preprocessor_config.json`, if it
        has one.

    Raises:
      UserError: the file cannot be used; see `ImageProcessor.read`.
    """
    found = ImageProcessor(vision.image_size, vision.image_size, False, vision.image_tokens)
    file = None if place is None else (place if place.is_dir() else place.parent) / IMAGE_FILE
    if file is not None and file.is_file():
        content = parse_json(read_text(file), file)
        found = ImageProcessor.read(content, vision.image_size, vision.image_tokens, str(file))
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    return found._replace(**given)


def let_see(tokenizer: Tokenizer, vision: VisionConfig, processor: ImageProcessor, folder: Path) -> None:
    """Lets a run's tokenizer take images, and writes down how, for whoever uses the run's model.

    Args:
      tokenizer: the run's tokenizer.
      vision: the model's tower.
      processor: how images become tiles.
      folder: the folder of the tokenizer.

    Raises:
      UserError: the tokenizer does not fit; see `see`.
    """
    see(tokenizer, processor, vision.image_token_id)
    if jax.process_index() == 0:
        pixels = {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
        write_json(folder / IMAGE_FILE, {**processor.content(), **pixels})
