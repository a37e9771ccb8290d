"""Plain fine-tuning on one task after another (NCL in the DAS paper, SeqFT in SEEKR's): the lower bound."""

from jaxcl.methods.base import Method, MethodOptions


class Sequential(Method[MethodOptions]):
    """Does nothing against forgetting."""
