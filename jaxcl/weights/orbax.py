"""Params and configuration in a folder that Orbax writes and reads shard by shard."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jaxtyping import Array

from jaxcl.errors import UserError
from jaxcl.models.network import Network, Params
from jaxcl.weights.folder import new_folder
from jaxcl.weights.locate import ORBAX_CONFIG
from jaxcl.weights.tables import Row, Table
from jaxcl.weights.tree import flatten, unflatten

_PARAMS = "params"


def save_orbax(
    folder: str | os.PathLike[str],
    network: Network,
    params: Params,
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes params, every process its own shards, and the network's configuration.

    The configuration's `compute.param_dtype` becomes that of the params.

    Args:
      folder: a folder that does not exist yet or is empty.
      network: the network.
      params: its params, with any sharding.
      tokenizer_folder: where tokenizer files are copied from.

    Returns:
      The folder.

    Raises:
      UserError: the folder is in use, or cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    with new_folder(target, tokenizer_folder) as partial:
        with ocp.PyTreeCheckpointer() as checkpointer, _disk_errors():
            checkpointer.save(partial / _PARAMS, params)
        if jax.process_index() == 0:
            config = network.config.model_dump(mode="json")
            # The params may have been cast: they are read back with the dtype they are written with.
            config["compute"]["param_dtype"] = str(jax.tree.leaves(params["embed"])[0].dtype)
            (partial / ORBAX_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns Orbax's ValueError for a full disk, which has the system's error code in its text, into an OSError."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


class Orbax:
    """The params in an Orbax folder.

    Attributes:
      where: the folder, for messages.
      shapes: shape of every param, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._params = (folder / _PARAMS).absolute()
        self._checkpointer = ocp.PyTreeCheckpointer()
        try:
            tree = self._checkpointer.metadata(self._params).item_metadata.tree
        except (OSError, ValueError, AttributeError) as error:
            self._checkpointer.close()
            raise UserError(f"{self._params} is not a complete Orbax checkpoint: {error}") from None
        self.shapes = {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}

    def table(self, paths: Iterable[str]) -> Table:
        """A table in which every param is named by its path; `paths` are those of the network."""
        rows = []
        for path in sorted({*paths, *self.shapes}):
            axes = " ".join(f"axis{number}" for number in range(len(self.shapes.get(path, ()))))
            rows.append(Row(path, path, f"{axes} -> {axes}"))
        return Table(prefix="", rows=tuple(rows))

    def restore(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct], places: Mapping[str, Sharding | None]
    ) -> dict[str, Array]:
        """Reads params by path, with the dtypes of `shapes`, to their shardings."""
        flat = {}
        # One at a time: a param without a sharding passes through host memory.
        for path, leaf in shapes.items():
            sharding = places[path]
            if sharding is None:
                args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            else:
                args = ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape)
            request = ocp.args.PyTreeRestore(
                item=unflatten({path: 0}), restore_args=unflatten({path: args}), partial_restore=True
            )
            value = flatten(self._checkpointer.restore(self._params, args=request))[path]
            flat[path] = jnp.array(value, copy=True) if sharding is None else value
        return flat

    def __enter__(self) -> Orbax:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpointer.close()
