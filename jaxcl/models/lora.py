"""Low-rank adapters: a small trained product added to a frozen kernel (LoRA, Hu et al. 2021, arXiv 2106.09685).

A target with kernel `[inputs.., outputs..]` gets `lora_a` `[inputs.., rank]` and `lora_b` `[rank, outputs..]`, and adds
`(x @ a) @ b * alpha / rank` to its output (section 4.1). They are params like all others, in the same tree, but always
float32: a step's changes are too small for bfloat16. Where a network has adapters, training changes nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array
from pydantic import Field

from jaxcl.models.trainable import ADAPTER_NAMES, Params
from jaxcl.schema import Schema

Target = Literal[
    "query",
    "key",
    "value",
    "out",
    "gate",
    "up",
    "down",
    "tower_query",
    "tower_key",
    "tower_value",
    "tower_out",
    "tower_up",
    "tower_down",
    "connector",
]


VISION_TARGETS = tuple(target for target in get_args(Target) if target.startswith(("tower_", "connector")))
"""Targets of models that see."""


class LoraConfig(Schema):
    """Low-rank adapters of frozen weights; with them, nothing else is trained."""

    rank: int = Field(8, gt=0, description="width of an adapter")
    alpha: float = Field(16.0, gt=0, description="an adapter's output is multiplied by alpha / rank")
    targets: tuple[Target, ...] = Field(
        ("query", "value"),
        min_length=1,
        description="projections of every layer that get one: query, key, value, out of attention; "
        "gate (where there is one), up, down of the feed-forward part; of a model that sees also tower_query, "
        "tower_key, tower_value, tower_out, tower_up, tower_down of every layer of the tower, and connector",
    )

    @property
    def scale(self) -> float:
        """Factor on an adapter's output."""
        return self.alpha / self.rank


def adapter_for(config: LoraConfig | None, target: Target) -> LoraConfig | None:
    """The adapter of a projection, `None` if it has none."""
    return config if config is not None and target in config.targets else None


def check_targets(config: LoraConfig | None, model: str, lacking: Collection[str]) -> None:
    """Refuses adapters of projections that a model lacks.

    Args:
      config: the adapters, if there are any.
      model: what the message calls the model.
      lacking: the projections.

    Raises:
      ValueError: one of them is a target.
    """
    found = [] if config is None else [target for target in config.targets if target in lacking]
    if found:
        allowed = [target for target in get_args(Target) if target not in lacking]
        raise ValueError(f"lora.targets: {model} has no {', '.join(found)}; allowed are {', '.join(allowed)}")


def target_of(path: str) -> str:
    """The target that the projection at `path` is.

    >>> [target_of(path) for path in ("blocks/mlp/up", "vision/tower/blocks/up", "vision/connector")]
    ['up', 'tower_up', 'connector']
    """
    name = path.rpartition("/")[2]
    return f"tower_{name}" if path.startswith("vision/tower/") else name


def initial_std(inputs: tuple[int, ...]) -> float:
    """Standard deviation of a fresh `lora_a`: that of the authors' code, which draws it evenly from +-1/sqrt(inputs).

    >>> initial_std((4, 3))  # 12 inputs
    0.16666666666666666
    """
    return (3 * math.prod(inputs)) ** -0.5


def product(a: Array, b: Array, scale: float) -> Array:
    """What an adapter adds to its kernel: `[inputs.., rank]`, `[rank, outputs..]` to `[inputs.., outputs..]`."""
    return scale * jnp.tensordot(a, b, axes=1)


def stacked(leaves: Params) -> bool:
    """Whether a projection's kernel and adapter have an axis of layers; the connector's have none.

    Args:
      leaves: arrays or shapes, by the names `kernel`, `lora_a`, `lora_b`.
    """
    return leaves["lora_a"].ndim + leaves["lora_b"].ndim == leaves["kernel"].ndim + 3


def is_adapter(path: str) -> bool:
    """Whether a param's path, such as `blocks/attention/query/lora_a`, is that of a part of an adapter."""
    return path.rpartition("/")[2] in ADAPTER_NAMES


def adapted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Params]]:
    """Path and leaves of every projection that has an adapter, in the order of their names.

    >>> dict(adapted({"query": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "out": {"kernel": 4}}))
    {'query': {'kernel': 1, 'lora_a': 2, 'lora_b': 3}}
    """
    for name in sorted(tree):
        node = tree[name]
        if isinstance(node, Mapping):
            if "lora_a" in node:
                yield f"{prefix}{name}", dict(node)
            yield from adapted(node, f"{prefix}{name}/")


def fold(params: Params, config: LoraConfig, key: Array) -> Params:
    """Adds adapters to their kernels and starts fresh ones; the network computes the same. Pure.

    Args:
      params: of a whole network.
      config: its adapters.
      key: from which the new `lora_a` are drawn; the new `lora_b` are zero.

    Returns:
      The changed leaves alone, for `overlay`. Sums are rounded to the kernels' dtype.
    """
    changed: Params = {}
    for number, (path, leaves) in enumerate(adapted(params)):
        kernel, a, b = (leaves[name] for name in ("kernel", *ADAPTER_NAMES))
        layers, own = stacked(leaves), functools.partial(product, scale=config.scale)
        added = (jax.vmap(own) if layers else own)(a, b)
        fresh = initial_std(a.shape[layers:-1]) * jax.random.normal(jax.random.fold_in(key, number), a.shape, a.dtype)
        node = changed
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node |= {
            "kernel": (kernel.astype(jnp.float32) + added).astype(kernel.dtype),
            "lora_a": fresh,
            "lora_b": jnp.zeros_like(b),
        }
    return changed
