"""Text to token ids and back."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxcl.data.files import parse_json, read_text, replacing, write_json
from jaxcl.data.gguf_tokenizer import read_gguf_tokenizer
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.spec import TokenizerConfig
from jaxcl.data.tokenizer_settings import ChatTemplate, read_settings, write_end_ids
from jaxcl.errors import UserError

ROLES = ("pad", "bos", "eos", "mask", "cls", "sep")
#: Special tokens of a trained tokenizer, with ids 0 to 5 in this order.
TRAINED_SPECIALS = tuple(f"<{role}>" for role in ROLES)
# Texts put before a piece to tokenise it as in mid-text; see `Tokenizer._encode_continued`.
_ANCHORS = ("\n", ":", "a", "0", "_")


class Tokenizer:
    """A tokenizer and its special tokens.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      pad_id: id of padding; if the tokenizer has none, that of its end token.
      bos_id: token at the start of a text, or `None`.
      eos_id: token at the end of a text or an answer, or `None`.
      mask_id: token that replaces masked tokens, or `None`.
      cls_id: token at the start of an encoder's row, or `None`.
      sep_id: token at the end of an encoder's row, or `None`.
      add_bos: whether the model expects `bos_id` before every text.
      chat_template: the model's chat template (Jinja), or several by name.
      end_ids: every token that ends a generated text: `eos_id`, and those of the model's configuration.
      special_tokens: texts of special tokens by transformers' names (`bos_token`, ...), as chat templates use them.
      images: how images in texts become tokens and tiles, for a model that sees.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        ids: dict[str, int | None],
        *,
        add_bos: bool,
        chat_template: ChatTemplate | None = None,
        end_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a tokenizer.

        Args:
          backend: what cuts text into tokens.
          ids: ids of the special tokens, by role; `None` or missing: it has none.
          add_bos: texts begin with the `bos` token.
          chat_template: Jinja template that frames a prompt, or several by name, if it has any.
          end_ids: further tokens that end a generated text, besides the `eos` token.
          special_tokens: texts of special tokens by transformers' names; default: those of `ids`.
        """
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.bos_id = ids.get("bos")
        self.eos_id = ids.get("eos")
        self.mask_id = ids.get("mask")
        self.cls_id = ids.get("cls")
        self.sep_id = ids.get("sep")
        pad = ids.get("pad")
        self.pad_id: int = next((i for i in (pad, self.eos_id, self.bos_id) if i is not None), 0)
        self.add_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template
        self.images: ImageProcessor | None = None
        self.end_ids = tuple(dict.fromkeys(i for i in (self.eos_id, *end_ids) if i is not None))
        named = {f"{role}_token": backend.id_to_token(i) for role, i in ids.items() if i is not None}
        self.special_tokens = {key: text for key, text in named.items() if text} | dict(special_tokens or {})

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.

        Args:
          path: a folder with `tokenizer.json` (Hugging Face's layout, or written by `save`), a `tokenizer.json`
            file, or a GGUF file with a byte-level BPE vocabulary.

        Raises:
          UserError: there is no such file, or it is not a usable tokenizer.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            found = read_gguf_tokenizer(path)
            tokenizer = cls(
                found.backend,
                found.ids,
                add_bos=found.add_bos,
                chat_template=found.chat_template,
                end_ids=found.end_ids,
            )
            tokenizer.frame_texts(masked=False)
            return tokenizer
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        if path.is_dir() and not file.exists():
            raise UserError(f"{path} has no tokenizer.json; give a folder with one, a tokenizer.json or a .gguf file")
        text = read_text(file)
        _check_templates(parse_json(text, file), file)
        with _no_panic(file):
            backend = tokenizers.Tokenizer.from_str(text)
        settings = read_settings(folder)
        ids = {role: _special_id(backend, settings.content, role) for role in ROLES}
        with _no_panic(file):
            opening = backend.encode("a", add_special_tokens=True).ids[:1]
        add_bos = bool(settings.content.get("add_bos_token")) or (ids["bos"] is not None and opening == [ids["bos"]])
        return cls(
            backend,
            ids,
            add_bos=add_bos,
            chat_template=settings.chat_template,
            end_ids=settings.end_ids,
            special_tokens=settings.special_tokens,
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()) -> Tokenizer:
        """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer.

        Args:
          texts: the training texts.
          vocab_size: number of ids: 6 special tokens, `specials`, 256 bytes and the learned merges.
          specials: further special tokens, with ids from 6 on.

        Raises:
          UserError: `vocab_size` is too small for bytes and special tokens.
        """
        smallest = 256 + len(TRAINED_SPECIALS) + len(specials)
        if vocab_size < smallest:
            raise UserError(f"tokenizer.vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[*TRAINED_SPECIALS, *specials],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        ids = {role: backend.token_to_id(token) for role, token in zip(ROLES, TRAINED_SPECIALS, strict=True)}
        backend.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>",
            pair="<cls> $A <sep> $B <sep>",
            special_tokens=[("<cls>", ids["cls"]), ("<sep>", ids["sep"])],
        )
        return cls(backend, ids, add_bos=True)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` and `transformers` read.

        The tokens that end a text go to `generation_config.json`, so that `transformers` stops there, too.

        Raises:
          UserError: the folder cannot be written.
        """
        folder = Path(folder)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos}
        settings |= self.special_tokens
        for role in ROLES:
            index = getattr(self, f"{role}_id")
            if index is not None:
                settings[f"{role}_token"] = self.backend.id_to_token(index)
        # `decode` changes no spaces before punctuation; some releases of transformers would.
        settings["clean_up_tokenization_spaces"] = False
        if isinstance(self.chat_template, dict):
            settings["chat_template"] = [{"name": name, "template": t} for name, t in self.chat_template.items()]
        elif self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", settings)
        write_end_ids(folder, self.end_ids, {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id})
        # Last: a folder with this file is taken for a whole tokenizer when a killed run goes on.
        with replacing(folder / "tokenizer.json") as temporary:
            temporary.write_text(self.backend.to_str(pretty=False), encoding="utf-8")

    def frame_texts(self, masked: bool) -> None:
        """Makes `backend` put the special tokens around a text that the model expects, for `transformers`.

        An encoder's text gets those of `frame`; a decoder's text the first ones only, because it is continued.

        Args:
          masked: for an encoder.
        """
        before, after = self.frame(masked)
        after = after if masked else []
        alone, framed = (self.backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        if framed == [*before, *alone, *after]:
            return
        ids = {"before": before, "after": after}
        named = [
            {"id": name, "ids": found, "tokens": [self.backend.id_to_token(i) for i in found]}
            for name, found in ids.items()
            if found
        ]
        start, end = ["before"] * bool(before), ["after"] * bool(after)
        self.backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end], pair=[*start, "$A", *end, "$B", *end], special_tokens=named
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of embeddings a model needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text: never masked, never drawn as a random token."""
        added = self.backend.get_added_tokens_decoder()
        named = (getattr(self, f"{role}_id") for role in ROLES)
        return frozenset(i for i in named if i is not None) | {i for i, token in added.items() if token.special}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, rules and special tokens; equal for tokenizers that encode alike."""
        specials = {role: getattr(self, f"{role}_id") for role in ROLES} | {"add_bos": self.add_bos}
        content = self.backend.to_str(pretty=False) + json.dumps(specials, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check_vocab(self, vocab_size: int) -> None:
        """Checks that a model with `vocab_size` embeddings has one for every id.

        Raises:
          UserError: the tokenizer's largest id has no embedding.
        """
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer does not match the model: its largest id is {self.vocab_size - 1} "
                f"({self.backend.id_to_token(self.vocab_size - 1)!r}), the model's vocab_size is {vocab_size}"
            )

    def frame(self, masked: bool) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text.

        Args:
          masked: for an encoder: `cls` and `sep`; for a decoder: `bos`, if the model expects it, and `eos`.
        """
        if masked:
            before = self.cls_id if self.cls_id is not None else self.bos_id
            after = self.sep_id if self.sep_id is not None else self.eos_id
        else:
            before, after = (self.bos_id if self.add_bos else None), self.eos_id
        return [i for i in (before,) if i is not None], [i for i in (after,) if i is not None]

    @functools.cached_property
    def pair_separator(self) -> list[int]:
        """The special tokens that an encoder expects between two texts (RoBERTa: two `</s>`, BERT: one `[SEP]`)."""
        single = self.backend.encode("a", add_special_tokens=False).ids
        framed = self.backend.encode("a", "a", add_special_tokens=True)
        if [m for m in framed.special_tokens_mask if m]:
            start = framed.ids.index(single[0]) + len(single)
            between = framed.ids[start:]
            stop = next((k for k, mask in enumerate(framed.special_tokens_mask[start:]) if not mask), 0)
            if stop:
                return between[:stop]
        return self.frame(masked=True)[1]

    @functools.cached_property
    def pair_type(self) -> int:
        """The token type of the second of two texts (RoBERTa: 0, like the first; BERT: 1)."""
        framed = self.backend.encode("a", "a", add_special_tokens=True)
        texts = (kind for kind, mask in zip(framed.type_ids, framed.special_tokens_mask, strict=True) if not mask)
        return max(texts, default=0)

    def encode(self, text: str, *, continued: bool = False, specials: bool = False) -> list[int]:
        """Token ids of a text, without special tokens around it; see `encode_batch`."""
        return self.encode_batch([text], continued=continued, specials=specials)[0]

    def encode_batch(self, texts: Sequence[str], *, continued: bool = False, specials: bool = False) -> list[list[int]]:
        """Token ids of texts, without special tokens around them.

        Args:
          texts: the texts.
          continued: tokenise each as in the middle of a longer text. Sentencepiece tokenizers put a space before
            every text, which would be wrong for a piece that follows another.
          specials: map the text of a special token to its id. Keep it off for untrusted text, which could otherwise
            forge the end of a prompt.
        """
        if not continued or self._position_free:
            return self._encode(texts, specials)
        return [self._encode_continued(text, specials) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become the replacement character.

        Args:
          ids: token ids.
          skip_special: leave out special tokens.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _encode(self, texts: Sequence[str], specials: bool) -> list[list[int]]:
        self.backend.encode_special_tokens = not specials
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @functools.cached_property
    def _position_free(self) -> bool:
        """Whether a text has the same tokens at the start of a text as in the middle."""
        alone, anchor, both = self._encode(["a", "\n", "\na"], specials=False)
        return both == anchor + alone

    def _encode_continued(self, text: str, specials: bool) -> list[int]:
        for anchor in _ANCHORS:
            before, both = self._encode([anchor, anchor + text], specials)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode([text], specials)[0]


def prepare_tokenizer(
    config: TokenizerConfig,
    texts: Callable[[], Iterable[str]],
    folder: str | Path,
    *,
    masked: bool = False,
    specials: Sequence[str] = (),
) -> Tokenizer:
    """The run's tokenizer: the configured one, the one already in the run folder, or a newly trained one.

    Args:
      config: the configuration's section.
      texts: returns the texts to train on; called only if a tokenizer has to be trained.
      folder: where a trained tokenizer is saved, and found again when the run is resumed.
      masked: for an encoder; see `Tokenizer.frame_texts`.
      specials: see `Tokenizer.train`.

    Raises:
      UserError: a tokenizer cannot be read, trained or written.
    """
    trained = (Path(folder) / "tokenizer.json").exists()
    if config.path is not None:
        tokenizer = Tokenizer.load(config.path)
    elif trained:
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer = Tokenizer.train(texts(), config.vocab_size, specials)
    tokenizer.frame_texts(masked)
    if config.path is None and not trained:
        tokenizer.save(folder)
    return tokenizer


@contextlib.contextmanager
def _no_panic(file: Path) -> Iterator[None]:
    """Turns what the library raises into an error that names the file; a Rust panic is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{file} is not a usable tokenizer: {error}") from error
        raise


