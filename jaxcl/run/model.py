"""Loads a model: that of a run, or a checkpoint of another library."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from jaxcl.config import ExperimentConfig
from jaxcl.config.file import validate
from jaxcl.data.images.tokens import see
from jaxcl.data.spec import ImageConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.models.network import Network, Params
from jaxcl.models.vision_config import vision_of
from jaxcl.run.fingerprints import check_tokenizer
from jaxcl.run.folder import RunFolder
from jaxcl.run.images import image_processor
from jaxcl.run.note import note_of
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.weights import load_params, locate, read_config
from jaxcl.weights.finite import refuse_not_finite


class Model(NamedTuple):
    """A loaded model.

    Attributes:
      network: the network.
      params: its params.
      tokenizer: text to ids and back.
      config: the configuration of its run; `None` for a checkpoint of another library.
      chat: whether its run learned conversations.
    """

    network: Network
    params: Params
    tokenizer: Tokenizer
    config: ExperimentConfig | None
    chat: bool = False


def load_model(name: str, *, trust: bool = False) -> Model:
    """Loads a model.

    Args:
      name: a run folder, for its latest checkpoint, or what `jaxcl.weights.locate` accepts: a Hugging Face, GGUF or
        Orbax checkpoint, or `package:NAME`.
      trust: whether the configuration of a run may name code outside jaxcl; see `jaxcl.config.trust`.

    Raises:
      UserError: there is no model, or it cannot be read; a run's tokenizer is not the one that it was trained with.
    """
    folder = RunFolder(Path(name))
    if not folder.is_run:
        _, place = locate(name)
        network = Network.create(read_config(name))
        params, tokenizer = load_params(name, network), Tokenizer.load(place)
        _let_see(tokenizer, network, ImageConfig(), place)
        return Model(network, params, tokenizer, None)
    config = validate(ExperimentConfig, folder.content(trust=trust), str(folder.config_file))
    network = Network.create(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), network.shapes())
    params, saved = latest_params(folder, target)
    tokenizer = Tokenizer.load(folder.tokenizer)
    check_tokenizer(tokenizer, saved, folder.tokenizer)
    _let_see(tokenizer, network, config.data.images, folder.tokenizer)
    results = note_of(saved).results
    return Model(network, params, tokenizer, config, chat=results is not None and "chat" in results.kinds.values())


def _let_see(tokenizer: Tokenizer, network: Network, config: ImageConfig, place: Path) -> None:
    if (vision := vision_of(network.config)) is not None:
        see(tokenizer, image_processor(vision, config, place), vision.image_token_id)


def latest_params(folder: RunFolder, target: Params) -> tuple[Params, Saved]:
    """The params of a run's latest checkpoint, and its note.

    Args:
      folder: the run folder.
      target: their shapes, dtypes and shardings, as `jax.ShapeDtypeStruct`.

    Raises:
      UserError: there is no checkpoint yet, or its params are not finite.
    """
    with Checkpoints.reading(folder.checkpoints) as checkpoints:
        saved = checkpoints.latest()
        if saved is None:
            raise UserError(f"{folder.path}: the run has no checkpoint yet")
        params = checkpoints.params(target, saved)
    refuse_not_finite(params, str(folder.path))
    return params, saved
