"""A model for `lm-eval` (the language-model evaluation harness), to measure its remaining general ability.

    import lm_eval
    from jaxcl.evaluation.harness import HarnessModel
    from jaxcl.run.model import load_model

    model = load_model("runs/mine")
    harness = HarnessModel(model.network, model.params, model.tokenizer)
    print(lm_eval.simple_evaluate(harness, tasks=["arc_easy"])["results"])

The harness is optional: `pip install 'jaxcl[eval]'`. The class can score texts without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxcl.data.plan import Shape, choose_lengths
from jaxcl.data.rows import RowFields, blank, place
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.evaluation.scoring import as_batch, row_sums
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.network import Network, Params

LM: Any = importlib.import_module("lm_eval.api.model").LM if importlib.util.find_spec("lm_eval") else object

# Row lengths (compiled shapes) per call: multiples, chosen for the least padding.
_BUCKETS, _MULTIPLE = 4, 16
# Scored positions per row are a multiple of this, so that similar lengths share a compiled program.
_SCORED_MULTIPLE = 8
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


class Scoring(NamedTuple):
    """Tokens of which the last ones are scored.

    Attributes:
      tokens: the tokens; the model reads all but the last.
      scored: number of tokens at the end that are scored, each given all before it; less than the number of tokens,
        possibly 0.
    """

    tokens: list[int]
    scored: int


class Likelihood(NamedTuple):
    """Log-likelihood in nats, and whether every scored token was the most likely one."""

    nats: float
    greedy: bool


class HarnessModel(LM):
    """`lm_eval.api.model.LM` over a decoder.

    Requests are objects with `args`, as the harness makes them. Rows of similar length share a batch; a row's result
    does not depend on the other rows or the padding. For a single process.

    Args:
      network: a decoder.
      params: its params.
      tokenizer: its tokenizer.
      batch_size: rows scored or generated at once.
      max_length: the window, in tokens; default: the model's.
      max_new_tokens: maximal length of a generated text if a task does not set it.
      seed: seed for tasks with sampling.

    Raises:
      UserError: an encoder, or a tokenizer without bos and eos.
    """

    def __init__(
        self,
        network: Network,
        params: Params,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not network.causal:
            raise UserError("lm-eval needs a decoder; the model is an encoder")
        opening = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if opening is None:
            raise UserError("lm-eval needs a token at the start of a text; the tokenizer has neither bos nor eos")
        self.network = network
        self.params = params
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or network.config.max_length
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._opening = opening
        self._generators: dict[tuple[int, tuple[int, ...]], Generator] = {}

    # ---------------------------------------------------------------- called by the harness

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of a continuation given its context, and whether greedy decoding would generate it.

        A context that is too long is cut on the left. White space at its end is moved to the continuation.

        Args:
          requests: `args` is `(context, continuation)`.

        Raises:
          UserError: a continuation is longer than the window.
        """
        found = self.score([self._pair(*request.args) for request in requests])
        return [(likelihood.nats, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood of whole texts; each token is scored once, with as much context as fits in the window.

        Args:
          requests: `args` is `(text,)`.
        """
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        parts = [list(windows([self._opening, *tokens], self.max_length)) for tokens in texts]
        scores = iter(self.score([window for windows in parts for window in windows]))
        return [sum((next(scores).nats for _ in windows), start=0.0) for windows in parts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Generated texts, up to a stop text.

        Args:
          requests: `args` is `(context, settings)`, with the settings `until`, `max_gen_toks`, `do_sample`,
            `temperature` and `top_p`.

        Raises:
          UserError: an unknown setting, or the window has no room for the context.
        """
        answers = [""] * len(requests)
        groups: dict[_Settings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(index)
        for settings, members in groups.items():
            prompts = {index: self._context(requests[index].args[0]) for index in members}
            order = sorted(members, key=lambda index: len(prompts[index]))
            written = self._write([prompts[index] for index in order], settings)
            for index, text in zip(order, written, strict=True):
                answers[index] = before_stop(text, settings.until)
        return answers

    # ---------------------------------------------------------------- scoring

    def score(self, examples: Sequence[Scoring]) -> list[Likelihood]:
        """Log-likelihoods of the scored tokens of each example, in order."""
        pending = []
        for chosen, rows in self._batches(examples):
            pending.append((chosen, _program(self.network)(self.params, rows)))
        results = [Likelihood(0.0, True)] * len(examples)
        # Read at the end, so that the device never waits for the host.
        for chosen, sums in pending:
            for index, nats, right, count in zip(chosen, *map(np.asarray, sums), strict=False):
                results[index] = Likelihood(-float(nats), bool(right == count))
        return results

    def _batches(self, examples: Sequence[Scoring]) -> Iterator[tuple[list[int], Batch]]:
        """Indices of examples and their batch, completed with filler rows."""
        asked = np.array([index for index, example in enumerate(examples) if example.scored], np.int64)
        if not len(asked):
            return
        lengths = np.array([len(examples[index].tokens) - 1 for index in asked])
        bounds = choose_lengths(lengths, _BUCKETS, _MULTIPLE)
        buckets = np.searchsorted(bounds, lengths)
        for bucket, bound in enumerate(bounds):
            members = asked[buckets == bucket]
            scored = max(examples[index].scored for index in members)
            shape = Shape(bound, -(-scored // _SCORED_MULTIPLE) * _SCORED_MULTIPLE)
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size].tolist()
                rows: list[Mapping[str, Any]] = [self._row(examples[index], shape) for index in chosen]
                rows += [blank(shape, self.tokenizer.pad_id)] * (self.batch_size - len(rows))
                fields: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
                zeros = np.zeros(self.batch_size, np.int32)
                yield chosen, as_batch(fields | {"task": zeros, "example": zeros, "packed": False})

    def _row(self, example: Scoring, shape: Shape) -> RowFields:
        row = blank(shape, self.tokenizer.pad_id)
        tokens, count = np.asarray(example.tokens, np.int32), example.scored
        place(row, np.asarray(tokens[:-1]), np.array([len(tokens) - 1]))
        row["predict"][:count] = np.arange(len(tokens) - 1 - count, len(tokens) - 1)
        row["targets"][:count] = tokens[-count:]
        row["weights"][:count] = 1
        return row

    # ---------------------------------------------------------------- text to tokens

    def _context(self, text: str) -> list[int]:
        opening = [self._opening] if self.tokenizer.add_bos else []
        return opening + self.tokenizer.encode(text) or [self._opening]

    def _pair(self, context: str, continuation: str) -> Scoring:
        body = context.rstrip()
        continuation = context[len(body) :] + continuation
        before = self._context(body)
        # Tokenised together, as in running text: the continuation is what follows the context's tokens.
        after = self._context(body + continuation)[len(before) :] if body else self.tokenizer.encode(continuation)
        after = after or self.tokenizer.encode(continuation, continued=True)
        if len(after) > self.max_length:
            raise UserError(f"a continuation has {len(after)} tokens, the model's window has {self.max_length}")
        return Scoring((before + after)[-(self.max_length + 1) :], len(after))

    # ---------------------------------------------------------------- generation

    def _settings(self, given: Mapping[str, Any]) -> _Settings:
        unknown = set(given) - set(_GENERATION)
        if unknown:
            raise UserError(f"generation settings {sorted(unknown)} are not known; allowed: {', '.join(_GENERATION)}")
        until = given.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        sampled = bool(given.get("do_sample", False))
        temperature = float(given.get("temperature", 1.0)) if sampled else 0.0
        longest = int(given.get("max_gen_toks") or self.max_new_tokens)
        return _Settings(tuple(filter(None, until)), longest, temperature, float(given.get("top_p", 1.0)))

    def _write(self, prompts: Sequence[list[int]], settings: _Settings) -> list[str]:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"{settings.max_new_tokens} new tokens leave no room in the model's window of {self.max_length}"
            )
        # A stop text of one token ends the generation; longer ones are cut off afterwards.
        ids = (self.tokenizer.encode(text, continued=True) for text in settings.until)
        stops = {found[0] for found in ids if len(found) == 1 and self.tokenizer.decode(found) in settings.until}
        ends = tuple(sorted(stops.union(self.tokenizer.end_ids)))
        generator = self._generators.setdefault(
            (settings.max_new_tokens, ends),
            Generator(
                self.network,
                batch_size=self.batch_size,
                prompt_length=room,
                max_new_tokens=settings.max_new_tokens,
                eos_id=ends,
                pad_id=self.tokenizer.pad_id,
            ),
        )
        written = generator(
            self.params,
            [prompt[-room:] for prompt in prompts],
            key=jax.random.key(self.seed),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return [self.tokenizer.decode(tokens) for tokens in written]


class _Settings(NamedTuple):
    """Settings of generation; requests with equal settings share batches."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


def windows(tokens: Sequence[int], length: int) -> Iterator[Scoring]:
    """Windows in which the model reads at most `length` tokens and every token but the first is scored once.

    Only the last window contains tokens scored before, so that it is as long as the others.

    >>> [(window.tokens, window.scored) for window in windows([9, 0, 1, 2, 3, 4], 3)]
    [([9, 0, 1, 2], 3), ([1, 2, 3, 4], 2)]

    Args:
      tokens: the text, after its first token (bos or eos).
      length: the model's window.
    """
    for start in range(1, len(tokens), length):
        stop = min(start + length, len(tokens))
        yield Scoring(list(tokens[max(0, stop - length - 1) : stop]), stop - start)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text.

    >>> before_stop("one. two; three", [";", "."])
    'one'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@functools.lru_cache(maxsize=8)
def _program(network: Network) -> Callable[[Params, Batch], tuple[Array, Array, Array]]:
    return jax.jit(functools.partial(row_sums, network))
