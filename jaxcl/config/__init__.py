"""The configuration of a run: types, files, the reference in the docs, and the configurations that come with jaxcl.

`load_config` and the types are loaded when they are asked for, so that a list of the configurations needs no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxcl.config.catalogue import find_config, shipped

if TYPE_CHECKING:
    from jaxcl.config.experiment import ExperimentConfig, load_config, parse_config
    from jaxcl.config.file import ConfigError

__all__ = ["ConfigError", "ExperimentConfig", "find_config", "load_config", "parse_config", "shipped"]

_HOMES = {
    "ConfigError": "file",
    "ExperimentConfig": "experiment",
    "load_config": "experiment",
    "parse_config": "experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
