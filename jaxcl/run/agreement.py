"""What server and clients of a federated run over a network have to configure alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcl.config import ExperimentConfig
from jaxcl.run.folder import flatten, within

_ALIKE = ("seed", "model", "method", "optimizer", "federated", "training.batch_size", "training.accumulate", "data")
_OWN = ("federated.owners", "data.cache")


def agreed(config: ExperimentConfig) -> dict[str, Any]:
    """The values that all have to have, by dotted key.

    Args:
      config: the configuration of a server or of a client.
    """
    values = dict(flatten(config.plain()))
    return {key: value for key, value in values.items() if within(key, _ALIKE) and not within(key, _OWN)}


def difference(own: Mapping[str, Any], server: Mapping[str, Any]) -> str | None:
    """The first key that differs, in words; `None` if there is none.

    Args:
      own: `agreed` of a client.
      server: `agreed` of the server.

    Examples:
      >>> difference({"seed": 1, "federated.rounds": 4}, {"seed": 1, "federated.rounds": 8})
      'federated.rounds is 4, and at the server 8'
    """
    for key in sorted(own.keys() | server.keys()):
        if own.get(key) != server.get(key):
            return f"{key} is {own.get(key)}, and at the server {server.get(key)}"
    return None


__all__ = ["agreed", "difference"]
