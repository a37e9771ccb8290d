"""The configuration of a run: types, files, the reference in the docs, and the configurations that come with jaxcl."""

from jaxcl.config.experiment import ExperimentConfig, load_config, parse_config
from jaxcl.config.file import ConfigError

__all__ = ["ConfigError", "ExperimentConfig", "load_config", "parse_config"]
