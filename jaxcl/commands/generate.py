"""`jaxcl generate`: text from a model."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxcl.commands.chat import as_chat
from jaxcl.data.pairs import encode_prompts
from jaxcl.errors import UserError
from jaxcl.models.generation import Generator
from jaxcl.run.model import Model, load_model

_BUCKET = 32  # prompts are padded to a multiple: nearby lengths share a compiled program


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
    ids = [*_prompt_prefix(name, model, task), *_prompt_ids(model, prompt, raw)]
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


def _prompt_prefix(name: str, model: Model, task: str | None) -> Sequence[int]:
    """What the run's method puts before prompts of a task."""
    config = model.config
    if config is None:
        if task is not None:
            raise UserError(f"--task {task}: {name} is not a run", exit_code=2)
        return ()
    tasks = [spec.name for spec in config.tasks]
    if task is not None and task not in tasks:
        raise UserError(f"--task {task}: unknown; allowed: {', '.join(tasks)}", exit_code=2)
    method = config.method.build(model.network, len(tasks))
    if task is None and method.prompt_prefix(0):
        raise UserError(
            f"{name}: {config.method.name} must know the task; give --task, allowed: {', '.join(tasks)}", exit_code=2
        )
    return () if task is None else method.prompt_prefix(tasks.index(task))


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
