"""Reads checkpoints into the stacked, sharded params of a network."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding
from jaxtyping import Array
from pydantic import TypeAdapter, ValidationError

from jaxcl.errors import UserError
from jaxcl.models.network import ModelConfig, Network, Params
from jaxcl.models.quantised import scale_path
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights import gguf_config, hf_config
from jaxcl.weights.families import FAMILIES, family_of
from jaxcl.weights.families.smolvlm import PIXEL_KEYS
from jaxcl.weights.fill import Held, read_param, read_quantised
from jaxcl.weights.finite import refuse_not_finite
from jaxcl.weights.folder import GENERATION_FILE, IMAGE_FILE
from jaxcl.weights.gguf_source import Gguf
from jaxcl.weights.locate import ORBAX_CONFIG, Kind, locate
from jaxcl.weights.match import Plan, match
from jaxcl.weights.orbax import Orbax
from jaxcl.weights.source import Safetensors, Source, read_json, same_values
from jaxcl.weights.tables import GGUF_TABLES, Table
from jaxcl.weights.tree import flatten, unflatten

_CONFIG: TypeAdapter[Any] = TypeAdapter(ModelConfig)
_HEAD = "head/kernel"
_log = logging.getLogger(__name__)


def read_config(path: str | os.PathLike[str], **changes: Any) -> ModelConfig:
    """The model configuration of a checkpoint.

    Args:
      path: see `locate`: a Hugging Face, GGUF or Orbax checkpoint, or `package:NAME`.
      **changes: fields that replace those of the checkpoint, such as `max_length` or `num_labels`.

    Returns:
      The configuration of one of the architectures.

    Raises:
      UserError: no readable checkpoint, or a network that jaxcl does not support.
    """
    kind, place = locate(path)
    if kind == "orbax":
        where, fields = str(place / ORBAX_CONFIG), read_json(place / ORBAX_CONFIG)
    elif kind == "gguf":
        with Gguf(place) as file:
            where, fields = file.where, gguf_config.from_gguf(file)
    else:
        config_file = (place if place.is_dir() else place.parent) / "config.json"
        where, content = str(config_file), read_json(config_file)
        fields = hf_config.from_hf(_with_pixels(content, config_file.parent), where)
        # As in transformers, a head of its own in the file counts more than `tie_word_embeddings`.
        if fields.get("tie_embeddings") and "tie_embeddings" not in changes and _has_own_head(place, fields["family"]):
            _log.warning(
                "%s: tie_word_embeddings is true, but the file's lm_head.weight differs from its embedding: not tied",
                where,
            )
            fields["tie_embeddings"] = False
    try:
        config = _CONFIG.validate_python(fields | changes)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][1:])
        raise UserError(f"{where}: {key + ': ' if key else ''}{first['msg']}") from None
    return config


def read_token_ids(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Special token ids in a checkpoint's configuration, by transformers' names (`bos_token_id`, ...)."""
    kind, place = locate(path)
    if kind == "gguf":
        with Gguf(place) as file:
            return gguf_config.token_ids(file)
    folder = place if place.is_dir() else place.parent
    content: dict[str, Any] = {}
    # An Orbax folder has no config.json.
    for name in (GENERATION_FILE, "config.json"):
        if (folder / name).is_file():
            content |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    return {key: content[key] for key in hf_config.TOKEN_IDS if content.get(key) is not None}


