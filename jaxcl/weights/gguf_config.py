"""From the metadata of a GGUF file to a model configuration."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.rotary import RopeScaling, frequencies
from jaxcl.weights.axes import whole
from jaxcl.weights.gguf_source import Gguf

_FREQUENCIES = "rope_freqs.weight"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"family": "qwen2", "attention_bias": True, "attention_out_bias": False},
    "qwen3": {"family": "qwen3", "qk_norm": "head"},
}
"""What each `general.architecture` sets in addition to the sizes."""

_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def from_gguf(file: Gguf) -> dict[str, Any]:
    """Fields of the model configuration that a GGUF file describes.

    Raises:
      UserError: an architecture or setting that jaxcl does not support, or missing or unusable metadata.
    """
    try:
        return _fields(file)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:  # a value of another type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file.where}: a value of the metadata cannot be used: {reason}") from error


def _fields(file: Gguf) -> dict[str, Any]:
    def need(key: str) -> Any:
        if (value := file.get(key)) is None:
            raise UserError(f"{file.where}: the metadata key {key} is missing")
        return value

    kind = need("general.architecture")
    if kind not in ARCHITECTURES:
        allowed = ", ".join(ARCHITECTURES)
        raise UserError(f"{file.where}: general.architecture={kind} is not supported; allowed are {allowed}")
    if experts := file.get(f"{kind}.expert_count", 0):
        raise UserError(f"{file.where}: a mixture of {experts} experts is not supported; allowed is none")
    heads, hidden = need(f"{kind}.attention.head_count"), need(f"{kind}.embedding_length")
    kv_heads = file.get(f"{kind}.attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise UserError(f"{file.where}: numbers of heads that differ between layers are not supported")
    head_dim = file.get(f"{kind}.attention.key_length", hidden // heads)
    for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
        if (value := file.get(key, head_dim)) != head_dim:
            raise UserError(f"{file.where}: {key}={value} is not supported; allowed is the width of a head, {head_dim}")
    if "token_embd.weight" not in file.shapes:
        raise UserError(f"{file.where}: the tensor token_embd.weight is missing")
    theta = file.get(f"{kind}.rope.freq_base", 10000.0)
    # Qwen's is not used.
    window = file.get("llama.attention.sliding_window")
    return {
        "architecture": "llama",
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": need(f"{kind}.feed_forward_length"),
        "num_layers": need(f"{kind}.block_count"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_length": need(f"{kind}.context_length"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, kind, head_dim, theta),
        "norm_eps": need(f"{kind}.attention.layer_norm_rms_epsilon"),
        "tie_embeddings": "output.weight" not in file.shapes,
        "attention_bias": "blk.0.attn_q.bias" in file.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in file.shapes,
        **ARCHITECTURES[kind],
        # llama.cpp has no other name for a Mistral.
        **({"family": "mistral", "layer_types": ("window",), "window": window} if window else {}),
    }


def token_ids(file: Gguf) -> dict[str, int]:
    """Special token ids, by their names in `config.json`."""
    found = {ours: file.get(theirs) for ours, theirs in _TOKEN_IDS.items()}
    for ours, value in found.items():
        if not isinstance(value, int | None):
            raise UserError(f"{file.where}: {_TOKEN_IDS[ours]} is {value!r}; expected a token id")
    return {name: value for name, value in found.items() if value is not None}


def _rope_scaling(file: Gguf, architecture: str, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The scaling of the rotary frequencies; GGUF stores the llama3 rule only as the resulting factors."""
    if _FREQUENCIES in file.shapes:
        factors = file.read(_FREQUENCIES, whole(file.shapes[_FREQUENCIES]))
        if factors.shape != (head_dim / 2,):
            raise UserError(
                f"{file.where}: {_FREQUENCIES} has {factors.size} factors; expected one for every two of the "
                f"{head_dim} coordinates of a head"
            )
        if np.all(factors == 1):
            return None
        scaling = RopeScaling(type="llama3", factor=float(factors.max()))
        plain = frequencies(head_dim, theta, None)
        if not np.allclose(plain / factors, frequencies(head_dim, theta, scaling), rtol=1e-4):
            raise UserError(
                f"{file.where}: the factors in {_FREQUENCIES} do not follow from the llama3 rule with its usual values "
                "(low_freq_factor 1, high_freq_factor 4, original length 8192)"
            )
        return scaling.model_dump()
    kind = file.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.get(f"{architecture}.rope.scaling.factor", file.get(f"{architecture}.rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    if kind in ("linear", "none"):
        return {"type": "linear", "factor": factor}
    raise UserError(f"{file.where}: {architecture}.rope.scaling.type={kind} is not supported; allowed are none, linear")
