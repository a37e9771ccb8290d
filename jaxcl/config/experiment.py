"""The configuration of a run: one typed tree, from YAML and overrides, with the model read from its weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from jaxcl.config.file import ConfigError, apply_overrides, read_yaml, validate
from jaxcl.data.spec import DataConfig, TaskSpec, TokenizerConfig
from jaxcl.errors import UserError
from jaxcl.evaluation.config import EvaluationConfig
from jaxcl.methods.base import Method
from jaxcl.methods.registry import METHODS, find_method
from jaxcl.models.network import ModelConfig, Network
from jaxcl.schema import Schema
from jaxcl.sharding.mesh import MeshConfig
from jaxcl.training.config import TrainingConfig
from jaxcl.training.optimizer import OptimizerConfig


class MethodSection(Schema):
    """A method by name, and its own options beside the name."""

    name: str = Field(description="registered name, or `module:Class` for a method outside jaxcl")
    options: SerializeAsAny[Schema] = Field(description="the method's own options")

    def build(self, network: Network, num_tasks: int) -> Method:
        """The method, for a network and a number of tasks."""
        return find_method(self.name)(self.options, network, num_tasks)


def _split_method(value: Any) -> Any:
    """Turns `{name: das, mask_on: update}` into a `MethodSection`, validated by the method's own type."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"needs a name; allowed: {', '.join(METHODS)}, or module:Class")
    options = {key: item for key, item in value.items() if key != "name"}
    section = find_method(str(value["name"])).Config
    return {"name": value["name"], "options": validate(section, options, "method")}


class ExperimentConfig(Schema):
    """Everything a run is determined by."""

    seed: int = Field(0, ge=0, description="seed of everything random: params, order of examples, dropout, memory")
    output: str = Field(min_length=1, description="the run folder")
    data_root: str = Field(
        ".", description="folder that relative task files start from; the environment's JAXCL_DATA replaces it"
    )
    weights: str | None = Field(
        None,
        description="pre-trained model: Hugging Face folder, .gguf file, Orbax folder or package:NAME; none: random",
    )
    model: ModelConfig = Field(
        description="the network; with `weights`, only the keys that differ from what the weights say"
    )
    tokenizer: TokenizerConfig = Field(
        default_factory=TokenizerConfig, description="with `weights`, none of it is needed: theirs is used"
    )
    data: DataConfig = Field(default_factory=DataConfig, description="windows, packing, masking and buckets")
    tasks: tuple[TaskSpec, ...] = Field(min_length=1, description="the sequence of tasks or domains, in order")
    method: Annotated[MethodSection, BeforeValidator(_split_method)] = Field(
        description="the continual-learning method: its name and, beside the name, its own options"
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="steps, batches, checkpoints")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer and schedule")
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="how devices are arranged")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is measured, and how")

    @model_validator(mode="after")
    def _task_names_differ(self) -> ExperimentConfig:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks: the name {repeated[0]!r} stands twice; every task needs its own")
        return self

    def plain(self) -> dict[str, Any]:
        """Nested plain values, as `config.yaml` holds them; `ExperimentConfig` reads them back."""
        content = self.model_dump(mode="json")
        content["method"] = {"name": self.method.name, **content["method"]["options"]}
        return content


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Reads a configuration file.

    Args:
      path: a YAML file.
      overrides: `KEY=VALUE` with dotted keys; `tasks.*.train=100` sets a key of every task.

    Returns:
      The configuration, complete with defaults, and with the model's sizes read from `weights` where given.

    Raises:
      ConfigError: one line that names the key, the value, what is allowed and the nearest valid name.
    """
    return parse_config(apply_overrides(read_yaml(Path(path)), overrides), str(path))


def parse_config(content: dict[str, Any], origin: str = "config") -> ExperimentConfig:
    """Validates nested plain values; `origin` opens the error messages. See `load_config`.

    Args:
      content: the configuration.
      origin: where it comes from; opens the error messages.
    """
    content = dict(content)
    if root := os.environ.get("JAXCL_DATA"):
        content["data_root"] = root
    weights, model = content.get("weights"), content.get("model") or {}
    # A model that says its architecture stands for itself; one that does not takes its sizes from the weights.
    if isinstance(weights, str) and isinstance(model, dict) and "architecture" not in model:
        from jaxcl.weights import read_config

        try:
            # Given before the rest: a window that the weights alone would need may be one that jaxcl does not have.
            window = {"max_length": model["max_length"]} if "max_length" in model else {}
            base = read_config(weights, **window).model_dump(mode="json")
        except UserError as error:
            raise ConfigError(f"{origin}: weights: {error}") from None
        content["model"] = _merge(base, model)
    config = validate(ExperimentConfig, content, origin)
    _check_model(config, origin)
    return config


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def _check_model(config: ExperimentConfig, origin: str) -> None:
    """What only shows when sections are held against each other."""
    try:
        find_method(config.method.name).check(config.method.options, config.model)
    except (ValueError, ValidationError) as error:
        raise ConfigError(f"{origin}: method.{error}") from None