def load_params(
    path: str | os.PathLike[str],
    network: Network,
    *,
    dtype: str | None = None,
    shardings: Any = None,
    key: Array | None = None,
    fresh_head: bool = False,
) -> Params:
    """Reads the params of a network.

    Params are filled on their devices layer by layer, so that the host holds at most one layer of one parameter, or the
    embedding. Of tensors that are split over devices, only the parts for this process are read. Kernels that the
    network holds quantised are quantised on the way, layer by layer (of an Orbax folder, kernel by kernel).

    Args:
      path: see `locate`: a Hugging Face, GGUF or Orbax checkpoint, or `package:NAME`.
      network: the network; `Network.create(read_config(path))` for the checkpoint's own.
      dtype: dtype of the params that are not quantised; default: that of the network's configuration.
      shardings: a tree like `network.shapes()` or one `Sharding` for all params; default: the default device.
      key: random key for a classifier, adapters and soft tokens that the checkpoint lacks; without it, these are an
        error. A classifier of the checkpoint that the network lacks is ignored.
      fresh_head: whether `key` also serves for the head that predicts tokens.

    Returns:
      The params.

    Raises:
      UserError: no readable checkpoint; a tensor that is missing, unexpected, of a wrong shape or not finite; a head
        that differs from the embedding in a network whose head is the embedding; pickle files.
    """
    kind, place = locate(path)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype)
        for path, leaf in flatten(network.unquantised.shapes()).items()
    }
    as_held = flatten(network.shapes())
    single = shardings is None or isinstance(shardings, Sharding)
    places = dict.fromkeys(as_held, shardings) if single else flatten(shardings)
    held = Held(as_held, places, network.config.quantise)
    shapes |= {path: jax.ShapeDtypeStruct(shapes[path].shape, "float32") for path in shapes if held.quantises(path)}
    draw = key is not None
    if kind == "orbax":
        with Orbax(place) as saved:
            if _HEAD in saved.shapes and _HEAD not in shapes:
                raise _two_heads(saved.where, _HEAD, "embedding")
            stored = [path for path in shapes if scale_path(path) in saved.shapes and held.quantises(path)]
            shapes |= {name: as_held[name] for path in stored for name in (path, scale_path(path))}
            plan = match(saved, saved.table(shapes), shapes, draw=draw, fresh_head=fresh_head)
            flat: dict[str, Array] = {}
            for path in plan.matches:
                read = saved.restore({path: shapes[path]}, places)
                refuse_not_finite(read, saved.where)
                flat |= held.quantised(path, read[path]) if held.quantises(path) and path not in stored else read
    else:
        with _open(kind, place) as source:
            plan = match(source, _table(kind, network), shapes, draw=draw, fresh_head=fresh_head)
            _check_twins(source, plan)
            # Unstacked params pass through the host as a whole, so they come first, while little memory is used.
            order = sorted(plan.matches, key=lambda path: plan.matches[path].row.stacked)
            flat = {}
            for path in order:
                if held.quantises(path):
                    flat |= read_quantised(source, plan.matches[path], shapes[path], held)
                else:
                    flat[path] = read_param(source, plan.matches[path], shapes[path], places[path])
    if plan.fresh and key is not None:
        flat |= _draw(network, key, {path: shapes[path] for path in plan.fresh}, places)
    return unflatten({path: flat[path] for path in as_held})


def load_weights(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    key: Array | None = None,
    fresh_head: bool = False,
    **changes: Any,
) -> tuple[Network, Params]:
    """A checkpoint's network and params, on the default device; see `read_config` and `load_params`.

    Args:
      path: what `locate` finds.
      dtype: see `load_params`.
      key: see `load_params`.
      fresh_head: see `load_params`.
      **changes: see `read_config`.
    """
    network = Network.create(read_config(path, **changes))
    return network, load_params(path, network, dtype=dtype, key=key, fresh_head=fresh_head)


def _check_twins(source: Source, plan: Plan) -> None:
    for one, other in plan.twins:
        if not same_values(source, one, other):
            raise _two_heads(source.where, other, one)


def _two_heads(where: str, head: str, used: str) -> UserError:
    return UserError(
        f"{where}: the tensor {head} differs from {used}, in whose place the model cannot use it; a decoder can with "
        "model.tie_embeddings=false"
    )


def _with_pixels(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A `config.json` with the keys of the image processor that the model needs."""
    if not isinstance(content.get("vision_config"), dict) or not (folder / IMAGE_FILE).is_file():
        return content
    processor = read_json(folder / IMAGE_FILE)
    own = {key: processor[key] for key in PIXEL_KEYS if key in processor}
    return content | {"vision_config": content["vision_config"] | own}


def _has_own_head(place: Path, family: str) -> bool:
    """Whether a decoder's head differs from its embedding; false if the files cannot be read, which is found later."""
    (names,) = FAMILIES[family].table.twins
    try:
        with Safetensors(place) as source:
            return all(name in source.shapes for name in names) and not same_values(source, *names)
    except UserError:
        return False


def _open(kind: Kind, place: Path) -> Source:
    return Gguf(place) if kind == "gguf" else Safetensors(place)


def _table(kind: Kind, network: Network) -> Table:
    if kind != "gguf":
        return family_of(network.config).table
    if isinstance(network.config, RobertaConfig):
        raise UserError("encoders are read from safetensors only, not from GGUF")
    if network.config.family not in GGUF_TABLES:
        allowed = ", ".join(GGUF_TABLES)
        raise UserError(f"model.family: {network.config.family} is not read from GGUF; allowed are {allowed}")
    return GGUF_TABLES[network.config.family]


def _draw(
    network: Network, key: Array, shapes: dict[str, jax.ShapeDtypeStruct], places: dict[str, Sharding | None]
) -> dict[str, Array]:
    """Randomly initialised values of some params; the others are not computed."""

    def draw(key: Array) -> dict[str, Array]:
        flat = flatten(network.init(key))
        return {path: flat[path].astype(leaf.dtype) for path, leaf in shapes.items()}

    return jax.jit(draw, out_shardings={path: places[path] for path in shapes})(key)
