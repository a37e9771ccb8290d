"""A model writes samples of the task it has just learned, which replace the task's examples in the memory.

Prompts are sampled as continuations of the instruction that all prompts of the task share. They come from the initial
model of the run or from the model before the task, because a model that has learned the task tends to answer at once.
The model that has learned the task answers them greedily, and `jaxcl.data.synthetic` chooses the samples to keep. All
processes write the same samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array

from jaxcl.data.memory import draw_count
from jaxcl.data.pairs import encode_prompts, open_prompts
from jaxcl.data.plan import Shape
from jaxcl.data.synthetic import Frame, Sample, choose_samples, read_body, shared_frame
from jaxcl.errors import UserError
from jaxcl.methods.options import SyntheticConfig
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components
from jaxcl.training.feed import place_batch

logger = logging.getLogger(__name__)


def write_samples(
    parts: Components, writer: Params, params: Params, index: int, key: Array
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Samples of a task, at most as many as its memory would have examples.

    Args:
      parts: the parts of the run.
      writer: params of the model that writes the prompts.
      params: params of the model that has learned the task, which answers them.
      index: which task.
      key: random key for the prompts.

    Returns:
      Rows with `prompt` and `answer`, and the number of dropped samples by reason; see `Chosen.dropped`.

    Raises:
      UserError: no sample can be kept.
    """
    replay, task = parts.method.replay, parts.tasks[index]
    if replay is None:
        raise ValueError("write_samples: the method keeps nothing")
    settings = replay.synthetic
    prompts = [str(row["prompt"]) for row in task.train]
    frame = shared_frame(prompts)
    if settings.prefix is not None:
        frame = Frame(settings.prefix, frame.suffix)
    bodies = [prompt[len(frame.prefix) : len(prompt) - len(frame.suffix)] for prompt in prompts]
    wanted = draw_count(len(prompts), replay.fraction, replay.minimum)
    written = _continue(parts, writer, frame, prompts, settings, wanted * settings.candidates, key)
    samples = _answer(parts, params, frame, written, index)
    chosen = choose_samples(samples, bodies, wanted, settings.similarity)
    reasons = ", ".join(f"{number} {reason}" for reason, number in chosen.dropped.items() if number)
    logger.info("task %s: kept %d of %d written samples (%s)", task.name, len(chosen.samples), len(samples), reasons)
    if not chosen.samples:
        raise UserError(
            f"method.replay.source: none of {len(samples)} samples that the model wrote for task {task.name} can be "
            f"kept ({reasons}); raise method.replay.synthetic.candidates"
        )
    rows = [{"prompt": f"{frame.prefix}{one.body}{frame.suffix}", "answer": one.answer} for one in chosen.samples]
    return rows, chosen.dropped


def _continue(
    parts: Components,
    params: Params,
    frame: Frame,
    prompts: list[str],
    settings: SyntheticConfig,
    count: int,
    key: Array,
) -> list[str | None]:
    """Bodies of prompts that the model writes after the prefix; `None` if it did not reach the suffix."""
    tokenizer, data = parts.tokenizer, parts.config.data
    opening = open_prompts([frame.prefix], tokenizer, data)[0]
    longest = max(len(ids) for ids in encode_prompts(prompts, tokenizer, data).ids)
    # Room to reach the suffix; samples too long for the run's shapes are dropped later.
    room = max(16, min(2 * (longest - len(opening)), data.prompt_length - len(opening)))
    generator = _generator(parts, len(opening), room)
    texts = generator(params, [opening] * count, key, settings.temperature, settings.top_p)
    return [read_body(tokenizer.decode(ids), frame.suffix) for ids in texts]


def _answer(parts: Components, params: Params, frame: Frame, bodies: list[str | None], index: int) -> list[Sample]:
    """Samples with greedy answers and their likelihoods under the model."""
    finished = [body for body in bodies if body is not None]
    if not finished:
        return [Sample(None, "", -np.inf)] * len(bodies)
    tokenizer, data = parts.tokenizer, parts.config.data
    prompts = [f"{frame.prefix}{body}{frame.suffix}" for body in finished]
    ids = encode_prompts(prompts, tokenizer, data).ids
    # No longer than the longest answer of the run, without its end token.
    generator = _generator(parts, data.prompt_length, max(1, (_largest(parts).predict or data.answer_length) - 1))
    written = generator(params, ids)
    ended = [len(answer) < generator.max_new_tokens for answer in written]
    # If the run does not accept cut answers, an answer without an end is dropped.
    kept = [answer if end or data.on_long_answer == "cut" else [] for answer, end in zip(written, ended, strict=True)]
    answers = [tokenizer.decode(answer).strip() for answer in kept]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    # Keep what fits the shapes that the run's steps are compiled for.
    sizes = parts.encode_written(rows, index, "samples").sizes
    fitting = np.flatnonzero(np.all(sizes <= np.array(_largest(parts)), axis=1)).tolist()
    likelihoods = _likelihoods(parts, params, [rows[place] for place in fitting], index)
    samples = [
        Sample(finished[place], answers[place], one, ended[place])
        for place, one in zip(fitting, likelihoods, strict=True)
    ]
    return samples + [Sample(None, "", -np.inf)] * (len(bodies) - len(samples))


def _largest(parts: Components) -> Shape:
    return (parts.shapes or [])[-1]


def _likelihoods(parts: Components, params: Params, rows: Sequence[Mapping[str, str]], index: int) -> list[float]:
    """Mean log-probability of the tokens, per answer."""
    if not rows:
        return []
    encoded = parts.encode_written(rows, index, "samples")
    network, chunk = parts.network, parts.method.options.loss_chunk

    def losses(params: Params, batch: Batch) -> Mapping[str, Array]:
        states = network.hidden(params, batch).states
        return {"losses": example_losses(network, params, states, batch, chunk), "example": batch.example}

    compiled = parts.trainer.compile(losses)
    found = np.zeros(len(rows))
    for batch in parts.pipeline([encoded]).once(None, 0, jax.process_index(), jax.process_count()):
        result = compiled(params, place_batch(batch, parts.layout.batch))
        examples = np.asarray(result["example"])
        found[examples[examples >= 0]] = -np.asarray(result["losses"])[examples >= 0]
    return found.tolist()


def _generator(parts: Components, prompt_length: int, max_new_tokens: int) -> Generator:
    return Generator(
        parts.network,
        batch_size=parts.config.evaluation.batch_size,
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        eos_id=parts.tokenizer.eos_id,
        pad_id=parts.tokenizer.pad_id,
        buckets=[prompt_length],
        trace=parts.trainer.compile.trace,
    )
