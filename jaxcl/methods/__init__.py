"""What continual learning adds to training: one file per method, and what the methods share.

`base` says what a method is. `registry` finds one by name and imports no other. `passes` holds the forward and backward
passes that several methods use.
"""

from jaxcl.methods.registry import METHODS, find_method

__all__ = ["METHODS", "find_method"]
