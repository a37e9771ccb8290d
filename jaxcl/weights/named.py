"""Trees like the params by the names of a Hugging Face checkpoint, without a file."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from jaxcl.models.network import Network, Params
from jaxcl.models.quantised import dequantised
from jaxcl.weights.save import Tensor, param_of, table_of, tensors_of
from jaxcl.weights.tree import flatten


def named(network: Network, tree: Params) -> dict[str, Array]:
    """The leaves of a tree as transformers names them and lays them out; pure, can be jitted.

    For params these are the tensors that `save_hf` writes and `load_params` reads. Gradients, masks or moments can be
    compared with those of a torch model in the same way. Quantised kernels are dequantised. Adapters are not merged:
    they have PEFT's names. A head that is the embedding is not repeated.

    Args:
      network: the network.
      tree: the tree of its params or a part of it, such as `trained(params)`. Leaves have the shapes of the params or
        broadcast to them, as soft masks do.

    Returns:
      One tensor per name, in the dtype of its leaf.

    Raises:
      ValueError: a leaf that the network has no param for, or whose shape does not broadcast to it; or a part of a
        tree that has only some of the params of a tensor.

    Examples:
      >>> import jax
      >>> from jaxcl.models import LlamaConfig
      >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2)
      >>> network = Network.create(config)
      >>> tensors = named(network, network.init(jax.random.key(0)))
      >>> tensors["model.layers.1.mlp.up_proj.weight"].shape
      (12, 8)
    """
    shapes = {path: leaf.shape for path, leaf in flatten(network.unquantised.shapes()).items()}
    flat = {}
    for path, leaf in flatten(dequantised(tree)).items():
        if path not in shapes:
            raise ValueError(f"tree: the network has no param {path}")
        try:
            flat[path] = jnp.broadcast_to(leaf, shapes[path])
        except ValueError:
            raise ValueError(
                f"tree: {path} has shape {list(jnp.shape(leaf))}, which does not broadcast to {list(shapes[path])}"
            ) from None
    try:
        tensors = list(tensors_of(table_of(network), flat))
    except KeyError as error:
        raise ValueError(f"tree: {error} is missing, which makes one tensor together with others of the tree") from None
    return {tensor.name: _whole(flat, tensor) for tensor in tensors}


def _whole(flat: Mapping[str, Array], tensor: Tensor) -> Array:
    held = [param_of(flat, row.path, tensor.layer) for row in tensor.rows]
    held = held if tensor.expert is None else [part[tensor.expert] for part in held]
    parts = [row.layout.arranged(part) for row, part in zip(tensor.rows, held, strict=True)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
