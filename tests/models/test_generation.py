"""Cached generation against the plain forward pass, one token at a time."""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator, _prefill, keep_nucleus
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network, Params
from jaxcl.models.roberta import RobertaConfig

VOCAB = 29
Score = Callable[[list[int]], np.ndarray]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2], [11, 12, 13]]


def tiny(**changes: Any) -> Network:
    values = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4}
    # Large weights: the likeliest token then depends on the text, and stands out far above rounding.
    return Network.create(LlamaConfig(**{**values, "num_kv_heads": 2, "init_std": 0.5, **changes}))


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny()


@pytest.fixture(scope="module")
def params(network: Network) -> Params:
    return jax.jit(network.init)(jax.random.key(0))


@functools.cache
def generator(network: Network, **changes: Any) -> Generator:
    """One for all tests that ask for the same: most of their time is compilation."""
    values = {"batch_size": 4, "prompt_length": 8, "max_new_tokens": 6, "eos_id": None, "pad_id": 0}
    return Generator(network, **{**values, **changes})


@pytest.fixture(scope="module")
def score(network: Network, params: Params) -> Score:
    return next_scores(network, params, 16)


def next_scores(network: Network, params: Params, length: int) -> Score:
    """Scores of the token after a text, by the forward pass that training uses: right-padded, without a cache."""

    @jax.jit
    def forward(tokens: jax.Array, segments: jax.Array) -> jax.Array:
        row = jnp.zeros(1, jnp.int32)
        batch = Batch(
            tokens=tokens,
            segments=segments,
            positions=jnp.arange(length)[None],
            predict=None,
            targets=tokens,
            weights=jnp.ones(tokens.shape),
            task=row,
            example=row,
        )
        return network.logits(params, network.hidden(params, batch).states)[0]

    def score(text: list[int]) -> np.ndarray:
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(forward(padded, (np.arange(length) < len(text)).astype(np.int32)[None]))[len(text) - 1]

    return score


def greedy(score: Score, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(np.argmax(score(text))))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 1, "tie_embeddings": True},
        {
            "num_kv_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_length": 8},
        },
        # Windows that are shorter than the prompts and longer than them.
        {"layer_types": ("window",), "window": 5, "attention_cap": 3.0},
        {
            "layer_types": ("window", "full"),
            "window": 4,
            "rotary_layers": (True, True, False),
            "window_rope_theta": 9.0,
        },
        {"layer_types": ("full", "window"), "window": 11},
    ],
)
def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass(changes: dict[str, Any]) -> None:
    network = tiny(**changes)
    params = jax.jit(network.init)(jax.random.key(1))
    rng = np.random.default_rng(0)  # biases and norms start as constants
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    score = next_scores(network, params, 16)
    expected = [greedy(score, prompt, 6) for prompt in PROMPTS]
    assert generator(network)(params, PROMPTS) == expected
    assert len({token for answer in expected for token in answer}) > 5  # no constant answer could pass


def test_layers_with_a_window_keep_the_window_only() -> None:
    network = tiny(layer_types=("window", "full", "window"), window=4)
    shapes = network.shapes(), jnp.zeros((2, 8), jnp.int32), jnp.full(2, 8)
    cache, _ = jax.eval_shape(functools.partial(_prefill, network, room=5), *shapes)
    assert cache.full.keys.shape == (1, 2, 2, 13, 4)
    assert cache.window.keys.shape == cache.window.values.shape == (2, 2, 2, 4, 4)


def test_greedy_with_shared_heads(network: Network, params: Params, score: Score) -> None:
    assert generator(network)(params, PROMPTS) == [greedy(score, prompt, 6) for prompt in PROMPTS]


def test_padding_and_other_rows_change_nothing(network: Network, params: Params) -> None:
    together = generator(network)(params, PROMPTS)
    alone = generator(network, batch_size=1)
    assert [alone(params, [prompt])[0] for prompt in PROMPTS] == together
    assert generator(network, prompt_length=13)(params, PROMPTS) == together  # more padding on the left
    assert generator(network)(params, PROMPTS[::-1]) == together[::-1]
    # Two rounds, the second filled up.
    assert generator(network, batch_size=3, pad_id=5)(params, PROMPTS) == together
    assert generator(network)(params, []) == []


