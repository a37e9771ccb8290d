"""Options of SEEKR, and which of them fit a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from jaxcl.functional.heads import HeadImportance, resolve_budget
from jaxcl.functional.modalities import PartWeights
from jaxcl.methods.options import ReplayOptions
from jaxcl.models.network import ModelConfig
from jaxcl.models.vision_config import vision_of


class SeekrOptions(ReplayOptions):
    """Options of `seekr`.

    Budgets are the paper's for LLaMA-2-7B. What is distilled of heads, and the weights, are what was best in
    `docs/results.md`; the paper has `distil_heads: rows`, `attention_weight: 1000` and `logit_weight: 0.5`.
    """

    distil_on: Literal["memory", "task"] = Field(
        "memory",
        description="rows that are distilled; memory: remembered ones; task: those of the task at hand, by the model "
        "as it was before it: no example is kept",
    )
    importance_examples: int = Field(
        64, gt=0, description="examples of a task that heads are rated on where none is kept (distil_on: task)"
    )
    layer_budget: int | float = Field(24, gt=0, description="layers that are distilled: a number, or a share up to 1.0")
    head_budget: int | float = Field(
        128,
        gt=0,
        description="heads that are distilled, in all layers together: a number, or a share of all heads; "
        "1.0 with layer_budget 1.0 distils all",
    )
    heads_per_layer: int = Field(
        0, ge=0, description="most heads that are distilled in one layer, which spreads them over layers; 0: no limit"
    )
    query_budget: int = Field(100, ge=0, description="query positions of an example that are distilled; 0: all")
    importance: HeadImportance = Field(
        "product_of_sums",
        description="importance of a head over tasks, from sensitivity S and forgettability F; product_of_sums: "
        "sum of S times sum of F (the paper); product_of_shares: the same with each task's F scaled to sum to 1, so "
        "that tasks with short rows do not decide; sum_of_products: sum of S times F (the authors' code); "
        "sensitivity, forgettability: one of them alone; random: heads drawn anew for every task",
    )
    logit_weight: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.75,
        description="a: weight of output distillation, 0.5 in the paper; cross-entropy of remembered rows gets 1 - a. "
        "auto: cross-entropy gets 1, and outputs what keeps their term at `logit_share` of it, from running means",
    )
    logit_share: float = Field(
        1.0,
        gt=0,
        description="with logit_weight auto: the weighted output term over the cross-entropy of its rows",
    )
    logit_limit: float = Field(100.0, gt=0, description="with logit_weight auto: largest weight")
    attention_weight: NonNegativeFloat | Literal["auto"] = Field(
        "auto",
        description="b: weight of attention distillation, 1000 in the paper, for a learning rate of 1e-5; auto: what "
        "keeps the attention term at `attention_share` of the other terms of remembered rows, from running means, "
        "whatever the learning rate",
    )
    attention_share: float = Field(
        1.0, gt=0, description="with attention_weight auto: the weighted attention term over the other terms"
    )
    attention_limit: float = Field(1000.0, gt=0, description="with attention_weight auto: largest weight")
    modality_budgets: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = Field(
        None,
        description="where the model sees: heads that are distilled for each block of attention, by what they matter "
        "there: words on words, words on images, images on words, images on images; head_budget is not used. None: "
        "head_budget, for all blocks together",
    )
    modality_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (1.0, 1.0, 1.0),
        description="where the model sees: weights of the parts of an attention row's divergence: of what goes to "
        "words and to images, of how it is spread within words, and within images; 1, 1, 1 is the divergence itself",
    )
    store_logits: int = Field(512, ge=0, description="number of tokens whose scores are stored per position; 0: all")
    store_drawn: float = Field(
        0.125,
        ge=0,
        lt=1,
        description="share of the stored tokens that is drawn at random; the others are the likeliest. On average the "
        "divergence is then that of all tokens; 0: none are drawn, and tokens that are not stored count as one",
    )
    store_attention: Literal["uint8", "float32"] = Field(
        "uint8",
        description="stored attention rows: roots of the weights in 8 bits, or exact; with distil_heads values: in the "
        "compute dtype, or exact",
    )
    distil_heads: Literal["rows", "values"] = Field(
        "values",
        description="what of a selected head is distilled; rows: its attention weights, a number per token and query "
        "(the paper); values: what they make of the values, `head_dim` numbers per query, by squared distance",
    )


def check_options(options: Any, model: ModelConfig) -> None:
    """Checks that budgets fit the model, and that options fit each other.

    Raises:
      ValueError: one does not.
    """
    sizes = {"layer_budget": model.num_layers, "head_budget": model.num_layers * model.num_heads}
    if options.modality_budgets is not None:
        del sizes["head_budget"]
    budgets = {}
    for name, size in sizes.items():
        try:
            budgets[name] = resolve_budget(getattr(options, name), size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if options.distil_on == "memory":
        options.replay.check()
    if options.distil_heads == "values" and tuple(options.modality_weights) != PartWeights():
        raise ValueError(
            "modality_weights: what is weighted are parts of attention rows; allowed with distil_heads rows"
        )
    if options.heads_per_layer > model.num_heads:
        raise ValueError(f"heads_per_layer: {options.heads_per_layer} is over the model's {model.num_heads}")
    room = budgets["layer_budget"] * (options.heads_per_layer or model.num_heads)
    if (blocks := options.modality_budgets) is not None:
        if vision_of(model) is None:
            raise ValueError("modality_budgets: the model does not see (model.vision is none); allowed is none")
        if not 0 < sum(blocks) <= room:
            raise ValueError(
                f"modality_budgets: together {sum(blocks)}; allowed are 1 to {room}, the heads of "
                f"{budgets['layer_budget']} layers"
            )
    elif budgets["head_budget"] > room:
        raise ValueError(
            f"head_budget: {options.head_budget} is over the {room} heads of {budgets['layer_budget']} layers"
        )