def _check_templates(content: Any, file: Path) -> None:
    """Checks that templates of the post-processor name tokens that they have, without which the library panics."""
    processor = content.get("post_processor") if isinstance(content, dict) else None
    members = processor.get("processors") if isinstance(processor, dict) else None
    for one in [processor, *(members if isinstance(members, list) else [])]:
        if not (isinstance(one, dict) and one.get("type") == "TemplateProcessing"):
            continue
        templates = [template for name in ("single", "pair") if isinstance(template := one.get(name), list)]
        pieces = [piece for piece in itertools.chain(*templates) if isinstance(piece, dict)]
        named = [piece["SpecialToken"] for piece in pieces if isinstance(piece.get("SpecialToken"), dict)]
        known = one.get("special_tokens")
        for token in named:
            if not (isinstance(known, dict) and str(token.get("id")) in known):
                raise UserError(f"{file}: post_processor: a template names the token {token.get('id')}, which it lacks")


_COMMON = {
    "pad": ("<pad>", "[PAD]", "<|padding|>", "<|pad|>"),
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
}


def _special_id(backend: tokenizers.Tokenizer, settings: dict[str, Any], role: str) -> int | None:
    """Id of the token with `role`: as the settings say, or, without any settings, by its usual name."""
    if settings:
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return backend.token_to_id(token) if isinstance(token, str) else None
    return next((i for name in _COMMON[role] if (i := backend.token_to_id(name)) is not None), None)
