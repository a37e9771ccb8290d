"""Tiny networks twice, here and in torch with the same params, and examples for them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import transformers

from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights import save_hf
from jaxcl.weights.tree import flatten, unflatten

VOCAB = 23
_SHAPE = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2, "max_length": 32}
_CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "roberta": transformers.RobertaForMaskedLM,
}


def make_network(name: str, **changes: Any) -> Network:
    if name == "llama":
        grouped = {"num_heads": 4, "num_kv_heads": 2, "attention_bias": True, "mlp_bias": True}
        return Network.create(LlamaConfig(**{**_SHAPE, **grouped, **changes}))
    quiet = {"num_heads": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return Network.create(RobertaConfig(**{**_SHAPE, **quiet, **changes}))


def random_params(network: Network, seed: int = 0) -> Any:
    """Random in every param: biases and norms too."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.2 if path.endswith(("scale", "bias")) else 0.5
        return jnp.asarray(rng.normal(size=leaf.shape, scale=scale) + path.endswith("scale"), leaf.dtype)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(network.shapes()).items()})


class Example(NamedTuple):
    """One row without padding: which positions are scored, and what is expected there."""

    tokens: np.ndarray
    scored: np.ndarray
    targets: np.ndarray


def make_examples(lengths: tuple[int, ...], seed: int = 0) -> list[Example]:
    """Of an example of n tokens, about n / 2 positions are scored."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        scored = np.sort(rng.permutation(length)[: (length + 1) // 2])
        tokens, targets = rng.integers(2, VOCAB, length), rng.integers(2, VOCAB, len(scored))
        examples.append(Example(tokens, scored, targets))
    return examples


def to_batch(examples: list[Example], length: int | None = None, fillers: int = 0) -> Batch:
    """The examples padded to `length`, and filler rows; `None` pads to the longest."""
    rows = len(examples) + fillers
    length = length or max(len(example.tokens) for example in examples)
    most = max(len(example.scored) for example in examples)
    fields: dict[str, np.ndarray] = {
        "tokens": np.ones((rows, length), np.int32),
        "segments": np.zeros((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32),
        "predict": np.zeros((rows, most), np.int32),
        "targets": np.zeros((rows, most), np.int32),
        "weights": np.zeros((rows, most), np.float32),
        "task": np.zeros(rows, np.int32),
        "example": np.full(rows, -1, np.int32),
    }
    for row, example in enumerate(examples):
        size, count = len(example.tokens), len(example.scored)
        fields["tokens"][row, :size] = example.tokens
        fields["segments"][row, :size] = 1
        fields["positions"][row, :size] = np.arange(size)
        fields["predict"][row, :count] = example.scored
        fields["targets"][row, :count] = example.targets
        fields["weights"][row, :count] = 1
        fields["example"][row] = row
    return Batch(**{name: jnp.asarray(value) for name, value in fields.items()})


def to_torch(network: Network, params: Any) -> torch.nn.Module:
    """The model of transformers with these params, in float64, with explicit attention."""
    kind = _CLASSES[network.config.architecture]
    with tempfile.TemporaryDirectory() as folder:
        path = save_hf(Path(folder) / "model", network, params)
        return kind.from_pretrained(path, attn_implementation="eager").double().eval()


def by_torch_names(network: Network, tree: Any) -> dict[str, torch.Tensor]:
    """A tree of the params' shapes (gradients, masks, params), as the model of transformers would hold it."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_hf(Path(folder) / "tree", network, tree)
        return safetensors.torch.load_file(path / "model.safetensors")


NOTHING = 1e-9
"""Below this a value in float64 is 0: softmax does not see a constant added to its scores, a norm not one scale."""


def assert_close(found: Any, expected: torch.Tensor, tolerance: float = 1e-4, what: str = "") -> None:
    """Equal to `tolerance` times the largest expected value; where all of these are 0, 0 to float32's rounding."""
    wanted = expected.detach().numpy()
    largest = np.abs(wanted).max()
    allowed = 1e-6 if largest < NOTHING else tolerance * largest
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=allowed, err_msg=what)
