"""Experience replay: a few examples of each earlier task are kept and trained on again.

The baseline that SEEKR's tables call "Replay (1%)". Examples are drawn at random by seed, and remembered rows have
the same loss as new ones. The authors' code keeps the first rows of a task instead, and can turn replay off silently
where the memory is smaller than a batch; here an epoch of a task goes once through the memory, whatever the sizes.
"""

from jaxcl.methods.base import Method, ReplayOptions


class Replay(Method[ReplayOptions]):
    """Trains on remembered examples too."""
