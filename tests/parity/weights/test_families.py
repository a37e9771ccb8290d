"""Every family of decoders against transformers: the same logits, attention rows and continuations, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from jaxcl.functional import selected_rows
from jaxcl.methods.passes import router_terms
from jaxcl.models import generation
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.network import Network
from jaxcl.models.probe import Probe
from jaxcl.weights import load_weights, save_hf
from tests.tiny.families import DECODERS, EVERY, content

PAD, LENGTH = 1, 14
# Phi-3 computes its cache anew where a text outgrows the original window, which is 8 tokens here.
LENGTHS = (14, 9, 11)
REAL = np.arange(LENGTH) < np.array(LENGTHS)[:, None]


def torch_model(name: str) -> Any:
    """Random in every parameter: biases and norms too, which transformers starts at constants."""
    torch.manual_seed(0)
    keys = dict(content(name))
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    # Attention weights are an array only there.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            scale = 0.3 if "norm" in path else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=sorted(EVERY))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Network, Any]:
    """Name, transformers' model, and jaxcl's network and params from its file, with the keys as they were given."""
    name, folder = request.param, tmp_path_factory.mktemp("models") / "model"
    model = torch_model(name)
    model.save_pretrained(folder)
    # The file as a release of its style would have written it.
    (folder / "config.json").write_text(json.dumps(content(name)))
    return (name, model, *load_weights(folder))


def tokens(left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on one side, and where they are real."""
    rows = np.random.default_rng(0).integers(5, 50, size=(len(LENGTHS), LENGTH))
    real = REAL[:, ::-1] if left else REAL
    return np.where(real, rows, PAD).astype(np.int32), real


def batch(rows: np.ndarray, real: np.ndarray) -> Batch:
    positions = np.where(real, np.cumsum(real, axis=1) - 1, 0)
    none = jnp.zeros(len(rows), jnp.int32)
    return Batch(
        tokens=jnp.asarray(rows),
        segments=jnp.asarray(real.astype(np.int32)),
        positions=jnp.asarray(positions, jnp.int32),
        predict=None,
        targets=jnp.asarray(rows),
        weights=jnp.ones(rows.shape),
        task=none,
        example=none,
    )


def forget(model: Any) -> None:
    """With dynamic frequencies, a row is computed with those of the longest row before it, until this is undone."""
    rope = model.model.rotary_emb
    if getattr(rope, "rope_type", None) == "dynamic":
        rope.inv_freq = rope.original_inv_freq.clone()
        rope.max_seq_len_cached = rope.original_max_seq_len


def theirs(model: Any, rows: np.ndarray, real: np.ndarray) -> Any:
    """Row by row: dynamic and longrope depend on the longest row of a batch there, on each row's own length here."""
    outs = []
    for row, own in zip(rows, real, strict=True):
        forget(model)
        inputs = torch.tensor(row[None].astype(np.int64)), torch.tensor(own[None].astype(np.int64))
        positions = torch.tensor(np.where(own, np.cumsum(own) - 1, 0)[None])
        with torch.no_grad():
            outs.append(
                model(input_ids=inputs[0], attention_mask=inputs[1], position_ids=positions, output_attentions=True)
            )
    logits = np.concatenate([out.logits.numpy() for out in outs])
    attentions = np.stack(
        [np.concatenate([out.attentions[n].numpy() for out in outs]) for n in range(len(outs[0].attentions))]
    )
    return logits, attentions


@pytest.mark.parametrize("left", [False, True])
def test_logits_and_attention_rows_are_those_of_transformers(both: Any, left: bool) -> None:
    _, model, network, params = both
    rows, real = tokens(left)
    logits, attentions = theirs(model, rows, real)
    given = batch(rows, real)
    heads = jnp.broadcast_to(jnp.arange(network.num_heads), (len(rows), network.num_heads))
    every = jnp.broadcast_to(jnp.arange(LENGTH), (len(rows), LENGTH))
    probe = Probe(lambda view, _: selected_rows(view, heads, every))
    found = jax.jit(lambda params: network.hidden(params, given, probe=probe))(params)
    ours = np.asarray(network.logits(params, found.states))
    assert np.std(logits[real]) > 0.05
    np.testing.assert_allclose(ours[real], logits[real], atol=1e-4, rtol=1e-5)
    masked = real[None, :, None, :, None]
    assert found.probed.shape == attentions.shape
    np.testing.assert_allclose(np.where(masked, found.probed, 0), np.where(masked, attentions, 0), atol=1e-5)


