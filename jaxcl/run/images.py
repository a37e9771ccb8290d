"""How a run's images become tokens and tiles."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxcl.config import ExperimentConfig
from jaxcl.data.files import parse_json, read_text, write_json
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.tokens import see
from jaxcl.data.spec import ImageConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.models.network import Network
from jaxcl.models.vision_config import VisionConfig
from jaxcl.weights.folder import IMAGE_FILE
from jaxcl.weights.locate import locate


def vision_of(network: Network) -> VisionConfig | None:
    """The tower of a network; `None` if it does not see."""
    return getattr(network.config, "vision", None)


def image_processor(vision: VisionConfig, config: ImageConfig, folder: Path | None) -> ImageProcessor:
    """How images become tiles.

    Args:
      vision: the model's tower.
      config: what the run says about it.
      folder: where the model's `preprocessor_config.json` is, if it has one.

    Raises:
      UserError: the file cannot be used; see `ImageProcessor.read`.
    """
    found = ImageProcessor(vision.image_size, vision.image_size, False, vision.image_tokens)
    file = None if folder is None else folder / IMAGE_FILE
    if file is not None and file.is_file():
        content = parse_json(read_text(file), file)
        found = ImageProcessor.read(content, vision.image_size, vision.image_tokens, str(file))
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    return found._replace(**given)


def run_images(config: ExperimentConfig) -> ImageProcessor | None:
    """How images become tiles in a run; `None` if its model does not see."""
    vision = vision_of(Network.create(config.model))
    weights = None if config.weights is None else locate(config.weights)[1]
    return None if vision is None else image_processor(vision, config.data.images, weights)


def let_see(tokenizer: Tokenizer, network: Network, processor: ImageProcessor, folder: Path) -> None:
    """Lets a run's tokenizer take images, and writes down how, for whoever uses the run's model.

    Args:
      tokenizer: the run's tokenizer.
      network: the model, which sees.
      processor: how images become tiles.
      folder: the folder of the tokenizer.

    Raises:
      UserError: the tokenizer does not fit; see `see`.
    """
    vision = vision_of(network)
    assert vision is not None
    see(tokenizer, processor, vision.image_token_id)
    if jax.process_index() == 0:
        pixels = {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
        write_json(folder / IMAGE_FILE, {**processor.content(), **pixels})
