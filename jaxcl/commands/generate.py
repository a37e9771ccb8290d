"""`jaxcl generate`: generates text with a model."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax

from jaxcl.commands.chat import as_chat
from jaxcl.data.chat_rows import encode_openings
from jaxcl.data.images.reference import read_image
from jaxcl.data.images.seen import look
from jaxcl.data.images.tokens import encode_seen
from jaxcl.data.pairs import EncodedPrompts, encode_prompts
from jaxcl.data.spec import DataConfig
from jaxcl.errors import UserError
from jaxcl.models.generation import Generator
from jaxcl.run.model import Model, load_model

_BUCKET = 32  # prompts are padded to a multiple, so that similar lengths share a compiled program


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
    images: Sequence[str] = (),
    trust: bool = False,
) -> str:
    """Generates an answer to a prompt.

    Args:
      name: see `load_model`.
      prompt: the text to answer.
      max_new_tokens: maximal length of the answer, in tokens.
      temperature: 0 is greedy, higher values are more random.
      top_p: sample from the most likely tokens with this total probability.
      seed: seed of the sampling.
      raw: use the prompt unchanged. Otherwise it is formatted as in training for the model of a run, and with the chat
        template, if there is one, for any other model.
      task: the prompt's task; required by methods that need to know it.
      images: paths of images that the prompt is about; they come before it.
      trust: see `load_model`.

    Returns:
      The answer, without the prompt.

    Raises:
      UserError: no such model, an encoder, or numbers out of range; an image cannot be read, or the model does not see.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1", exit_code=2)
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} must be >= 0 and --top-p {top_p} in (0, 1]", exit_code=2)
    model = load_model(name, trust=trust)
    if not model.network.causal:
        raise UserError(f"{name}: is an encoder; only decoders generate text")
    found = _encoded(model, "".join(read_image(path, "--image", None) for path in images) + prompt, raw)
    ids = [*_prompt_prefix(name, model, task), *found.ids[0]]
    room = model.network.config.max_length - max_new_tokens
    if len(ids) > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens; with {max_new_tokens} new ones, the model's window of "
            f"{model.network.config.max_length} leaves room for {room}"
        )
    generator = Generator(
        model.network,
        batch_size=1,
        prompt_length=-(-len(ids) // _BUCKET) * _BUCKET,
        max_new_tokens=max_new_tokens,
        eos_id=model.tokenizer.end_ids,
        pad_id=model.tokenizer.pad_id,
    )
    (answer,) = generator(
        model.params,
        [ids],
        key=jax.random.key(seed),
        temperature=temperature,
        top_p=top_p,
        images=found.pixels,
    )
    return model.tokenizer.decode(answer).strip()


def _prompt_prefix(name: str, model: Model, task: str | None) -> Sequence[int]:
    """The tokens that the run's method puts before prompts of a task."""
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
            f"{name}: {config.method.name} needs to know the task; give --task, allowed: {', '.join(tasks)}",
            exit_code=2,
        )
    return () if task is None else method.prompt_prefix(tasks.index(task))


def _encoded(model: Model, prompt: str, raw: bool) -> EncodedPrompts:
    """One prompt, with images or without."""
    tokenizer = model.tokenizer
    if model.config is not None and not raw and not model.chat:
        return encode_prompts([prompt], tokenizer, model.config.data)
    if tokenizer.chat_template is not None and not raw:
        if tokenizer.images is not None:  # its template may want messages in parts
            data = DataConfig(prompt_length=model.network.config.max_length)
            messages = json.dumps([{"role": "user", "content": prompt}])
            return encode_openings([messages], tokenizer, data, lambda _: "prompt")
        look([prompt], None, "prompt")  # refuses images
        text = as_chat(tokenizer.chat_template, prompt, tokenizer.special_tokens)
        return EncodedPrompts([tokenizer.encode(text, specials=True)], 0, [None])
    opening = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    seen = look([prompt], tokenizer.images, "prompt")
    ids = opening + encode_seen(seen, tokenizer, continued=False)
    if not ids:
        raise UserError("the prompt is empty", exit_code=2)
    return EncodedPrompts([ids], 0, [seen.pixels])
