r"""Self-distillation fine-tuning: the model that is shown the answer teaches the model that is not.

Shenfeld et al., 2026 (arXiv 2601.19897). The student answers a prompt $x$ itself, $y \sim \pi_\theta(\cdot \mid x)$.
The teacher $\pi_\phi$ is the same model, conditioned on the demonstration as well: it reads prompt and answer, then the
prompt again, $(x, c, x)$, and scores $y$. The loss is the mean over the tokens of $y$, its end token included, of

$$KL(\pi_\phi(\cdot \mid x, c, x, y_{<t}) \,\|\, \pi_\theta(\cdot \mid x, y_{<t})).$$

No gradient flows through the teacher or the draw. $\phi$ starts as the model before the task and follows the student,
$\phi \leftarrow r \theta + (1 - r) \phi$ after each step. A model that does not learn in context teaches nothing. No
example is kept.

The paper derives the divergence in the other direction; its authors say since that all its results came from this one.
In place of a template around the demonstration, the prompt is repeated as it is. A step writes $y$ with a key/value
cache, then runs student and teacher once each, the teacher on rows of twice the length. With `training.accumulate` $y$
is written once more, to count its tokens before the first gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxcl.functional.distillation import full_divergence
from jaxcl.functional.losses import over_positions, scored_states
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.losses import router_terms
from jaxcl.models.batch import Batch
from jaxcl.models.generation import draw_by, write_tokens
from jaxcl.models.images import NO_IMAGE
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import ModelConfig
from jaxcl.models.trainable import overlay, trained


class SdftOptions(MethodOptions):
    """Options of `sdft`."""

    rows: Literal["written", "given"] = Field(
        "written",
        description="answers that are compared; written: those that the student draws at each step; given: the task's "
        "own, which costs no drawing (off policy: a control)",
    )
    teacher_rate: float = Field(
        0.01,
        ge=0,
        le=1,
        description="r: how far the teacher's params move towards the student's after each step; 0: the model before "
        "the task teaches it all",
    )
    temperature: float = Field(1.0, gt=0, description="divides the scores that written answers are drawn by")


class Sdft(Method[SdftOptions]):
    """Distils the model that sees the answer into the model that does not; for decoders, and prompt-answer tasks.

    A row's last target counts as its end token. Of an answer that was cut (`data.on_long_answer`) it is a word, at
    which the written one ends, too. General rows are learned as by plain training.

    State: `teacher`, the trained params of the teacher, float32.
    """

    copies = 2

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        if not isinstance(model, LlamaConfig):
            raise ValueError("name: sdft needs a decoder, which writes answers; the model is an encoder")
        if options.loss_gate != "none":
            raise ValueError("loss_gate: sdft compares distributions and has no loss of a token; allowed: none")

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        return {"teacher": _in_float32(trained(params))}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """The model before the task becomes the teacher."""
        return self.init(params)

    def track(self, params: Params, state: State, before: Params, gradient: Params, means: Any) -> State:
        """The teacher follows."""
        rate = self.options.teacher_rate
        if rate == 0:
            return state
        follow = jax.tree.map(lambda own, kept: rate * own + (1 - rate) * kept, params, state["teacher"])
        return {"teacher": follow}

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """The divergence from the teacher.

        Raises:
          ValueError: rows without places to score (`batch.predict`), which have no prompts.
        """
        if batch.origin != "task":
            return super().loss(params, state, batch, key)
        if batch.predict is None:
            raise ValueError("batch.predict: sdft expected rows of a prompt and an answer, got text")
        dropout_key, draw_key = jax.random.split(key)
        kept = jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), state["teacher"], trained(params))
        teacher = jax.lax.stop_gradient(overlay(params, kept))
        answers, weights = self.answers(params, batch, draw_key)
        asked, shown = (_answered(_prompts(batch, show), answers, weights) for show in (False, True))
        hidden = self.network.hidden(params, asked, dropout_key=dropout_key)
        known = self.network.hidden(teacher, shown)

        def divergences(states: tuple[Array, Array]) -> Array:
            scores = jax.nn.log_softmax(self.network.logits(teacher, states[1]), axis=-1)
            return full_divergence(scores, self.network.logits(params, states[0]))

        states = scored_states(hidden.states, asked.predict), scored_states(known.states, shown.predict)
        total = jnp.sum(over_positions(divergences, states, self.options.loss_chunk) * asked.weights)
        return {"loss": Term(total, jnp.sum(asked.weights)), **router_terms(self.network, hidden, asked)}

    def answers(
        self, params: Params, batch: Batch, key: Array
    ) -> tuple[Int[Array, "batch predict"], Float[Array, "batch predict"]]:
        """The answers that are compared, no longer than the batch's longest, and 1 for each of their tokens.

        Args:
          params: the student's.
          batch: rows of a prompt and an answer.
          key: to draw from; what a row draws depends on no other.
        """
        if self.options.rows == "given":
            return batch.targets, batch.weights
        prompts = _prompts(batch, show=False)
        last = jnp.sum(batch.weights > 0, axis=1, keepdims=True) - 1
        ends = jnp.take_along_axis(batch.targets, jnp.maximum(last, 0), axis=1)
        written, lengths = write_tokens(
            self.network,
            jax.lax.stop_gradient(params),
            prompts.tokens,
            jnp.sum(prompts.segments, axis=1),
            draw_by(batch.keys(key), self.options.temperature),
            most=batch.targets.shape[1],
            ends=[ends[:, 0]],
            pad_id=0,
            images=prompts.images,
        )
        place, lengths = jnp.arange(written.shape[1]), lengths[:, None]
        weights = (place <= lengths) & (last >= 0)
        return jnp.where(place < lengths, written, ends), weights.astype(jnp.float32)


def _prompts(batch: Batch, show: bool) -> Batch:
    """The prompts of rows of a prompt and an answer, padded on the left; to `show` puts each behind its own row."""
    assert batch.predict is not None
    prompt = jnp.where(batch.weights[:, :1] > 0, batch.predict[:, :1] + 1, 0)
    row = jnp.sum(batch.segments, axis=1, keepdims=True) if show else jnp.zeros_like(prompt)
    width = batch.tokens.shape[1] * (1 + show)
    place = jnp.arange(width) - (width - row - prompt)
    source = jnp.maximum(jnp.where(place < row, place, place - row), 0)

    def taken(array: Array, padding: int) -> Array:
        return jnp.where(place >= 0, jnp.take_along_axis(array, source, axis=1), padding)

    images = batch.images
    return dataclasses.replace(
        batch,
        tokens=taken(batch.tokens, 0),
        segments=(place >= 0).astype(jnp.int32),
        positions=jnp.maximum(place, 0),
        images=None if images is None else dataclasses.replace(images, index=taken(images.index, NO_IMAGE)),
    )


def _answered(prompts: Batch, answers: Int[Array, "batch predict"], weights: Float[Array, "batch predict"]) -> Batch:
    """Rows of left-padded prompts with `answers` behind them, which alone are scored, where their weights are not 0."""
    # The fast kernel of GPUs takes rows of even length.
    even = ((0, 0), (0, answers.shape[1] % 2))
    answers, weights = jnp.pad(answers, even), jnp.pad(weights, even)
    width, count = prompts.tokens.shape[1], answers.shape[1]
    behind = jnp.sum(prompts.segments, axis=1, keepdims=True) + jnp.arange(count)
    images = prompts.images
    if images is not None:
        index = jnp.pad(images.index, ((0, 0), (0, count)), constant_values=NO_IMAGE)
        images = dataclasses.replace(images, index=index)
    return dataclasses.replace(
        prompts,
        tokens=jnp.concatenate([prompts.tokens, answers], axis=1),
        segments=jnp.concatenate([prompts.segments, (weights > 0).astype(jnp.int32)], axis=1),
        positions=jnp.concatenate([prompts.positions, behind], axis=1),
        predict=jnp.broadcast_to(jnp.arange(count) + width - 1, answers.shape),
        targets=answers,
        weights=weights,
        images=images,
        packed=True,  # padding comes first
    )


def _in_float32(params: Params) -> Params:
    """In bfloat16, steps of a hundredth would be rounded away."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
