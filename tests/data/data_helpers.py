"""Shared by the tests of the data layer: a small tokenizer and small texts."""

from __future__ import annotations

import functools
import string

import numpy as np
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


def assert_same_batch(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        if isinstance(left[name], dict):
            assert_same_batch(left[name], right[name])
        elif isinstance(left[name], np.ndarray):
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        else:
            assert left[name] == right[name]


def same_batch(left: dict, right: dict) -> bool:
    return left["tokens"].shape == right["tokens"].shape and bool((left["tokens"] == right["tokens"]).all())
