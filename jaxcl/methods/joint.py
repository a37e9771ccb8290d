"""Training on the examples of all tasks at once (multi-task learning): the upper bound, and no continual learning."""

from jaxcl.methods.base import Method, MethodOptions


class Joint(Method[MethodOptions]):
    """Sees every task from the start."""

    joint = True
