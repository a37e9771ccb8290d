"""`jaxcl convert`: writes a model as a checkpoint of another library."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.methods import find_method
from jaxcl.methods.base import Method
from jaxcl.models.quantised import cast
from jaxcl.run.fingerprints import check_weights
from jaxcl.run.folder import RunFolder
from jaxcl.run.model import Model, load_model
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.weights import convert as convert_weights
from jaxcl.weights import locate, save_hf, save_orbax, save_peft


def convert(source: str, destination: Path, format: str, dtype: str, *, trust: bool = False) -> Path:
    """Writes a model as a Hugging Face or Orbax checkpoint, or its adapters alone, with its tokenizer.

    Args:
      source: see `load_model`.
      destination: a folder that does not exist yet.
      format: `hf` (adapters merged into the weights), `orbax` (adapters kept separate) or `peft` (adapters alone).
      dtype: `float32`, `bfloat16` or, except for `orbax`, `float16`.
      trust: see `load_model`.

    Returns:
      The folder.

    Raises:
      UserError: the source cannot be read, or the destination cannot be written.
    """
    if not RunFolder(Path(source)).is_run:

        def write_tokenizer(folder: Path) -> None:
            _, place = locate(source)
            if place.suffix == ".gguf":
                Tokenizer.load(place).save(folder)

        return convert_weights(source, destination, format=format, dtype=dtype, write_tokenizer=write_tokenizer)  # type: ignore[arg-type]
    model = load_model(source, trust=trust)
    ids: dict[str, Any] = {
        "bos_token_id": model.tokenizer.bos_id,
        "eos_token_id": _one_or_list(model.tokenizer.end_ids),
        "pad_token_id": model.tokenizer.pad_id,
    }
    with tempfile.TemporaryDirectory() as folder:
        # Written anew, not copied, so that transformers frames a text as the run did.
        model.tokenizer.frame_texts(masked=not model.network.causal)
        model.tokenizer.save(folder)
        if format == "hf":
            return save_hf(
                destination, model.network, model.params, dtype=dtype, tokenizer_folder=folder, token_ids=ids
            )
        if format == "peft":
            _check_base(model, source)
            base = None if model.config is None else model.config.weights
            return save_peft(destination, model.network, model.params, base=base, dtype=dtype, tokenizer_folder=folder)
        params = cast(model.params, dtype)
        return save_orbax(destination, model.network, params, tokenizer_folder=folder)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _check_base(model: Model, source: str) -> None:
    """Checks that neither the method nor anybody else has changed the weights, to which the adapters belong."""
    if model.config is None:
        return
    if find_method(model.config.method.name).final_params is not Method.final_params:
        raise UserError(
            f"{source}: {model.config.method.name} changes the weights, too, so the adapters alone are useless; "
            "allowed formats are hf, orbax",
            exit_code=2,
        )
    with Checkpoints.reading(RunFolder(Path(source)).checkpoints) as checkpoints:
        saved = checkpoints.latest()
    if saved is not None:
        check_weights(model.config, saved)
