r"""Progressive prompts: every task learns a soft prompt of its own (Razdaibiedina et al., ICLR 2023, arXiv 2301.12314).

The model stays as it is. Task $k$ trains the vectors $P_k$ and reads its inputs behind all prompts learned so far,
$[P_k, \ldots, P_1, x]$ (section 3); those of earlier tasks are frozen and hand on what they hold. A task is answered
with the prompts it was learned with, so nothing is forgotten, but which task it is must be known. No example is kept. A
prompt starts as the vectors of random words. The paper's optional residual network around a prompt, dropped after
training, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array
from pydantic import Field

from jaxcl.errors import UserError
from jaxcl.functional.soft_masks import masked_optimizer
from jaxcl.methods.base import Method, OptimizerParts, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import ModelConfig, Network
from jaxcl.models.soft_tokens import soft_id
from jaxcl.models.trainable import SOFT_TOKENS


class ProgressivePromptsOptions(MethodOptions):
    """Options of `progressive_prompts`; `model.soft_tokens` says how many vectors there are for all tasks."""

    length: int = Field(10, gt=0, description="soft tokens of each task")


class ProgressivePrompts(Method[ProgressivePromptsOptions]):
    """A soft prompt a task, read before those of earlier tasks; needs `model.soft_tokens`, and prompt-answer tasks.

    Soft tokens `k * length` to `(k + 1) * length` are those of task k.

    State: `task`, the index of the one that learns.
    """

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        if not isinstance(model, LlamaConfig):
            raise ValueError("name: progressive_prompts needs a decoder; the model is an encoder")
        if model.lora is not None:
            raise ValueError("name: progressive_prompts trains soft tokens alone; model.lora must be none")
        if model.soft_tokens < options.length:
            raise ValueError(
                f"length: {options.length} soft tokens a task, and the model has {model.soft_tokens}; "
                "model.soft_tokens must be at least length times the number of tasks"
            )

    def __init__(self, options: ProgressivePromptsOptions, network: Network, num_tasks: int) -> None:
        super().__init__(options, network, num_tasks)
        needed, there = num_tasks * options.length, network.num_soft_tokens
        if there < needed:
            raise UserError(
                f"model.soft_tokens: {there} is too few for {num_tasks} tasks of {options.length}: {needed}"
            )

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        return {"task": jnp.int32(0)}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """Turns to the task's own prompt."""
        return {"task": jnp.int32(task.index)}

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """See `Method.transform`."""
        return masked_optimizer(**parts._asdict(), mask_on="update")

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """Masks of 1 on the prompt of the task at hand, 0 on all others."""
        owner = jnp.arange(len(params[SOFT_TOKENS]["embedding"])) // self.options.length
        own = (owner == state["task"]).astype(jnp.float32)[:, None]
        return {"masks": {SOFT_TOKENS: {"embedding": own}}}

    def prompt_prefix(self, index: int) -> Sequence[int]:
        """The task's own prompt, then those before it, the latest first."""
        length = self.options.length
        return [soft_id(task * length + place) for task in range(index, -1, -1) for place in range(length)]
