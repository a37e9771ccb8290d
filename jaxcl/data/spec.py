"""Configuration sections of the data: tasks, windows and batches, tokenizer."""

from __future__ import annotations

import string
from typing import Literal

from pydantic import Field, field_validator, model_validator

from jaxcl.schema import Schema

Kind = Literal["pairs", "text", "labelled"]

#: Named prompt templates; any other template is a string that contains `{prompt}` once.
TEMPLATES: dict[str, str] = {
    "plain": "{prompt}",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama2": "[INST] {prompt} [/INST]",
    "vicuna": "USER: {prompt} ASSISTANT:",
}


class SourceSpec(Schema):
    """Where rows of text come from and how their fields are called."""

    source: str = Field(
        description="`scheme:rest`: json:FOLDER, jsonl:FILE_OR_FOLDER, text:FILE, tfds:NAME, hf:NAME or stdlib:NAME"
    )
    train: int | None = Field(None, ge=1, description="most training rows used; none: all")
    dev: int | None = Field(None, ge=1, description="most development rows used; none: all")
    test: int | None = Field(None, ge=1, description="most test rows used; none: all")
    prompt_field: str = Field("prompt", description="field that holds the prompt")
    answer_field: str = Field("answer", description="field that holds the answer")
    text_field: str = Field("text", description="field that holds the text")
    pair_field: str | None = Field(None, description="field that holds a second text, for labelled rows")
    label_field: str = Field("label", description="field that holds the label")
    heldout: float = Field(
        0.05, gt=0, lt=0.5, description="share held out for each of dev and test where the source has no such split"
    )
    data_dir: str | None = Field(None, description="folder in which tfds: and hf: keep their data; none: their own")


class EndTaskSpec(SourceSpec):
    """A labelled task on which copies of the model are fine-tuned to see what a text domain taught it."""

    name: str | None = Field(None, description="name in results; none: the name of the task it belongs to")
    metric: str | None = Field(None, description="metric by name; none: macro_f1")


class TaskSpec(SourceSpec):
    """One task or domain of the sequence."""

    name: str = Field(min_length=1, pattern=r"^[^/\\]+$", description="name in results and file names")
    kind: Kind | None = Field(
        None, description="pairs (prompt and answer), text or labelled; none: told from the source's fields"
    )
    metric: str | None = Field(None, description="metric by name; none: exact_match for pairs, perplexity for text")
    prompt_template: str | None = Field(
        None,
        description="builds the prompt from the row's fields, for example `{text} Sentiment:`; none: the prompt field",
    )
    end_task: EndTaskSpec | None = Field(None, description="labelled task that measures what this domain taught")
    data_gone: bool = Field(
        False,
        description="it was learned and its data is there no more: it is not scored again (jaxcl extend --data-gone)",
    )

    @field_validator("prompt_template")
    @classmethod
    def _template_names_fields(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                named = [field for _, field, _, _ in string.Formatter().parse(value) if field]
            except ValueError as error:
                raise ValueError(f"is not a template: {error}") from error
            if not named:
                raise ValueError("must name at least one field of the row, for example {text}")
        return value


class DataConfig(Schema):
    """Windows, packing, masking and buckets."""

    prompt_length: int = Field(256, ge=1, description="most tokens of a prompt; longer ones lose their left part")
    answer_length: int = Field(64, ge=1, description="most tokens of an answer, its end token included")
    length: int = Field(128, ge=8, description="tokens in a row of text")
    packing: bool = Field(True, description="several passages in a row of text; false: one passage a row, cut")
    template: str = Field(
        "plain", description=f"how a prompt is wrapped: {', '.join(TEMPLATES)}, or a string that contains {{prompt}}"
    )
    on_long_answer: Literal["error", "cut"] = Field(
        "error", description="what to do with an answer over answer_length: stop, or cut and count it"
    )
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens predicted by a masked language model")
    mask_replace: float = Field(0.8, ge=0, le=1, description="share of predicted tokens shown as the mask token")
    mask_random: float = Field(0.1, ge=0, le=1, description="share of predicted tokens shown as a random token")
    buckets: int = Field(4, ge=1, le=16, description="most row lengths of prompt-answer batches (compiled shapes)")
    bucket_lengths: tuple[int, ...] | Literal["auto"] = Field(
        "auto", description="row lengths of prompt-answer batches; auto: chosen from the data for the least padding"
    )
    length_multiple: int = Field(16, ge=1, description="row lengths chosen by auto are multiples of this")
    prefetch: int = Field(4, ge=1, description="batches prepared ahead of the device")
    threads: int = Field(1, ge=1, description="threads that prepare batches")

    @field_validator("template")
    @classmethod
    def _template_holds_prompt(cls, value: str) -> str:
        if value not in TEMPLATES and value.count("{prompt}") != 1:
            raise ValueError(f"must be one of {', '.join(TEMPLATES)} or contain {{prompt}} exactly once")
        return value

    @field_validator("bucket_lengths")
    @classmethod
    def _lengths_rise(cls, value: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if not isinstance(value, str) and (not value or list(value) != sorted(set(value)) or value[0] < 2):
            raise ValueError("must be rising lengths of at least 2, for example [64, 128], or auto")
        return value

    @model_validator(mode="after")
    def _shares_fit(self) -> DataConfig:
        if self.mask_replace + self.mask_random > 1:
            raise ValueError("mask_replace + mask_random must not exceed 1")
        return self


class TokenizerConfig(Schema):
    """A tokenizer that exists, or one trained on the run's own text."""

    path: str | None = Field(
        None, description="folder of a Hugging Face tokenizer, tokenizer.json or a GGUF file; none: train one"
    )
    vocab_size: int = Field(2048, ge=262, description="size of the tokenizer trained when no path is given")
    train_rows: int | None = Field(
        None, ge=1, description="most rows of each task's training set the tokenizer is trained on; none: all"
    )
