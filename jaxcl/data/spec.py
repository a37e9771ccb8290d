"""Configuration sections of the data: tasks, lengths and batches, tokenizer."""

from __future__ import annotations

import string
from typing import Literal

from pydantic import Field, field_validator, model_validator

from jaxcl.data.formats.find import SCHEMES
from jaxcl.data.formats.storage import is_url
from jaxcl.data.places import place
from jaxcl.schema import Schema

Kind = Literal["pairs", "chat", "text", "labelled"]

#: Named prompt templates; any other template is a string with `{prompt}` exactly once.
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


_SOURCE = (
    "`scheme:rest`: json, jsonl, text, csv, tsv or parquet and a file, folder, glob or URL; tfds:NAME, hf:NAME, "
    "stdlib:NAME or drawn:NAME"
)


def template_names_fields(value: str | None) -> str | None:
    """Checks that a prompt template names at least one field, and does nothing else with fields."""
    if value is not None:
        try:
            parts = [part for part in string.Formatter().parse(value) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"is not a template: {error}") from error
        for _, field, form, conversion in parts:
            if not field or field.isdecimal() or form or conversion:
                written = f"{field}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
                raise ValueError(f"{{{written}}} does not just name a field; a brace of the text is written twice")
        named = [field for _, field, _, _ in parts]
        if not named:
            raise ValueError("must name at least one field of the row, for example {text}")
    return value


class SourceSpec(Schema):
    """Where rows of text come from and what their fields are called."""

    source: str = Field(description=_SOURCE)
    train: int | None = Field(None, ge=1, description="maximal number of training rows used; none: all")
    dev: int | None = Field(None, ge=1, description="maximal number of development rows used; none: all")
    test: int | None = Field(None, ge=1, description="maximal number of test rows used; none: all")
    prompt_field: str = Field("prompt", description="field that holds the prompt")
    answer_field: str = Field("answer", description="field that holds the answer")
    text_field: str = Field("text", description="field that holds the text")
    pair_field: str | None = Field(None, description="field that holds a second text, for labelled rows")
    label_field: str = Field("label", description="field that holds the label")
    image_field: str | None = Field(
        None,
        description="field that holds an image or a list of images (paths from the file's folder, or bytes); they take "
        "the place of <image> in a prompt or conversation, or come before it",
    )
    image_folder: str | None = Field(
        None, description="folder that paths of images start from; none: the folder of the file that names them"
    )
    heldout: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="about the share held out by a hash of each row: for dev and test if the source has no splits, for "
        "test alone if it has others",
    )
    data_dir: str | None = Field(None, description="folder in which tfds: and hf: keep their data; none: their default")

    @field_validator("source")
    @classmethod
    def _source_is_place(cls, value: str) -> str:
        scheme, colon, rest = value.partition(":")
        if is_url(rest):
            if scheme not in SCHEMES:
                raise ValueError(f"a URL needs one of {', '.join(SCHEMES)} before it")
            return value
        files = scheme in SCHEMES
        return f"{scheme}:{place(rest)}" if colon and (files or rest.startswith("~")) else value

    @field_validator("data_dir", "image_folder")
    @classmethod
    def _is_place(cls, value: str | None) -> str | None:
        return value and place(value)


class MixedSource(SourceSpec):
    """One of several sources of a task."""

    name: str | None = Field(None, description="name in tables and messages; none: the source")
    weight: float = Field(description="its weight among the sources of the task, above 0")
    prompt_template: str | None = Field(None, description="as in a task")

    _checked = field_validator("prompt_template")(template_names_fields)


class GeneralSpec(SourceSpec):
    """General text or conversations, a share of which every task is mixed with."""

    share: float = Field(gt=0, lt=1, description="share of the general rows in training")
    by: Literal["tokens", "rows"] = Field("tokens", description="what the share is counted in")
    kind: Kind | None = Field(None, description="as in a task")
    prompt_template: str | None = Field(None, description="as in a task")

    _checked = field_validator("prompt_template")(template_names_fields)


class EndTaskSpec(SourceSpec):
    """A labelled task: copies of the model are fine-tuned on it to measure what they learned from a text domain."""

    name: str | None = Field(None, description="name in results; none: the name of its task")
    metric: str | None = Field(None, description="name of the metric; none: macro_f1")


