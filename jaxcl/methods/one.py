"""A model of its own for every task: no forgetting, no transfer, as many models as tasks (ONE in DAS's tables).

Each task starts again from the params the run began with and is answered by the model that learned it. What a
continual method gains over this is what the tasks have to say to each other. The latest checkpoint is the last task's
model; `training.keep_tasks: null` keeps them all.
"""

from jaxcl.methods.base import Method, MethodOptions


class One(Method[MethodOptions]):
    """Trains a separate model for each task."""

    individual = True