def test_params_are_an_argument(network: Network, params: Params) -> None:
    generate = generator(network)
    before = generate(params, PROMPTS)
    other = jax.tree.map(lambda leaf: -leaf, params)
    assert generate(other, PROMPTS) != before
    assert generate(params, PROMPTS) == before


def test_end_token_ends_a_row_and_is_left_out(network: Network, params: Params) -> None:
    free = generator(network)(params, PROMPTS)
    end = free[0][2]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert any(len(answer) < 6 for answer in expected)
    assert generator(network, eos_id=(end,))(params, PROMPTS) == expected
    both = (end, free[1][1])
    expected = [answer[: next((i for i, t in enumerate(answer) if t in both), 6)] for answer in free]
    assert generator(network, eos_id=both)(params, PROMPTS) == expected


def test_loop_stops_when_all_rows_have_ended() -> None:
    network = tiny(max_length=64)
    params = jax.jit(network.init)(jax.random.key(0))
    # All scores 0: token 0 is the likeliest by order. If it ends a row, the loop must run no further.
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    for end, runs in ((0, 0), (1, 5)):
        counted: list[int] = []
        generate = generator(network, eos_id=end, trace=lambda function, seen=counted: _counting(function, seen))
        answers = generate(params, PROMPTS)
        jax.effects_barrier()
        assert answers == [[0] * (6 if runs else 0)] * 4
        assert len(counted) == runs


def _counting(function: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    """Counts runs of the decoding loop's body: nothing else asks for the rotary tables of one position."""
    original = Network.context

    def context(self: Network, batch: Batch) -> Any:
        if batch.tokens.shape[1] == 1:
            jax.debug.callback(lambda: seen.append(1))
        return original(self, batch)

    def traced(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Network, "context", context)
            return function(*args)

    return traced


def test_draws_follow_the_softmax(network: Network, params: Params, score: Score) -> None:
    temperature, count = 1.7, 4000
    generate = generator(network, batch_size=500, max_new_tokens=2)
    prompt = PROMPTS[2]
    answers = generate(params, [prompt] * count, key=jax.random.key(3), temperature=temperature)

    def compare(drawn: list[int], text: list[int]) -> None:
        logits = score(text).astype(np.float64) / temperature
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        seen = np.bincount(drawn, minlength=VOCAB) / len(drawn)
        # Five standard deviations of each frequency.
        assert np.all(np.abs(seen - probs) < 5 * np.sqrt(probs * (1 - probs) / len(drawn)) + 1e-9)
        assert probs.max() < 0.9

    compare([answer[0] for answer in answers], prompt)
    (first, times), *_ = Counter(answer[0] for answer in answers).most_common(1)
    assert times > 200
    compare([answer[1] for answer in answers if answer[0] == first], [*prompt, first])


def test_draws_depend_on_key_and_place_only(network: Network, params: Params) -> None:
    draw = {"key": jax.random.key(5), "temperature": 2.0}
    together = generator(network)(params, PROMPTS, **draw)
    assert generator(network)(params, PROMPTS, **draw) == together
    assert generator(network)(params, [[1], *PROMPTS[1:]], **draw)[1:] == together[1:]
    assert generator(network, batch_size=3, pad_id=5)(params, PROMPTS, **draw) == together
    assert generator(network)(params, PROMPTS, key=jax.random.key(6), temperature=2.0) != together
    same = generator(network)(params, [PROMPTS[0]] * 4, **draw)
    assert len({tuple(answer) for answer in same}) > 1  # equal prompts draw each for themselves


def test_low_temperature_and_narrow_nucleus_are_greedy(network: Network, params: Params) -> None:
    generate = generator(network)
    expected = generate(params, PROMPTS)
    assert generate(params, PROMPTS, key=jax.random.key(1), temperature=1e-4) == expected
    assert generate(params, PROMPTS, key=jax.random.key(1), temperature=3.0, top_p=1e-6) == expected


def test_nucleus_is_the_smallest_set_of_enough_mass() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 11)).astype(np.float32)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        kept = np.isfinite(np.asarray(keep_nucleus(logits, jnp.float32(top_p))))
        for row, keep in zip(logits, kept, strict=True):
            probs = np.exp(row) / np.exp(row).sum()
            order = np.argsort(-probs)
            size = next(n for n in range(1, 12) if n == 11 or probs[order[:n]].sum() >= top_p)
            assert set(np.flatnonzero(keep)) == set(order[:size])


