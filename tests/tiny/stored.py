"""What a method stores with rows, as the run stores it and gives it back; soft masks of a network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.data.plan import Shape
from jaxcl.functional.losses import real_length
from jaxcl.functional.soft_masks import soft_masks
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network
from jaxcl.training.stored import Collate, trim


def masks_of(network: Network, importance: Gates, shared: Any = "free") -> Any:
    """Soft masks of all params of a network."""
    return soft_masks(network.units(), network.shapes(), vars(importance), shared)


def stored_records(method: Method, params: Any, state: Any, batch: Batch, key: int = 0) -> list[dict[str, np.ndarray]]:
    """What the method stores of each row, without padding."""
    signals = jax.jit(method.signals)(params, state, batch, jax.random.key(key))
    host = {name: np.asarray(value) for name, value in signals.items()}
    length, predict = np.asarray(real_length(batch.segments)), np.asarray(real_length(batch.weights))
    return [
        trim(
            {name: value[row] for name, value in host.items()}, method.stored, length=length[row], predict=predict[row]
        )
        for row in range(batch.size)
    ]


def collated(method: Method, params: Any, state: Any, records: Any, length: int, predict: int | None) -> dict[str, Any]:
    """Records as a batch of rows of a shape carries them."""
    return jax.tree.map(jnp.asarray, Collate(method, params, state)(records, Shape(length, predict)))
