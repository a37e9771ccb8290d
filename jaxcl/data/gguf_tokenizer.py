"""Builds the byte-level BPE tokenizer that a GGUF file describes in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxcl.data.files import reason
from jaxcl.data.tokenizer_settings import ChatTemplate
from jaxcl.errors import UserError
from jaxcl.gguf_header import check_header

# GGUF stores the name of the pre-tokenizer, not its rules; the named models were trained with the rules below. There
# are three families: GPT-2's pattern, the same after splitting numbers into digits, and a pattern of their own.
_GPT2 = ("gpt-2", "gpt2", "mpt", "olmo", "phi-2", "roberta-bpe")
_GPT2_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _PATTERN.format(digits="{1,3}"),
    "llama3": _PATTERN.format(digits="{1,3}"),
    "llama-v3": _PATTERN.format(digits="{1,3}"),
    "qwen2": _PATTERN.format(digits=""),
}
# Names by which llama.cpp finds tokens that end a turn, because older files do not give their ids.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "_<EOT>")
# Types of metadata, and what they are called.
_KINDS: dict[str, tuple[Any, str]] = {
    "tokens": (str, "a list of texts"),
    "merges": (str, "a list of texts"),
    "token_type": (int, "a list of numbers"),
    **{
        f"{name}_token_id": (int, "the id of a token")
        for name in ("padding", "bos", "eos", "mask", "cls", "seperator", "eot", "eom")
    },
}
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4


class GgufTokenizer(NamedTuple):
    """The tokenizer in a GGUF file; ids that the file does not give are `None`."""

    backend: tokenizers.Tokenizer
    ids: dict[str, int | None]
    add_bos: bool
    chat_template: ChatTemplate | None
    end_ids: tuple[int, ...]


def read_gguf_tokenizer(path: str | Path) -> GgufTokenizer:
    """Reads the tokenizer of a GGUF file.

    Args:
      path: the file; only byte-level BPE vocabularies (`tokenizer.ggml.model` = `gpt2`) are supported.

    Raises:
      UserError: the file is missing or not GGUF, its tokenizer is not byte-level BPE, or it does not name rules for
        splitting text into words that are known here.
    """
    fields = _metadata(Path(path))
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{path}: tokenizer kind {kind!r} cannot be built from GGUF metadata, only 'gpt2' (byte-level BPE); "
            "set tokenizer.path to the model's Hugging Face tokenizer.json"
        )
    missing = [name for name in ("tokens", "merges") if f"tokenizer.ggml.{name}" not in fields]
    if missing:
        raise UserError(f"{path}: tokenizer.ggml.{missing[0]} is missing from the GGUF metadata")
    for name, (types, words) in _KINDS.items():
        value = fields.get(f"tokenizer.ggml.{name}")
        if value is not None and not _is(value, types):
            raise UserError(f"{path}: tokenizer.ggml.{name}: expected {words}")
    try:
        return _build(fields, path)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: the tokenizer in the GGUF metadata is not usable: {error}") from error


def _is(value: Any, kind: Any) -> bool:
    return all(isinstance(one, kind) for one in value) if isinstance(value, list) else isinstance(value, kind)


def _build(fields: dict[str, Any], path: str | Path) -> GgufTokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    pre_tokenizer = _pre_tokenizer(pre, path)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]],
            # Llama 3's vocabulary has whole words that its merges cannot produce.
            ignore_merges=pre in _PATTERNS and pre != "qwen2",
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    names = {"pad": "padding", "bos": "bos", "eos": "eos", "mask": "mask", "cls": "cls", "sep": "seperator"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", pre in _PATTERNS and pre != "qwen2"))
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    marked = {token: index for index, token in enumerate(tokens) if types[index] in (_CONTROL, _USER_DEFINED)}
    ends += [marked[token] for token in _ENDS if token in marked]
    end_ids = tuple(dict.fromkeys(index for index in ends if index is not None))
    return GgufTokenizer(backend, ids, add_bos, _chat_template(fields), end_ids)


def _chat_template(fields: dict[str, Any]) -> ChatTemplate | None:
    default = fields.get("tokenizer.chat_template")
    named = {name: fields.get(f"tokenizer.chat_template.{name}") for name in fields.get("tokenizer.chat_templates", ())}
    found = {name: text for name, text in {"default": default, **named}.items() if text is not None}
    return found if set(found) - {"default"} else default


def _metadata(path: Path) -> dict[str, Any]:
    import gguf

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except Exception as error:  # the reader has no error type for damaged files
        raise UserError(f"{path} is not a usable GGUF file: {error}") from error


def _pre_tokenizer(name: str, path: str | Path) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _GPT2_SINGLE_DIGITS:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name in _PATTERNS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join(sorted((*_GPT2, *_GPT2_SINGLE_DIGITS, *_PATTERNS)))
    if name == "default":  # what older files mean by it, or by leaving it out, differs from model to model
        raise UserError(
            f"{path}: tokenizer.ggml.pre is missing: it names the rules that split text into words, and with other "
            "rules than the model's its tokens would be wrong; set tokenizer.path to the model's Hugging Face "
            f"tokenizer.json, or write the name into a copy: gguf-new-metadata --pre-tokenizer NAME {path} COPY.gguf "
            f"(known: {known})"
        )
    raise UserError(
        f"{path}: pre-tokenizer {name!r} is not known (known: {known}); "
        "set tokenizer.path to the model's Hugging Face tokenizer.json"
    )