def test_one_compilation_a_bucket_and_mode(network: Network, params: Params) -> None:
    lengths: list[int] = []

    def trace(function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(params: Params, tokens: jax.Array, *args: Any) -> Any:
            lengths.append(tokens.shape[1])
            return function(params, tokens, *args)

        return traced

    generate = generator(network, prompt_length=40, buckets=(5, 20), trace=trace)
    for prompt in ([1], [1] * 5, [1, 2], [1] * 6, [1] * 20, [1] * 21, [1] * 40, [3]):
        generate(params, [prompt])
        generate(jax.tree.map(lambda leaf: 2 * leaf, params), [prompt] * 3)
    assert lengths == [5, 20, 40]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (0.5, 0.9), (0.7, 0.8)):
        generate(params, [[1]], key=jax.random.key(0), temperature=temperature, top_p=top_p)
    assert lengths == [5, 20, 40, 5, 5]


def test_cache_is_updated_in_place(network: Network, params: Params, optimised: None) -> None:
    generate = generator(network)
    program = generate.jitted.lower(params, *generate.pad(PROMPTS), None).compile().as_text()
    shape = rf"f32\[3,4,2,{8 + 6 - 1},4\]"
    assert len(re.findall(rf"= {shape}\S* dynamic-update-slice\(", program)) == 2
    # Keys and values are laid out once after the prompts. In the loop, an update whose target is still needed
    # would show as a copy.
    assert not re.findall(rf"= {shape}\S* copy\(", program)


def test_network_may_compute_in_bfloat16(params: Params) -> None:
    network = tiny(compute={"dtype": "bfloat16"})
    rounded, exact = next_scores(network, params, 16), next_scores(tiny(), params, 16)
    steps = [
        ([*prompt, *answer[:place]], token)
        for prompt, answer in zip(PROMPTS, generator(network)(params, PROMPTS), strict=True)
        for place, token in enumerate(answer)
    ]
    # One token at a time rounds differently from all at once, but no more: its best token is at most twice the
    # rounding error behind the best one.
    error = max(np.abs(rounded(text) - exact(text)).max() for text, _ in steps)
    assert 0 < error < 0.1 * np.ptp(exact(PROMPTS[0]))
    for text, token in steps:
        assert exact(text)[token] >= exact(text).max() - 2 * error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 1, got -1"),
        ({"buckets": (9,)}, "buckets: expected lengths from 1 to prompt_length=8"),
        ({"buckets": (0, 4)}, "buckets: expected lengths from 1 to prompt_length=8"),
    ],
)
def test_impossible_sizes_are_named(network: Network, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generator(network, **changes)


def test_impossible_calls_are_named(network: Network, params: Params) -> None:
    generate = generator(network)
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected 1 to 8 tokens, got 9"):
        generate(params, [[1], [1] * 9])
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected 1 to 8 tokens, got 0"):
        generate(params, [[]])
    with pytest.raises(ValueError, match="key: expected a key"):
        generate(params, [[1]], temperature=1.0)
    with pytest.raises(ValueError, match="temperature >= 0 and 0 < top_p <= 1"):
        generate(params, [[1]], key=jax.random.key(0), temperature=1.0, top_p=0.0)
    encoder = RobertaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="network: expected a decoder"):
        generator(Network.create(encoder))