class Forced(transformers.LogitsProcessor):
    """Makes a model write a given text."""

    def __init__(self, text: np.ndarray, prompt: int) -> None:
        self.text, self.prompt = text, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, int(self.text[input_ids.shape[1] - self.prompt])] = 0
        return forced


def test_cached_generation_has_the_logits_of_transformers(both: Any) -> None:
    """A given text is written, so that the comparison does not end with the first tie."""
    _, model, network, params = both
    new = 10
    text = np.random.default_rng(1).integers(5, 50, (len(LENGTHS), new)).astype(np.int32)
    rows, _ = tokens()
    prompts = [rows[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    generate = Generator(network, batch_size=3, prompt_length=LENGTH, max_new_tokens=new, eos_id=None, pad_id=PAD)
    padded, lengths = generate.pad(prompts)

    @jax.jit
    def ours(params: Any) -> jax.Array:
        cache, logits = generation._prefill(network, params, jnp.asarray(padded), jnp.asarray(lengths), new)

        def step(carry: Any, one: Any) -> Any:
            number, token = one
            place, padding = LENGTH + number, LENGTH - jnp.asarray(lengths)
            cache, logits = generation._decode(network, params, token[:, None], place, padding, carry)
            return cache, logits

        steps = jnp.arange(new - 1), jnp.asarray(text.T[:-1])
        return jnp.concatenate([logits[None], jax.lax.scan(step, cache, steps)[1]])

    found = np.asarray(ours(params))
    for row, prompt in enumerate(prompts):
        forget(model)
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PAD,
                logits_processor=[Forced(text[row], len(prompt))],
                output_logits=True,
                return_dict_in_generate=True,
            )
        np.testing.assert_allclose(found[:, row], torch.cat(out.logits).numpy(), atol=1e-4, rtol=1e-5)


def test_exported_models_load_in_transformers_with_identical_logits(both: Any, tmp_path: Path) -> None:
    _, model, network, params = both
    save_hf(tmp_path / "again", network, params, token_ids={"pad_token_id": PAD, "eos_token_id": 3, "bos_token_id": 2})
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(model)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    rows, real = tokens()
    np.testing.assert_array_equal(theirs(again.eval(), rows, real)[0], theirs(model, rows, real)[0])


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_the_routers_loss_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    model = torch_model(name)
    model.save_pretrained(tmp_path / "by-expert")
    model.save_pretrained(tmp_path / "by-layer", save_original_format=False)
    assert any("experts.gate_up_proj" in key for key in load_file(tmp_path / "by-layer" / "model.safetensors"))
    rows, real = tokens()
    inputs = torch.tensor(rows.astype(np.int64)), torch.tensor(real.astype(np.int64))
    with torch.no_grad():
        want = model(input_ids=inputs[0], attention_mask=inputs[1], output_router_logits=True).aux_loss
    given = batch(rows, real)
    for folder in ("by-expert", "by-layer"):
        network, params = load_weights(tmp_path / folder, router_loss_weight=0.1)
        term = router_terms(network, network.hidden(params, given), given)["router"]
        np.testing.assert_allclose(term.sum / term.count, want, rtol=1e-5)


# transformers has no classifier of Granite and OLMoE.
@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"granite", "olmoe"}))
def test_a_classifier_goes_there_and_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    keys = dict(content(name)) | {"num_labels": 3}
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    network, params = load_weights(tmp_path / "model", key=jax.random.key(0), fresh_head=True)
    rows, real = tokens()
    given = batch(rows, real)
    ours = network.classify(params, network.hidden(params, given).states, given)
    for row in range(len(rows)):
        with torch.no_grad():
            found = model(
                input_ids=torch.tensor(rows[row : row + 1].astype(np.int64)),
                attention_mask=torch.tensor(real[row : row + 1].astype(np.int64)),
            )
        np.testing.assert_allclose(ours[row], found.logits[0], atol=1e-4)
