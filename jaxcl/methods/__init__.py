"""What continual learning adds: one file a method, and the pure functions they share."""

from jaxcl.methods.base import Method
from jaxcl.methods.das import Das
from jaxcl.methods.joint import Joint
from jaxcl.methods.replay import Replay
from jaxcl.methods.seekr import Seekr
from jaxcl.methods.sequential import Sequential

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "joint": Joint,
    "replay": Replay,
    "das": Das,
    "seekr": Seekr,
}
"""Methods by the name a configuration gives them."""
