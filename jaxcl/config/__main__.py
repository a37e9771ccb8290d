"""`python -m jaxcl.config` prints the configuration reference."""

from jaxcl.config.experiment import ExperimentConfig
from jaxcl.config.reference import reference

print(reference(ExperimentConfig), end="")
