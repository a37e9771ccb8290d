"""The params of a run's model as a table: shape, dtype, logical axes, bytes, and how the mesh splits them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jaxcl.commands.show import size, table
from jaxcl.config import ExperimentConfig
from jaxcl.config.file import validate
from jaxcl.models.network import Network
from jaxcl.models.trainable import trained
from jaxcl.run.folder import RunFolder
from jaxcl.sharding.mesh import AXES, MeshConfig
from jaxcl.sharding.rules import PARAM_RULES, partition


def params_table(folder: Path, *, trust: bool = False) -> str:
    """The table for a run folder, with totals of what is trained and what is frozen.

    The mesh is that of the configuration; an axis of -1 counts as one way, because the table knows no devices.

    Args:
      folder: the run folder.
      trust: whether its configuration may name code outside jaxcl; see `jaxcl.config.trust`.

    Raises:
      UserError: it is not a run folder, or the mesh does not fit the params.
    """
    opened = RunFolder.open(folder)
    config = validate(ExperimentConfig, opened.content(trust=trust), str(opened.config_file))
    return "\n".join(_lines(Network.create(config.model), _mesh(config.mesh)))


def _mesh(config: MeshConfig) -> AbstractMesh:
    return AbstractMesh(tuple(max(getattr(config, name), 1) for name in AXES), AXES)


def _lines(network: Network, mesh: AbstractMesh) -> Iterator[str]:
    shapes, axes = network.shapes(), network.axes()
    leaves = dict(_flat(shapes))
    names = dict(_flat(axes))
    learned = dict(_flat(trained(shapes)))
    columns = {
        "shape": _texts(shapes, lambda leaf: " x ".join(map(str, leaf.shape))),
        "dtype": _texts(shapes, lambda leaf: str(leaf.dtype)),
        "axes": _texts(axes, lambda leaf: ", ".join(name or "-" for name in leaf)),
        "unit": _texts(network.units(), lambda unit: unit.kind if unit else ""),
    }
    # `data` splits no params: it makes more whole copies.
    splitting = {axis for mesh_axes in PARAM_RULES.values() for axis in mesh_axes}
    split = {name: ways for name, ways in mesh.shape.items() if ways > 1 and name in splitting}
    specs = {path: partition(names[path], leaf.shape, mesh, PARAM_RULES, path) for path, leaf in leaves.items()}
    if split:
        columns["split over"] = {path: _split(names[path], spec) for path, spec in specs.items()}
    if len(learned) < len(leaves):
        columns["trained"] = {path: "yes" if path in learned else "" for path in leaves}
    columns["bytes"] = _texts(shapes, lambda leaf: size(_bytes(leaf)))
    rows = [[path, *(texts[path] for texts in columns.values())] for path in leaves]
    yield from table([["param", *columns], *rows], left=len(columns))
    numbers = {path: math.prod(leaf.shape) for path, leaf in _flat(network.unquantised.shapes())}
    for name, paths in (("trained", learned.keys()), ("frozen", leaves.keys() - learned.keys())):
        if paths:
            held = sum(_bytes(leaves[path]) for path in paths)
            yield f"{name}: {sum(numbers.get(path, 0) for path in paths):,} params, {size(held)}"
    if split:
        own = sum(_bytes(leaf) / _ways(specs[path], mesh) for path, leaf in leaves.items())
        yield f"each device ({', '.join(f'{name} {ways}' for name, ways in split.items())}): {size(own)}"


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from _flat(node, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", node


def _texts(tree: Any, text: Callable[[Any], str]) -> dict[str, str]:
    """A column of the table: a text for each leaf of a tree like params, by its path."""
    return {path: text(leaf) for path, leaf in _flat(tree)}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _split(names: Any, spec: Any) -> str:
    """Which axes are split over which mesh axes: `embed/fsdp, heads/tensor`."""
    parts = zip(names, (*spec, *[None] * len(names)), strict=False)
    return ", ".join(f"{name}/{axis if isinstance(axis, str) else '+'.join(axis)}" for name, axis in parts if axis)


def _ways(spec: Any, mesh: AbstractMesh) -> int:
    axes = [axis for entry in spec if entry for axis in ([entry] if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[axis] for axis in axes)
