"""What continual learning adds: one file a method, and the pure functions they share."""

from jaxcl.methods.base import Method
from jaxcl.methods.das import Das
from jaxcl.methods.derpp import Derpp
from jaxcl.methods.ewc import Ewc
from jaxcl.methods.joint import Joint
from jaxcl.methods.lwf import Lwf
from jaxcl.methods.olora import Olora
from jaxcl.methods.one import One
from jaxcl.methods.progressive_prompts import ProgressivePrompts
from jaxcl.methods.replay import Replay
from jaxcl.methods.seekr import Seekr
from jaxcl.methods.sequential import Sequential

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "one": One,
    "joint": Joint,
    "ewc": Ewc,
    "lwf": Lwf,
    "replay": Replay,
    "derpp": Derpp,
    "das": Das,
    "seekr": Seekr,
    "olora": Olora,
    "progressive_prompts": ProgressivePrompts,
}
"""Methods by the name a configuration gives them."""
