"""What continual learning adds to training: one file per method, and what the methods share.

`base` says what a method is, `registry` finds one by name and imports no other, and `passes` holds the forward and
backward passes that several methods use. The mathematics is in `jaxcl.functional`.
"""

from jaxcl.functional.terms import Term as Term
from jaxcl.functional.terms import Terms as Terms
from jaxcl.methods.base import Method, OptimizerParts, Params, State, Stored, Task
from jaxcl.methods.options import MethodOptions, ReplayConfig, ReplayOptions
from jaxcl.methods.registry import METHODS, find_method
from jaxcl.methods.tool_hooks import Exact, ToolHooks

__all__ = [
    "METHODS",
    "Exact",
    "Method",
    "MethodOptions",
    "OptimizerParts",
    "Params",
    "ReplayConfig",
    "ReplayOptions",
    "State",
    "Stored",
    "Task",
    "ToolHooks",
    "find_method",
]
