"""A model writes samples of the task it has just learned, which replace the task's examples in the memory.

Prompts are sampled as continuations of the instruction that all prompts of the task share. They come from the initial
model of the run or from the model before the task, because a model that has learned the task tends to answer at once.
The model that has learned the task answers them greedily, and `jaxcl.data.synthetic` chooses the samples to keep. All
processes write the same samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array

from jaxcl.data.memory import draw_count
from jaxcl.data.pairs import encode_prompts, open_prompts
from jaxcl.data.plan import Shape
from jaxcl.data.synthetic import Frame, Sample, choose_samples, read_body, shared_frame
from jaxcl.errors import UserError
from jaxcl.methods.options import SyntheticConfig
from jaxcl.models.generation import Generator
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components
from jaxcl.run.remembering import mean_losses

logger = logging.getLogger(__name__)


class Writer:
    """The models that write the samples of a task.

    Attributes:
      parts: the parts of the run.
      index: which task.
      opened_by: params of the model that writes prompts.
      learned: params of the model that has learned the task; it answers them.
    """

    def __init__(self, parts: Components, index: int, opened_by: Params, learned: Params) -> None:
        self.parts, self.index, self.opened_by, self.learned = parts, index, opened_by, learned

    def bodies(self, frame: Frame, settings: SyntheticConfig, count: int, key: Array) -> list[str | None]:
        """Bodies of `count` prompts that the model writes after the prefix; `None` where it never came to the suffix.

        Args:
          frame: what all prompts of the task begin and end with.
          settings: `temperature` and `top_p` are used.
          count: how many.
          key: what they are drawn from.
        """
        tokenizer, data = self.parts.tokenizer, self.parts.config.data
        opening = open_prompts([frame.prefix], tokenizer, data)[0]
        prompts = [str(row["prompt"]) for row in self.parts.tasks[self.index].train]
        longest = max(len(ids) for ids in encode_prompts(prompts, tokenizer, data).ids)
        # Room to reach the suffix; samples too long for the run's shapes are dropped later.
        room = max(16, min(2 * (longest - len(opening)), data.prompt_length - len(opening)))
        generator = self._generator(len(opening), room)
        texts = generator(self.opened_by, [opening] * count, key, settings.temperature, settings.top_p)
        return [read_body(tokenizer.decode(ids), frame.suffix) for ids in texts]

    def samples(self, frame: Frame, bodies: list[str | None]) -> list[Sample]:
        """The prompts with greedy answers and their likelihood, as many as `bodies`; what does not fit comes last."""
        finished = [body for body in bodies if body is not None]
        tokenizer, data = self.parts.tokenizer, self.parts.config.data
        prompts = [f"{frame.prefix}{body}{frame.suffix}" for body in finished]
        written = self.answers(prompts) if prompts else []
        # If the run does not accept cut answers, an answer without an end is dropped.
        kept = [answer if end or data.on_long_answer == "cut" else [] for answer, end in written]
        answers = [tokenizer.decode(answer).strip() for answer in kept]
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        # Keep what fits the shapes that the run's steps are compiled for.
        sizes = self.parts.encode_written(rows, self.index, "samples").sizes if rows else np.zeros((0, 2))
        fitting = np.flatnonzero(np.all(sizes <= np.array(self._largest[:2]), axis=1)).tolist()
        likelihoods = self.likelihoods([rows[place] for place in fitting])
        samples = [
            Sample(finished[place], answers[place], one, written[place][1])
            for place, one in zip(fitting, likelihoods, strict=True)
        ]
        return samples + [Sample(None, "", -np.inf)] * (len(bodies) - len(samples))

    def answers(self, prompts: list[str]) -> list[tuple[list[int], bool]]:
        """Greedy answers, as token ids, and whether each came to an end by itself."""
        data = self.parts.config.data
        # No longer than the longest answer of the run, without its end token.
        most = max(1, (self._largest.predict or data.answer_length) - 1)
        ids = encode_prompts(prompts, self.parts.tokenizer, data).ids
        found = self._generator(data.prompt_length, most)(self.learned, ids)
        return [(answer, len(answer) < most) for answer in found]

    def likelihoods(self, rows: Sequence[Mapping[str, str]]) -> list[float]:
        """Mean log-probability of each answer's tokens, in nats."""
        if not rows:
            return []
        encoded = self.parts.encode_written(rows, self.index, "samples")
        return (-mean_losses(self.parts, self.learned, self.parts.pipeline([encoded]))).tolist()

    @property
    def _largest(self) -> Shape:
        return (self.parts.shapes or [])[-1]

    def _generator(self, prompt_length: int, max_new_tokens: int) -> Generator:
        parts = self.parts
        return Generator(
            parts.network,
            batch_size=parts.config.evaluation.batch_size,
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens,
            eos_id=parts.tokenizer.end_ids,
            pad_id=parts.tokenizer.pad_id,
            buckets=[prompt_length],
            trace=parts.trainer.compile.trace,
        )


def write_samples(writer: Writer, key: Array) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Samples of a task, at most as many as its memory would have examples.

    Args:
      writer: writes them.
      key: what prompts are drawn from.

    Returns:
      Rows with `prompt` and `answer`, and the number of dropped samples by reason; see `Chosen.dropped`.

    Raises:
      UserError: no sample can be kept.
    """
    replay, task = writer.parts.method.replay, writer.parts.tasks[writer.index]
    if replay is None:
        raise ValueError("write_samples: the method keeps nothing")
    settings = replay.synthetic
    prompts = [str(row["prompt"]) for row in task.train]
    frame = shared_frame(prompts)
    if settings.prefix is not None:
        frame = Frame(settings.prefix, frame.suffix)
    bodies = [prompt[len(frame.prefix) : len(prompt) - len(frame.suffix)] for prompt in prompts]
    wanted = draw_count(len(prompts), replay.fraction, replay.minimum)
    samples = writer.samples(frame, writer.bodies(frame, settings, wanted * settings.candidates, key))
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
