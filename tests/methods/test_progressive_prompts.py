import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.errors import UserError
from jaxcl.methods.base import OptimizerParts
from jaxcl.methods.progressive_prompts import ProgressivePrompts, ProgressivePromptsOptions
from jaxcl.models.generation import Generator
from jaxcl.models.soft_tokens import soft_id, start_from_words
from jaxcl.models.trainable import trained
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, perturbed, tiny_llama, tiny_roberta

NETWORK = tiny_llama(soft_tokens=6)


def method(length: int = 2, tasks: int = 3) -> ProgressivePrompts:
    return ProgressivePrompts(ProgressivePromptsOptions(length=length), NETWORK, tasks)


def with_words(params: Any, soft: np.ndarray) -> Any:
    """Params of a network whose first words are the soft tokens and which has none of these."""
    words = params["embed"]["embedding"]
    plain = {name: leaf for name, leaf in params.items() if name != "soft_tokens"}
    return {**plain, "embed": {"embedding": words.at[: len(soft)].set(soft)}}


def test_the_latest_prompt_comes_first() -> None:
    prompts = method()
    assert [list(prompts.prompt_prefix(task)) for task in range(3)] == [
        [-1, -2],
        [-3, -4, -1, -2],
        [-5, -6, -3, -4, -1, -2],
    ]


def test_a_soft_token_is_read_as_a_word_with_its_vector() -> None:
    params = perturbed(init(NETWORK), 0.3)
    batch = make_batch((7, 5), seed=3)
    soft = np.asarray(params["soft_tokens"]["embedding"])
    # Soft token j where a row has word j, for j < 6.
    tokens = np.asarray(batch.tokens)
    changed = dataclasses.replace(batch, tokens=jnp.asarray(np.where(tokens < 6, -1 - tokens, tokens)))
    assert (changed.tokens < 0).any()
    plain = tiny_llama()
    expected = plain.hidden(with_words(params, soft), batch).states
    np.testing.assert_allclose(NETWORK.hidden(params, changed).states, expected, rtol=1e-5, atol=1e-6)


def test_generation_goes_on_from_soft_tokens() -> None:
    params = perturbed(init(NETWORK), 0.3)
    prompts = [[soft_id(0), soft_id(1), 7, 8], [soft_id(5), 9]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):  # without a cache, a whole forward pass a token
            batch = dataclasses.replace(make_batch((len(ids),), length=len(ids)), tokens=jnp.array([ids]))
            states = NETWORK.hidden(params, batch).states
            ids.append(int(jnp.argmax(NETWORK.logits(params, states)[0, -1])))
        expected.append(ids[len(prompt) :])
    sizes: dict[str, Any] = {"batch_size": 2, "prompt_length": 8, "max_new_tokens": 4, "eos_id": None, "pad_id": 0}
    assert Generator(NETWORK, **sizes)(params, prompts) == expected


def test_training_changes_the_own_prompt_alone() -> None:
    prompts, params, batch = method(), perturbed(init(NETWORK), 0.3), make_batch()
    opening = jnp.array(prompts.prompt_prefix(2), jnp.int32)
    tokens = jnp.concatenate([jnp.tile(opening, (3, 1)), batch.tokens[:, :1]], axis=1)
    ones = jnp.ones_like(tokens)
    positions = jnp.tile(jnp.arange(7), (3, 1))
    last = jnp.full_like(batch.targets, 6)  # behind all prompts
    batch = dataclasses.replace(batch, tokens=tokens, segments=ones, positions=positions, predict=last)
    task: Any = StandInTask([batch], index=1)
    state = prompts.prepare(params, prompts.init(params), task)
    parts = OptimizerParts(optax.identity(), optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1))
    transform = prompts.transform(parts)
    part = trained(params)
    assert list(part) == ["soft_tokens"]

    def loss(part: Any) -> jax.Array:
        term = prompts.loss({**params, **part}, state, batch, jax.random.key(0))["loss"]
        return term.sum / term.count

    gradient = jax.grad(loss)(part)
    assert np.abs(np.asarray(gradient["soft_tokens"]["embedding"])).min() > 0  # all prompts are read
    masks = trained(prompts.update_args(params, state, batch, jax.random.key(0))["masks"])
    updates, _ = transform.update(gradient, transform.init(part), part, masks=masks)
    moved = np.abs(np.asarray(updates["soft_tokens"]["embedding"])).max(axis=1) > 0
    assert moved.tolist() == [False, False, True, True, False, False]


def test_prompts_start_as_different_words() -> None:
    params = init(NETWORK)
    soft = np.asarray(start_from_words(params, jax.random.key(1))["soft_tokens"]["embedding"])
    words = np.asarray(params["embed"]["embedding"])
    rows = [int(np.flatnonzero((words == vector).all(axis=1))[0]) for vector in soft]
    assert len(set(rows)) == 6
    with pytest.raises(ValueError, match=r"soft_tokens \(20\) must be at most vocab_size \(13\)"):
        tiny_llama(soft_tokens=20)


def test_the_rest_of_the_network_is_the_same_with_and_without_soft_tokens() -> None:
    plain, soft = tiny_llama().init(jax.random.key(3)), NETWORK.init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, plain, {key: leaf for key, leaf in soft.items() if key in plain})


def test_what_does_not_go_together_is_refused() -> None:
    options = ProgressivePromptsOptions(length=3)
    with pytest.raises(ValueError, match=r"^name: progressive_prompts needs a decoder"):
        ProgressivePrompts.check(options, tiny_roberta().config)
    with pytest.raises(ValueError, match=r"^length: 3 soft tokens a task, and the model has 0"):
        ProgressivePrompts.check(options, tiny_llama().config)
    with pytest.raises(ValueError, match=r"model\.lora must be none"):
        ProgressivePrompts.check(options, tiny_llama(soft_tokens=6, lora={"rank": 2}).config)
    with pytest.raises(UserError, match=r"model\.soft_tokens: 6 is too few for 3 tasks of 3: 9"):
        ProgressivePrompts(options, NETWORK, 3)
