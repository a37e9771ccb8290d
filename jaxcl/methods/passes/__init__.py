"""Forward and backward passes of a network that several methods use."""

from jaxcl.methods.passes.heads import add_forgettability, add_sensitivity
from jaxcl.methods.passes.importance import add_domain_importance, add_general_importance, dropout_divergence
from jaxcl.methods.passes.losses import (
    example_losses,
    language_model_loss,
    language_model_terms,
    router_terms,
)

__all__ = [
    "add_domain_importance",
    "add_forgettability",
    "add_general_importance",
    "add_sensitivity",
    "dropout_divergence",
    "example_losses",
    "language_model_loss",
    "language_model_terms",
    "router_terms",
]
