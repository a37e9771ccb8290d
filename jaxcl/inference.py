"""What is done with a model after training: write text, take it elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxcl.chat import as_chat
from jaxcl.config import ExperimentConfig, find_method
from jaxcl.config_file import read_yaml, validate
from jaxcl.data.pairs import encode_prompts
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.methods.base import Method
from jaxcl.models.generation import Generator
from jaxcl.models.network import Network, Params
from jaxcl.run_folder import RunFolder
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.weights import convert as convert_weights
from jaxcl.weights import load_params, locate, read_config, save_hf, save_orbax, save_peft

_BUCKET = 32  # prompts are padded to a multiple: nearby lengths share a compiled program


class Model(NamedTuple):
    """A model ready to use.

    Attributes:
      network: the network.
      params: its params.
      tokenizer: text to ids and back.
      config: the configuration of the run it comes from, `None` for any other model.
    """

    network: Network
    params: Params
    tokenizer: Tokenizer
    config: ExperimentConfig | None


def load_model(name: str) -> Model:
    """A model by name.

    Args:
      name: a run folder (its latest checkpoint is taken), or what `jaxcl.weights.locate` finds: a Hugging Face, GGUF
        or Orbax checkpoint, or `package:NAME`.

    Raises:
      UserError: no model there, or none that can be read.
    """
    folder = RunFolder(Path(name))
    if not folder.config.is_file():
        _, place = locate(name)
        network = Network.create(read_config(name))
        return Model(network, load_params(name, network), Tokenizer.load(place), None)
    config = validate(ExperimentConfig, read_yaml(folder.config), str(folder.config))
    network = Network.create(config.model)
    with Checkpoints.reading(folder.checkpoints) as checkpoints:
        saved = checkpoints.latest()
        if saved is None:
            raise UserError(f"{name}: the run has no checkpoint yet")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), network.shapes()
        )
        return Model(network, checkpoints.params(target, saved), Tokenizer.load(folder.tokenizer), config)


def generate_text(
    name: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
    task: str | None = None,
) -> str:
    """Lets a model go on from a prompt.

    Args:
      name: see `load_model`.
      prompt: the text to answer.
      max_new_tokens: longest answer, in tokens.
      temperature: 0 takes the likeliest token, higher values are more adventurous.
      top_p: draws among the likeliest tokens of this total probability.
      seed: seed of the draws.
      raw: give the prompt as it is. Otherwise a model of a run gets it as in training, and any other model within its
        own chat template if it has one.
      task: which task of the run the prompt is of; needed where the method must know it.

    Returns:
      The answer, without the prompt.

    Raises:
      UserError: no such model, an encoder, or numbers out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1", exit_code=2)
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} must be >= 0 and --top-p {top_p} in (0, 1]", exit_code=2)
    model = load_model(name)
    if not model.network.causal:
        raise UserError(f"{name}: is an encoder; only decoders write text")
    ids = [*_opening(name, model, task), *_prompt_ids(model, prompt, raw)]
    room = model.network.config.max_length - max_new_tokens
    if len(ids) > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens; with {max_new_tokens} new ones the model's window of "
            f"{model.network.config.max_length} leaves room for {room}"
        )
    generator = Generator(
        model.network,
        batch_size=1,
        prompt_length=-(-len(ids) // _BUCKET) * _BUCKET,
        max_new_tokens=max_new_tokens,
        eos_id=model.tokenizer.eos_id,
        pad_id=model.tokenizer.pad_id,
    )
    (answer,) = generator(model.params, [ids], key=jax.random.key(seed), temperature=temperature, top_p=top_p)
    return model.tokenizer.decode(answer).strip()


def _opening(name: str, model: Model, task: str | None) -> Sequence[int]:
    """What the run's method puts before prompts of a task."""
    config = model.config
    if config is None:
        if task is not None:
            raise UserError(f"--task {task}: {name} is not a run", exit_code=2)
        return ()
    tasks = [spec.name for spec in config.tasks]
    if task is not None and task not in tasks:
        raise UserError(f"--task {task}: unknown; allowed: {', '.join(tasks)}", exit_code=2)
    method = find_method(config.method.name)(config.method.options, model.network, len(tasks))
    if task is None and method.opening(0):
        raise UserError(
            f"{name}: {config.method.name} must know the task; give --task, allowed: {', '.join(tasks)}", exit_code=2
        )
    return () if task is None else method.opening(tasks.index(task))


def _prompt_ids(model: Model, prompt: str, raw: bool) -> list[int]:
    tokenizer = model.tokenizer
    if model.config is not None and not raw:
        return encode_prompts([prompt], tokenizer, model.config.data).ids[0]
    if tokenizer.chat_template is not None and not raw:
        special = {
            role: (tokenizer.backend.id_to_token(number) or "") if number is not None else ""
            for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        }
        return tokenizer.encode(as_chat(tokenizer.chat_template, prompt, **special), specials=True)
    opening = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = opening + tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty", exit_code=2)
    return ids


def convert(source: str, destination: Path, format: str, dtype: str) -> Path:
    """Writes a model as a Hugging Face or Orbax checkpoint, or its adapters alone, with its tokenizer.

    Args:
      source: see `load_model`.
      destination: a folder that does not exist yet.
      format: `hf` (adapters merged into the weights), `orbax` (adapters kept beside them) or `peft` (adapters alone).
      dtype: `float32`, `bfloat16`, or but for `orbax` `float16`.

    Returns:
      The folder.

    Raises:
      UserError: the source cannot be read, or the destination not be written.
    """
    if not RunFolder(Path(source)).config.is_file():

        def write_tokenizer(folder: Path) -> None:
            _, place = locate(source)
            if place.suffix == ".gguf":
                Tokenizer.load(place).save(folder)

        return convert_weights(source, destination, format=format, dtype=dtype, write_tokenizer=write_tokenizer)  # type: ignore[arg-type]
    model = load_model(source)
    ids: dict[str, Any] = {
        "bos_token_id": model.tokenizer.bos_id,
        "eos_token_id": model.tokenizer.eos_id,
        "pad_token_id": model.tokenizer.pad_id,
    }
    tokenizer_folder = RunFolder(Path(source)).tokenizer
    if format == "hf":
        return save_hf(
            destination, model.network, model.params, dtype=dtype, tokenizer_folder=tokenizer_folder, token_ids=ids
        )
    if format == "peft":
        _check_base(model, source)
        base = None if model.config is None else model.config.weights
        return save_peft(
            destination, model.network, model.params, base=base, dtype=dtype, tokenizer_folder=tokenizer_folder
        )
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    return save_orbax(destination, model.network, params, tokenizer_folder=tokenizer_folder)


def _check_base(model: Model, source: str) -> None:
    """Adapters alone mean something only beside the weights that the run started from."""
    if model.config is not None and find_method(model.config.method.name).finish is not Method.finish:
        raise UserError(
            f"{source}: {model.config.method.name} changes the weights beside the adapters, which are nothing without "
            "them; allowed formats are hf, orbax",
            exit_code=2,
        )