class TaskSpec(SourceSpec):
    """One task or domain of the sequence."""

    name: str = Field(min_length=1, pattern=r"^[^/\\]+$", description="name in results and file names")
    source: str = Field("", description=f"{_SOURCE}; this or mix")
    mix: tuple[MixedSource, ...] = Field(
        (), description="several sources instead of one, each a section with a weight and fields of its own"
    )
    mix_by: Literal["tokens", "rows"] = Field("tokens", description="what the weights of mix are shares of")
    kind: Kind | None = Field(
        None,
        description="pairs (prompt and answer), chat (conversations), text or labelled; none: inferred from the "
        "source's fields",
    )
    metric: str | None = Field(None, description="name of the metric; none: exact_match for pairs, perplexity for text")
    prompt_template: str | None = Field(
        None,
        description="prompt from fields of the row, for example `{text} Sentiment:`; none: the prompt field",
    )
    end_task: EndTaskSpec | None = Field(
        None, description="labelled task that measures what the model learned from this domain"
    )
    data_gone: bool = Field(
        False,
        description="the data of this learned task is deleted, so it is not scored again (jaxcl extend --data-gone)",
    )

    _checked = field_validator("prompt_template")(template_names_fields)

    @model_validator(mode="after")
    def _one_or_several_sources(self) -> TaskSpec:
        if bool(self.source) == bool(self.mix):
            raise ValueError(f"source: task {self.name} needs either a source or a mix of several")
        own = [*SourceSpec.model_fields, "prompt_template"]
        for name in own if self.mix else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: task {self.name} is a mix, so it belongs into the sections of its sources")
        names = [one.name or one.source for one in self.mix]
        for one, name in zip(self.mix, names, strict=True):
            if one.weight <= 0:
                raise ValueError(f"mix: task {self.name}: the weight of {name} must be above 0, got {one.weight}")
            if names.count(name) > 1:
                raise ValueError(f"mix: task {self.name}: two sources are called {name}; give them names")
        return self


class ImageConfig(Schema):
    """How images become tiles, where the model sees."""

    longest_edge: int | None = Field(
        None,
        ge=1,
        description="pixels that the longer side of an image is resized to; none: as in the weights' "
        "preprocessor_config.json, or else the model's image_size",
    )
    split: bool | None = Field(
        None,
        description="whether an image larger than image_size is split into tiles; none: as in that file, or else false",
    )


class DataConfig(Schema):
    """Lengths, packing, masking and buckets."""

    prompt_length: int = Field(
        256, ge=1, description="maximal number of tokens of a prompt; longer ones are cut on the left"
    )
    answer_length: int = Field(64, ge=1, description="maximal number of tokens of an answer, its end token included")
    length: int = Field(128, ge=8, description="tokens per row of text")
    packing: bool = Field(
        True, description="several passages per row of text; false: one passage per row, cut if too long"
    )
    pack_pairs: bool = Field(
        False,
        description="several pairs or conversations per row in training, as segments that do not see each other; "
        "batch_size then counts such rows",
    )
    general: GeneralSpec | None = Field(
        None,
        description="a share of general text or conversations in the training of every task; it is not remembered and "
        "not scored",
    )
    template: str = Field(
        "plain", description=f"template around a prompt: {', '.join(TEMPLATES)}, or a string that contains {{prompt}}"
    )
    chat_template: str = Field(
        "model",
        description="chat template of conversations: model, the tokenizer's own, or chatml, smollm2, llama2, vicuna",
    )
    learn: Literal["all", "last"] = Field("all", description="answers of a conversation that are learned")
    on_long_answer: Literal["error", "cut"] = Field(
        "error",
        description="what to do with an answer longer than answer_length, or with a conversation too long for a row "
        "although its older turns were left out: stop, or cut and count it",
    )
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens predicted by a masked language model")
    mask_replace: float = Field(0.8, ge=0, le=1, description="share of predicted tokens shown as the mask token")
    mask_random: float = Field(0.1, ge=0, le=1, description="share of predicted tokens shown as a random token")
    images: ImageConfig = Field(ImageConfig(), description="how images become tiles")
    buckets: int = Field(
        4, ge=1, le=16, description="maximal number of row lengths of prompt-answer batches (compiled shapes)"
    )
    bucket_lengths: tuple[int, ...] | Literal["auto"] = Field(
        "auto", description="row lengths of prompt-answer batches; auto: chosen for the least padding on the data"
    )
    length_multiple: int = Field(16, ge=1, description="auto chooses multiples of this")
    deduplicate: bool = Field(
        False,
        description="leave out training rows that repeat an earlier one of their source; case and white space make no "
        "difference",
    )
    cache: str | None = Field(
        None,
        description="folder that keeps encoded rows for later runs; none: jaxcl/data in the user's cache folder, or "
        "$JAXCL_DATA_CACHE",
    )
    prefetch: int = Field(4, ge=1, description="batches prefetched on the host")
    threads: int = Field(1, ge=1, description="threads that prepare batches")

    @field_validator("cache")
    @classmethod
    def _cache_is_place(cls, value: str | None) -> str | None:
        return value and place(value)

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
            raise ValueError("must be increasing lengths of at least 2, for example [64, 128], or auto")
        return value

    @model_validator(mode="after")
    def _shares_fit(self) -> DataConfig:
        if self.mask_replace + self.mask_random > 1:
            raise ValueError("mask_replace + mask_random must not exceed 1")
        return self


class TokenizerConfig(Schema):
    """An existing tokenizer, or one trained on the run's text."""

    path: str | None = Field(
        None, description="folder of a Hugging Face tokenizer, tokenizer.json or a GGUF file; none: train one"
    )
    vocab_size: int = Field(2048, ge=262, description="size of the vocabulary of a trained tokenizer")
    train_rows: int | None = Field(
        None,
        ge=1,
        description="maximal number of training rows per task, and of general rows, that the tokenizer is trained on; "
        "none: all",
    )

    @field_validator("path")
    @classmethod
    def _is_place(cls, value: str | None) -> str | None:
        return value and place(value)
