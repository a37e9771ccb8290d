"""What a network computes: one decoder and some encoders as pure functions of params, with gates, probes and taps.

A `Network` is made from a configuration and holds no params: `Network.init` draws them, all else takes them. Models
know no mesh and no method.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.models.batch import Batch
    from jaxcl.models.compute import Compute
    from jaxcl.models.deberta import DebertaConfig
    from jaxcl.models.gates import EarlyGates, Gates, SeeingGates
    from jaxcl.models.generation import Generator
    from jaxcl.models.images import Images
    from jaxcl.models.llama import LlamaConfig
    from jaxcl.models.lora import LoraConfig
    from jaxcl.models.modernbert import ModernBertConfig
    from jaxcl.models.network import Hidden, Network
    from jaxcl.models.probe import Probe, Tap
    from jaxcl.models.roberta import RobertaConfig
    from jaxcl.models.trainable import Params, overlay, trained
    from jaxcl.models.vision_config import VisionConfig

__all__ = [
    "Batch",
    "Compute",
    "DebertaConfig",
    "EarlyGates",
    "Gates",
    "Generator",
    "Hidden",
    "Images",
    "LlamaConfig",
    "LoraConfig",
    "ModernBertConfig",
    "Network",
    "Params",
    "Probe",
    "RobertaConfig",
    "SeeingGates",
    "Tap",
    "VisionConfig",
    "overlay",
    "trained",
]
