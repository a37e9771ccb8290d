"""Messages between server and clients of federated training as bytes: named arrays and JSON values, nothing else."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxcl.errors import UserError

_WORDS = "words"


def pack(arrays: PyTree, words: Mapping[str, Any]) -> bytes:
    """A message.

    Args:
      arrays: a tree of arrays on the host.
      words: JSON values by name.

    Examples:
      >>> found, words = unpack(pack({"params": {"bias": np.ones(2, np.float32)}}, {"task": 1}))
      >>> found["params/bias"].tolist(), words
      ([1.0, 1.0], {'task': 1})
    """
    content = io.BytesIO()
    leaves = map(np.asarray, jax.tree.leaves(arrays))
    named = {f"arrays/{name}": leaf for name, leaf in zip(paths(arrays), leaves, strict=True)}
    text = np.frombuffer(json.dumps(dict(words)).encode(), np.uint8)
    np.savez(content, allow_pickle=False, **{_WORDS: text, **named})
    return content.getvalue()


def unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name and words of a message.

    Raises:
      UserError: it is not a message.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            sizes = [part.file_size for part in stored.zip.infolist() if part.compress_type == zipfile.ZIP_STORED]
            if len(sizes) < len(stored.files) or sum(sizes) > len(content):
                raise ValueError("it is compressed, or holds more than its bytes")
            found = {name: stored[name] for name in stored.files}
        words = json.loads(found.pop(_WORDS).tobytes())
    except Exception as error:  # zipfile, zlib and numpy have no error type for damaged files
        raise UserError(f"a message cannot be read: {type(error).__name__}") from None
    if not isinstance(words, dict):
        raise UserError("a message cannot be read: its words are not an object")
    if not all(isinstance(array, np.ndarray) for array in found.values()):
        raise UserError("a message cannot be read: it holds something else than arrays")
    return {name.removeprefix("arrays/"): array for name, array in found.items()}, words


def paths(tree: PyTree) -> list[str]:
    """The path of each leaf of a tree, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def tree_like(arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    """Arrays as a tree; those of another tree stay by name, for `why_refused` to say so.

    Args:
      arrays: by name.
      like: a tree of arrays or shapes.
    """
    wanted, structure = paths(like), jax.tree.structure(like)
    if set(wanted) != set(arrays):
        return dict(arrays)
    return jax.tree.unflatten(structure, [arrays[name] for name in wanted])


__all__ = ["pack", "paths", "tree_like", "unpack"]
