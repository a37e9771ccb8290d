"""The pure training step and what surrounds it: state, optimizer, loop, checkpoints, metrics."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.training.checkpoint import Checkpoints, Saved
    from jaxcl.training.compile import Compiler, enable_compilation_cache
    from jaxcl.training.config import TrainingConfig
    from jaxcl.training.feed import Feed, place_batch
    from jaxcl.training.loop import train_task
    from jaxcl.training.optimizer import OptimizerConfig, make_parts
    from jaxcl.training.privacy import PrivacyConfig
    from jaxcl.training.schedule import learning_rate
    from jaxcl.training.sinks import JsonLines, Sink, TensorBoard, open_sinks
    from jaxcl.training.state import TrainState
    from jaxcl.training.step import make_train_step
    from jaxcl.training.task import RunningTask
    from jaxcl.training.trainer import Trainer
    from jaxcl.training.watch import NotFinite, Watch

__all__ = [
    "Checkpoints",
    "Compiler",
    "Feed",
    "JsonLines",
    "NotFinite",
    "OptimizerConfig",
    "PrivacyConfig",
    "RunningTask",
    "Saved",
    "Sink",
    "TensorBoard",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "Watch",
    "enable_compilation_cache",
    "learning_rate",
    "make_parts",
    "make_train_step",
    "open_sinks",
    "place_batch",
    "train_task",
]
