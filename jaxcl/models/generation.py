"""Writing text with a decoder: key/value cache, one compiled program a shape.

Prompts are padded on the left, so that all rows write their next token in the same place of the cache. A row's
padding is a segment of its own and its positions start at its first token, hence neither the padding nor the other
rows change what a row says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxcl.models.attention import attention
from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.cache import Cache, Store
from jaxcl.models.images import NO_IMAGE, Images
from jaxcl.models.network import Layer, Network, Params
from jaxcl.models.vision_config import vision_of

Scalar = Array | np.number
Trace = Callable[[Callable[..., Any]], Callable[..., Any]]
Choose = Callable[[Float[Array, "batch vocab"], Int[Array, ""]], Int[Array, " batch"]]
"""From scores, and the number of tokens written before, to the next tokens."""

_SHORTEST_BUCKET = 16


class Draw(NamedTuple):
    """How tokens are drawn.

    Attributes:
      key: what all randomness comes from.
      first_row: place of row 0 among all prompts of a call, int32.
      temperature: divides the scores, float32.
      top_p: mass of the nucleus, float32; `None` draws from all tokens.
    """

    key: Array
    first_row: Scalar
    temperature: Scalar
    top_p: Scalar | None


class Generator:
    """Continues prompts, `batch_size` at a time.

    A program is compiled when its shape first occurs: for each bucket of prompt lengths, and for greedy choice,
    drawing, and drawing with `top_p` each. Params are an argument, so a model in training needs no new program.

    Args:
      network: a decoder.
      batch_size: rows of the compiled program; fewer prompts are filled up, more are worked through in turn.
      prompt_length: longest prompt, in tokens.
      max_new_tokens: longest continuation, in tokens.
      eos_id: token that ends a continuation, or several; `None` for none.
      pad_id: token that fills the rest of a row.
      buckets: prompt lengths to compile for; default: `prompt_length`, its half, quarter and so on down to 16.
      trace: wrapped around the function before it is compiled, to give axis names their meaning on a mesh
        (`jaxcl.training.compile.Compiler.trace`).

    Raises:
      ValueError: the network is an encoder, or a size is not positive.

    Examples:
      >>> from jaxcl.models.llama import LlamaConfig
      >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2)
      >>> network = Network.create(LlamaConfig(**sizes))
      >>> sizes = dict(batch_size=2, prompt_length=16, max_new_tokens=3)
      >>> generator = Generator(network, **sizes, eos_id=None, pad_id=0)
      >>> [len(ids) for ids in generator(network.init(jax.random.key(0)), [[1, 2, 3], [4]])]
      [3, 3]
    """

    def __init__(
        self,
        network: Network,
        *,
        batch_size: int,
        prompt_length: int,
        max_new_tokens: int,
        eos_id: int | Sequence[int] | None,
        pad_id: int,
        buckets: Sequence[int] | None = None,
        trace: Trace | None = None,
    ) -> None:
        if not network.causal:
            raise ValueError("network: expected a decoder, got an encoder")
        sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "max_new_tokens": max_new_tokens}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.batch_size = batch_size
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self.eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id or ())
        self.pad_id = pad_id
        self.buckets = tuple(sorted({*(buckets or _halvings(prompt_length)), prompt_length}))
        if not 0 < self.buckets[0] <= self.buckets[-1] <= prompt_length:
            raise ValueError(f"buckets: expected lengths from 1 to prompt_length={prompt_length}, got {buckets}")

        vision = vision_of(network.config)
        self.image_token_id: int | None = None if vision is None else vision.image_token_id
        self._side: int = 0 if vision is None else vision.image_size

        def generate(
            params: Params, tokens: Array, lengths: Array, draw: Draw | None, images: Images | None = None
        ) -> tuple[Array, Array]:
            choose = _chooser(draw, len(tokens))
            written = write_tokens(
                network,
                params,
                tokens,
                lengths,
                choose,
                most=max_new_tokens,
                ends=self.eos_ids,
                pad_id=pad_id,
                images=images,
            )
            # Every process reads all rows.
            return constrain(written[0], None, None), constrain(written[1], None)

        self.jitted = jax.jit(generate if trace is None else trace(generate))

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        key: Array | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        images: Sequence[UInt8[np.ndarray, "tiles tile tile 3"] | None] | None = None,
    ) -> list[list[int]]:
        """Continues each prompt.

        Args:
          params: of the network; on a mesh, sharded as they are.
          prompts: token ids, at least one each. Prompts of similar length side by side save work.
          key: to draw from; needed if `temperature` is not 0. What a row draws depends on the key and on its place
            in `prompts`, not on the other rows.
          temperature: 0 takes the likeliest token, otherwise tokens are drawn from `softmax(logits / temperature)`.
          top_p: draws among the fewest likeliest tokens whose probabilities sum up to at least this.
          images: tiles of each prompt's images, raw pixels; `None` for prompts without. A program is compiled for each
            number of tiles that the prompts of a call have at most, rounded up to a power of 2.

        Returns:
          The new tokens of each prompt, at most `max_new_tokens`, without the one that ended them.

        Raises:
          ValueError: a prompt is empty or too long, a number is out of range, or there are images for a model without a
            tower.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
        if temperature > 0 and key is None:
            raise ValueError("key: expected a key to draw from with temperature > 0, got None")
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.prompt_length:
                raise ValueError(f"prompts[{index}]: expected 1 to {self.prompt_length} tokens, got {len(prompt)}")
        tiles = 0 if images is None else max((len(one) for one in images if one is not None), default=0)
        if tiles and self.image_token_id is None:
            raise ValueError("images: expected a network with vision, got one without")
        results: list[list[int]] = []
        for start in range(0, len(prompts), self.batch_size):
            rows = prompts[start : start + self.batch_size]
            draw = None
            if key is not None and temperature > 0:
                nucleus = np.float32(top_p) if top_p < 1 else None
                draw = Draw(key, np.int32(start), np.float32(temperature), nucleus)
            padded = self.pad(rows)
            shown = None
            if images is not None and tiles:
                shown = self._images(padded[0], images[start : start + self.batch_size], tiles)
            written, counts = map(np.asarray, self.jitted(params, *padded, draw, shown))
            results += [row[:count].tolist() for row, count in zip(written, counts, strict=True)][: len(rows)]
        return results

    def pad(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded rows `[batch_size, bucket]` and the number of tokens in each, 0 for rows without a prompt."""
        longest = max(map(len, prompts))
        bucket = next(length for length in self.buckets if length >= longest)
        tokens = np.full((self.batch_size, bucket), self.pad_id, np.int32)
        lengths = np.zeros(self.batch_size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, bucket - len(prompt) :] = prompt
            lengths[row] = len(prompt)
        return tokens, lengths

    def _images(self, tokens: np.ndarray, images: Sequence[np.ndarray | None], tiles: int) -> Images:
        """The images of padded rows, in the places of their image tokens."""
        count = 1 << (tiles - 1).bit_length()
        side = self._side
        pixels = np.zeros((self.batch_size, count, side, side, 3), np.uint8)
        for row, one in enumerate(images):
            if one is not None:
                pixels[row, : len(one)] = one
        is_image = tokens == self.image_token_id
        index = np.where(is_image, np.cumsum(is_image, axis=1) - 1, NO_IMAGE)
        arrays: Any = pixels, index.astype(np.int32)  # of the host, as tokens are: every process gives the same
        return Images(*arrays)


class _Loop(NamedTuple):
    """What the decoding loop carries.

    Attributes:
      step: tokens written so far in rows that go on.
      tokens: what was written, `pad_id` after the end.
      lengths: number of tokens written in each row, without the one that ended it.
      done: rows that have ended.
      cache: keys and values of everything but the last token.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    cache: Cache


def write_tokens(
    network: Network,
    params: Params,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    choose: Choose,
    *,
    most: int,
    ends: Sequence[int | Int[Array, " batch"]],
    pad_id: int,
    images: Images | None = None,
) -> tuple[Int[Array, "batch most"], Int[Array, " batch"]]:
    """Continues prompts: prefill and decoding loop, as `Generator` compiles them; pure.

    Args:
      network: a decoder.
      params: its params.
      tokens: prompts, padded on the left.
      lengths: tokens of each prompt; 0 for rows that only fill the batch, which are not continued.
      choose: takes the next tokens.
      most: tokens of the longest continuation. Static.
      ends: tokens that end a continuation, each one for all rows or one per row.
      pad_id: token that fills the rest of a row.
      images: what the prompts show.

    Returns:
      What was written, `pad_id` from the end on; and its length in each row, without the token that ended it.
    """
    batch, prompt = tokens.shape

    def write(loop: _Loop, logits: Array) -> _Loop:
        token = choose(logits, loop.step)
        ended = functools.reduce(jnp.logical_or, [token == end for end in ends], jnp.zeros_like(loop.done))
        done = loop.done | ended
        written = jax.lax.dynamic_update_slice(
            loop.tokens, jnp.where(done, pad_id, token)[:, None], (jnp.int32(0), loop.step)
        )
        return _Loop(loop.step + 1, written, loop.lengths + ~done, done, loop.cache)

    def decode(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(loop.tokens, loop.step - 1, 1, axis=1)
        place = prompt + loop.step - 1
        cache, logits = _decode(network, params, last, place, prompt - lengths, loop.cache)
        return write(loop._replace(cache=cache), logits)

    cache, logits = _prefill(network, params, tokens, lengths, most - 1, images)
    nothing = jnp.full((batch, most), pad_id, jnp.int32)
    loop = _Loop(jnp.int32(0), nothing, jnp.zeros_like(lengths), lengths == 0, cache)
    loop = jax.lax.while_loop(lambda loop: (loop.step < most) & ~jnp.all(loop.done), decode, write(loop, logits))
    return loop.tokens, loop.lengths


def _prefill(
    network: Network,
    params: Params,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    room: int,
    images: Images | None = None,
) -> tuple[Cache, Float[Array, "batch vocab"]]:
    """Runs the prompts. Returns a cache with `room` more places, and the scores of each row's next token."""
    prompt = tokens.shape[1]
    positions = jnp.arange(prompt) - (prompt - lengths[:, None])
    batch = _rows(tokens, (positions >= 0).astype(jnp.int32), jnp.maximum(positions, 0), images)
    context = network.context(batch)

    def body(x: Array, layer: Layer) -> tuple[Array, Store]:
        block, own = network.layer(layer.params), context.at(layer.kind)
        query, key, value = block.project(x, own)
        attended = attention(
            query,
            key,
            value,
            segments=own.segments,
            causal=own.causal,
            scale=own.scale,
            kernel=own.kernel,
            packed=True,
            window=own.window,
            windowed=own.windowed,
            cap=own.cap,
        )
        x = constrain(block.complete(x, attended, None, None), "batch", "length", "embed")
        return x, Store(key.swapaxes(1, 2), value.swapaxes(1, 2))

    x, store = jax.lax.scan(body, network.embed(params, batch), network.blocks(params))
    cache = Cache.of_prompt(store, network.windowed(prompt + room), network.config.window, room)
    return cache, network.logits(params, network.finish(params, x[:, -1:]))[:, 0]


def _decode(
    network: Network,
    params: Params,
    tokens: Int[Array, "batch 1"],
    place: Int[Array, ""],
    padding: Int[Array, " batch"],
    cache: Cache,
) -> tuple[Cache, Float[Array, "batch vocab"]]:
    """Runs one token per row, which goes to `place` of the cache. `padding` places at a row's start are empty."""
    batch = _rows(tokens, jnp.ones_like(tokens), (place - padding)[:, None])
    context = network.context(batch)
    seen = cache.seen(place, padding)

    # The cache is carried, not scanned over: what is scanned over comes out as a new array, one copy per token.
    def body(carry: tuple[Array, Cache], one: tuple[Layer, Array]) -> tuple[tuple[Array, Cache], None]:
        x, cache = carry
        layer, number = one
        block, own = network.layer(layer.params), context.at(layer.kind)
        query, key, value = block.project(x, own)
        cache, attended = cache.step(query, key, value, number=number, place=place, seen=seen, context=own)
        return (block.complete(x, attended, None, None), cache), None

    layers = (network.blocks(params), cache.numbers(network.config.windowed))
    (x, cache), _ = jax.lax.scan(body, (network.embed(params, batch), cache), layers)
    return cache, network.logits(params, network.finish(params, x))[:, 0]


def _chooser(draw: Draw | None, batch: int) -> Choose:
    if draw is None:
        return lambda logits, step: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(draw.key, row))(draw.first_row + jnp.arange(batch))
    return draw_by(keys, draw.temperature, draw.top_p)


def draw_by(keys: Key[Array, " batch"], temperature: Scalar | float, top_p: Scalar | None = None) -> Choose:
    """The function that draws the next token of each row by the row's own key; see `Draw` for the other arguments."""

    def choose(logits: Array, step: Array) -> Array:
        logits = logits / temperature
        if top_p is not None:
            logits = keep_nucleus(logits, top_p)
        own = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        return jax.vmap(jax.random.categorical)(own, logits).astype(jnp.int32)

    return choose


def keep_nucleus(logits: Float[Array, "batch vocab"], top_p: Scalar | float) -> Float[Array, "batch vocab"]:
    """Scores, with minus infinity for tokens outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities sum up to at least `top_p` (arXiv
    1904.09751, section 3.1); tokens as likely as its last one stay too.

    Examples:
      >>> keep_nucleus(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), 0.6)[0, 0]
      Array(-inf, dtype=float32)
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _rows(tokens: Array, segments: Array, positions: Array, images: Images | None = None) -> Batch:
    """A batch that nothing is scored in."""
    none = jnp.zeros(tokens.shape[0], jnp.int32)
    return Batch(
        tokens=tokens,
        segments=segments,
        positions=positions,
        predict=None,
        targets=tokens,
        weights=jnp.zeros(tokens.shape, jnp.float32),
        task=none,
        example=none,
        images=images,
    )


def _halvings(length: int) -> list[int]:
    """`length`, half of it (rounded up), and so on, while at least `_SHORTEST_BUCKET`.

    >>> _halvings(100), _halvings(4)
    ([100, 50, 25], [4])
    """
    lengths = [length]
    while (half := -(-lengths[-1] // 2)) >= _SHORTEST_BUCKET:
        lengths.append(half)
    return lengths
