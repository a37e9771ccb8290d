"""Rearranges axes between a tensor in a file and a parameter, in both directions, also for slices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Index = tuple[slice, ...]
Group = tuple[str, ...]

# Axes of fixed size.
_FIXED = {"pair": 2}


def _groups(side: str) -> tuple[Group, ...]:
    groups: list[Group] = []
    inside: list[str] | None = None
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            inside = []
        elif word == ")":
            groups.append(tuple(inside or ()))
            inside = None
        elif inside is not None:
            inside.append(word)
        else:
            groups.append((word,))
    return tuple(groups)


def whole(shape: Sequence[int]) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, size) for size in shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A rearrangement of axes, written as in `"(heads head_dim) embed -> embed heads head_dim"`.

    Axes in parentheses are merged into one dimension, with the first one slowest. The left side is the tensor in the
    file, the right side the parameter. A slice of the parameter can be read without reading the whole tensor, as far as
    the slowest axes of the tensor's dimensions allow.

    Attributes:
      source: axis names per dimension in the file.
      target: axis names per dimension of the parameter.
    """

    source: tuple[Group, ...]
    target: tuple[Group, ...]

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> Layout:
        """Parses a layout.

        Raises:
          ValueError: the two sides do not name the same axes.
        """
        left, _, right = text.partition("->")
        layout = cls(_groups(left), _groups(right))
        if sorted(layout._source_axes) != sorted(layout._target_axes):
            raise ValueError(f"layout: the two sides of {text!r} do not name the same axes")
        return layout

    @property
    def _source_axes(self) -> list[str]:
        return [axis for group in self.source for axis in group]

    @property
    def _target_axes(self) -> list[str]:
        return [axis for group in self.target for axis in group]

    def _sizes(self, target_shape: Sequence[int]) -> dict[str, int]:
        sizes = dict(_FIXED)
        for group, size in zip(self.target, target_shape, strict=True):
            unknown = [axis for axis in group if axis not in _FIXED]
            known = math.prod(_FIXED[axis] for axis in group if axis in _FIXED)
            if len(unknown) != 1 or size % known:
                raise ValueError(f"layout: {group} does not fit a dimension of size {size}")
            sizes[unknown[0]] = size // known
        return sizes

    def source_shape(self, target_shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape in the file, for a parameter of a given shape.

        >>> Layout.parse("(heads head_dim) embed -> embed heads head_dim").source_shape((16, 2, 8))
        (16, 16)
        """
        sizes = self._sizes(target_shape)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.source)

    def read(self, fetch: Callable[[Index], np.ndarray], target_shape: Sequence[int], index: Index) -> np.ndarray:
        """A part of the parameter.

        Args:
          fetch: reads a part of the tensor in the file.
          target_shape: shape of the whole parameter.
          index: the part, a slice with start and stop per dimension.

        Returns:
          The part; a view of what `fetch` returned if the layout allows it.
        """
        sizes = self._sizes(target_shape)
        bounds = {axis: (0, size) for axis, size in sizes.items()}
        for group, cut in zip(self.target, index, strict=True):
            if len(group) == 1:
                bounds[group[0]] = (cut.start, cut.stop)
        # In the file, a dimension is sliced along its slowest axis; the other axes are sliced after reading.
        inner = [math.prod(sizes[axis] for axis in group[1:]) for group in self.source]
        rows = tuple(
            slice(bounds[group[0]][0] * step, bounds[group[0]][1] * step)
            for group, step in zip(self.source, inner, strict=True)
        )
        slowest = {group[0] for group in self.source}
        read_sizes = {a: bounds[a][1] - bounds[a][0] if a in slowest else sizes[a] for a in self._source_axes}
        part = fetch(rows).reshape([read_sizes[axis] for axis in self._source_axes])
        part = part[tuple(slice(None) if axis in slowest else slice(*bounds[axis]) for axis in self._source_axes)]
        part = part.transpose([self._source_axes.index(axis) for axis in self._target_axes])
        part = part.reshape([math.prod(bounds[a][1] - bounds[a][0] for a in group) for group in self.target])
        return part[tuple(slice(None) if len(g) == 1 else i for g, i in zip(self.target, index, strict=True))]

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor for the file, contiguous.

        >>> Layout.parse("(heads head_dim) embed -> embed heads head_dim").write(np.zeros((16, 2, 8))).shape
        (16, 16)
        """
        return np.ascontiguousarray(self.arranged(parameter))

    def arranged(self, parameter: Any) -> Any:
        """The tensor for the file, of the kind of `parameter`: NumPy's or jax's."""
        sizes = self._sizes(parameter.shape)
        split = parameter.reshape([sizes[axis] for axis in self._target_axes])
        moved = split.transpose([self._target_axes.index(axis) for axis in self._source_axes])
        return moved.reshape(self.source_shape(parameter.shape))
