"""The configuration of a run: types, files, the reference in the docs, and the configurations that come with jaxcl.

Each name is imported when it is first used, so that a list of the configurations needs no jax.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.config.catalogue import find_config, shipped
    from jaxcl.config.experiment import ExperimentConfig, load_config, parse_config
    from jaxcl.config.file import ConfigError

__all__ = ["ConfigError", "ExperimentConfig", "find_config", "load_config", "parse_config", "shipped"]
