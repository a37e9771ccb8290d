"""Experience replay: a few examples of each earlier task are kept and trained on again.

The baseline that SEEKR's tables call "Replay (1%)". Examples are drawn at random by seed, and remembered rows have
the same loss as new ones. The authors' code keeps the first rows of a task instead, and can turn replay off silently
where the memory is smaller than a batch; here an epoch of a task goes once through the memory, whatever the sizes.
"""

from typing import Any, ClassVar

from pydantic import Field

from jaxcl.methods import base
from jaxcl.models.network import ModelConfig, Network
from jaxcl.schema import Schema


class ReplayConfig(base.MethodConfig):
    """Options of `replay`."""

    replay: base.Replay = Field(base.Replay(), description="which examples are kept and how they come back")


class Replay(base.Method):
    """Trains on remembered examples too."""

    Config: ClassVar[type[Schema]] = ReplayConfig

    @classmethod
    def check(cls, config: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        config.replay.check()

    def __init__(self, config: Any, network: Network, num_tasks: int) -> None:
        super().__init__(config, network, num_tasks)
        self.replay = config.replay
