"""Texts and tokenizers trained on them."""

from __future__ import annotations

import functools
import string

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from jaxcl.data.tokenizer import Tokenizer

TEXTS = (
    "The task is to classify a sentence as POS if the sentiment is positive or as NEG if it is negative.",
    "Definition: In this task, you are given sentences from movie reviews.",
    "Now complete the following example -\nInput: A terrible movie that some people will find moving .\nOutput: POS",
    "Now complete the following example -\nInput: One of the most exhilarating forms of film .\nOutput: NEG",
    "accident Antonym plan, moving HasA wheel, 12 of 345 reviews (in 1999) were read twice.",
)


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 500)


@functools.cache
def marked_tokenizer() -> Tokenizer:
    """Like `small_tokenizer`, with the marks of the built-in templates."""
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, {"pad": 0, "bos": 1, "eos": 2, "sep": 5}, add_bos=True)


@functools.cache
def spaced_tokenizer() -> Tokenizer:
    """Of the sentencepiece kind: a space is put before every text."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = " ".join(TEXTS).split()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*string.printable, "é"],
        show_progress=False,
    )
    backend.train_from_iterator([" " + word for word in words * 5] + list(TEXTS), trainer)
    return Tokenizer(backend, {"bos": 1, "eos": 2}, add_bos=True)
