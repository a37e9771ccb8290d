"""Likelihoods and texts that `lm-eval` asks for, against sums of log-softmax and a loop over single tokens."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.evaluation import harness
from jaxcl.evaluation.harness import HarnessModel
from jaxcl.models.batch import Batch
from tests.tiny.networks import plain_params, tiny_llama, tiny_roberta

TOKENIZER = Tokenizer.train(
    ["the cat sat on the mat, and the dog sat on the log", "Question: is it so? Answer: yes"] * 3, 300
)
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24}
NETWORK = tiny_llama(**SIZES, max_length=40, tie_embeddings=False)
PARAMS = plain_params(NETWORK, 0)
WIDTH = 64
PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on ", "the mat"),
    ("Question: is it so? Answer:", " yes"),
    ("Question: is it so? Answer:", " no, it is not so at all"),
    ("", "the dog"),
    ("  ", "the dog"),
    ("a" * 3, "b"),
    ("x y z " * 30, "the log"),  # longer than the window
    ("the dog", ""),
]


@dataclasses.dataclass
class Request:
    args: tuple[Any, ...]


def requests(rows: list[Any]) -> list[Request]:
    return [Request(tuple(row)) for row in rows]


def model(**options: Any) -> HarnessModel:
    return HarnessModel(NETWORK, PARAMS, TOKENIZER, **options)


@functools.cache
def forward() -> Any:
    return jax.jit(lambda params, batch: NETWORK.logits(params, NETWORK.hidden(params, batch).states))


def log_probs(ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token at each position, in a row without padding: what follows is not seen."""
    row = np.full((1, WIDTH), 7, np.int32)
    row[0, : len(ids)] = ids
    ones, positions = np.ones_like(row), np.arange(WIDTH, dtype=np.int32)[None]
    zero = np.zeros(1, np.int32)
    batch: Any = Batch(row, ones, positions, None, row, ones.astype(np.float32), zero, zero)
    logits = np.asarray(forward()(PARAMS, batch)[0, : len(ids)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(context: str, continuation: str) -> tuple[float, bool]:
    """Tokens of the whole text, cut where those of the context end."""
    stripped = context.rstrip()
    before = [TOKENIZER.bos_id, *TOKENIZER.encode(stripped)]
    whole = [TOKENIZER.bos_id, *TOKENIZER.encode(context + continuation)]
    after = whole[len(before) :]
    ids = [*before, *after][-41:]
    given = log_probs(ids[:-1])[len(ids) - 1 - len(after) :]
    nats = sum(row[token] for row, token in zip(given, after, strict=True))
    return float(nats), all(row.argmax() == token for row, token in zip(given, after, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_likelihood_is_the_sum_of_log_softmax_whatever_shares_the_batch(batch_size: int) -> None:
    expected = [by_hand(*pair) for pair in PAIRS]
    order = np.random.default_rng(batch_size).permutation(len(PAIRS))
    found = model(batch_size=batch_size).loglikelihood(requests([PAIRS[index] for index in order]))
    for index, (nats, greedy) in zip(order, found, strict=True):
        assert nats == pytest.approx(expected[index][0], rel=1e-5, abs=1e-6), PAIRS[index]
        assert greedy is expected[index][1]
    assert len({round(nats, 3) for nats, _ in found}) > 5


def test_white_space_belongs_to_the_continuation() -> None:
    together, apart = model().loglikelihood(requests(PAIRS[:2]))
    assert together == apart


def test_few_shapes_compile() -> None:
    harness._program.cache_clear()
    texts = ["the cat sat on " * size for size in range(1, 9)]
    model(batch_size=2).loglikelihood(requests([(text, "the mat") for text in texts]))
    program: Any = harness._program(NETWORK)
    assert program._cache_size() <= 4
    model(batch_size=2).loglikelihood(requests([(text, "the mat") for text in texts]))
    assert program._cache_size() <= 4


def test_greedy_continuations_are_known_as_such() -> None:
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("the cat")]
    written: list[int] = []
    for _ in range(4):
        written.append(int(log_probs(ids + written)[-1].argmax()))
    found = model().score(
        [harness.Scoring(ids + written, 4), harness.Scoring([*ids, *written[:-1], (written[-1] + 1) % 300], 4)]
    )
    assert [likelihood.greedy for likelihood in found] == [True, False]


@pytest.mark.parametrize("length", [4, 5, 11, 40])
def test_rolling_likelihood_scores_each_token_once_with_the_longest_context(length: int) -> None:
    texts = ["the dog sat on the log, and the cat sat", "", "yes"]
    expected = []
    for text in texts:
        tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
        nats = 0.0
        for place in range(1, len(tokens)):
            # Full windows stand side by side; the last one reaches back to be as long as they are.
            last = (len(tokens) - 1 - 1) // length
            window = (place - 1) // length
            start = window * length if window < last else max(0, len(tokens) - 1 - length)
            nats += log_probs(tokens[start:place])[-1][tokens[place]]
        expected.append(nats)
    assert len(TOKENIZER.encode(texts[0])) == 11
    found = model(max_length=length).loglikelihood_rolling(requests([(text,) for text in texts]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1] == 0.0


def written_by_hand(context: str, count: int) -> list[int]:
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(context)][-(40 - count) :]
    written: list[int] = []
    while len(written) < count:
        token = int(log_probs(ids + written)[-1].argmax())
        if token == TOKENIZER.eos_id:
            break
        written.append(token)
    return written


def test_texts_are_greedy_and_end_at_a_stop() -> None:
    contexts = ["the cat", "Question: is it so? Answer:", "the dog sat on the log " * 9]
    ids = [written_by_hand(context, 8) for context in contexts]
    whole = [TOKENIZER.decode(tokens) for tokens in ids]
    assert model().generate_until(requests([(text, {"max_gen_toks": 8}) for text in contexts])) == whole
    # One stop that is a token, one that is part of the text somewhere else.
    at, stop = next(
        (at, token)
        for at, token in enumerate(ids[0])
        if TOKENIZER.encode(TOKENIZER.decode([token]), continued=True) == [token]
    )
    part = whole[1][2:5]
    asked = [
        (contexts[0], {"until": [TOKENIZER.decode([stop])], "max_gen_toks": 8}),
        (contexts[1], {"until": part, "max_gen_toks": 8}),
    ]
    writer = model(batch_size=2)
    first, second = writer.generate_until(requests(asked))
    assert first == TOKENIZER.decode(ids[0][:at])
    assert second == whole[1][: whole[1].index(part)]
    assert {ends for _, ends in writer._generators} == {tuple(sorted((TOKENIZER.eos_id, stop))), (TOKENIZER.eos_id,)}


def test_texts_end_at_every_end_token() -> None:
    written = written_by_hand("the cat", 8)
    ids = {"bos": TOKENIZER.bos_id, "eos": TOKENIZER.eos_id}
    several = Tokenizer(TOKENIZER.backend, ids, add_bos=True, end_ids=[written[2]])
    harness = HarnessModel(NETWORK, PARAMS, several, max_length=40)
    at = written.index(written[2])
    assert harness.generate_until(requests([("the cat", {"max_gen_toks": 8})])) == [TOKENIZER.decode(written[:at])]


def test_sampling_follows_the_seed() -> None:
    asked = requests([("the cat", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12})])
    writer = model(seed=3)
    first, again = writer.generate_until(asked), writer.generate_until(asked)
    writer.seed = 4
    assert first == again != writer.generate_until(asked)


def test_what_cannot_be_done_is_one_line() -> None:
    with pytest.raises(UserError, match="a continuation has 82 tokens, the model's window has 40"):
        model().loglikelihood(requests([("the", " x" * 41)]))
    with pytest.raises(UserError, match=r"settings \['num_beams'\] are not known; allowed: until, max_gen_toks"):
        model().generate_until(requests([("the", {"num_beams": 4})]))
    with pytest.raises(UserError, match="256 new tokens leave no room in the model's window of 40"):
        model().generate_until(requests([("the", {})]))
    encoder = tiny_roberta(**SIZES, max_length=16)
    with pytest.raises(UserError, match="needs a decoder"):
        HarnessModel(encoder, PARAMS, TOKENIZER)
    nameless = Tokenizer(TOKENIZER.backend, {}, add_bos=False)
    with pytest.raises(UserError, match="neither bos nor eos"):
        HarnessModel(NETWORK, PARAMS, nameless)
