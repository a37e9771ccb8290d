"""The configuration of a run: a typed tree from YAML and overrides; the model's sizes can come from its weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from jaxcl.config.catalogue import find_config
from jaxcl.config.file import ConfigError, apply_overrides, read_yaml, takes_text, validate
from jaxcl.data.formats.storage import is_url
from jaxcl.data.places import place
from jaxcl.data.spec import DataConfig, TaskSpec, TokenizerConfig
from jaxcl.errors import UserError
from jaxcl.evaluation.config import EvaluationConfig
from jaxcl.methods.base import Method
from jaxcl.methods.registry import METHODS, find_method
from jaxcl.models.network import ModelConfig, Network
from jaxcl.schema import Schema
from jaxcl.sharding.mesh import MeshConfig
from jaxcl.training.config import TrainingConfig
from jaxcl.training.federated import FederatedConfig
from jaxcl.training.optimizer import OptimizerConfig


class MethodSection(Schema):
    """A method's name and options."""

    name: str = Field(description="registered name, or `module:Class` for a method outside jaxcl")
    options: SerializeAsAny[Schema] = Field(description="the method's options")

    def build(self, network: Network, num_tasks: int) -> Method:
        """The method, for a network and a number of tasks."""
        return find_method(self.name)(self.options, network, num_tasks)


def _split_method(value: Any) -> Any:
    """Turns `{name: das, hold: pull}` into a `MethodSection` with options of the method's type."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"needs a name; allowed: {', '.join(METHODS)}, or module:Class")
    options = {key: item for key, item in value.items() if key != "name"}
    section = find_method(str(value["name"])).Options
    return {"name": value["name"], "options": validate(section, options, "method")}


class ExperimentConfig(Schema):
    """Everything that determines a run."""

    seed: int = Field(0, ge=0, description="seed of everything random: params, order of examples, dropout, memory")
    output: str = Field(
        min_length=1,
        description="the run folder; `~` is the home folder, here and in all paths; or a URL (`gs://`, `s3://`, ...)",
    )
    local_output: str | None = Field(
        None,
        description="for an output at a URL: the local folder that is kept there; none: one in the user's cache folder",
    )
    data_root: str = Field(
        ".", description="folder for relative paths in task sources; the environment variable JAXCL_DATA replaces it"
    )
    weights: str | None = Field(
        None,
        description="pre-trained model: Hugging Face folder, .gguf file, Orbax folder or package:NAME; none: random",
    )
    fresh_head: bool = Field(
        False, description="whether a head that predicts tokens may start at random if `weights` has none"
    )
    model: ModelConfig = Field(description="the network; with `weights`, what is not given is as in the weights")
    tokenizer: TokenizerConfig = Field(
        default_factory=TokenizerConfig, description="the tokenizer; with `weights`, the default is theirs"
    )
    data: DataConfig = Field(default_factory=DataConfig, description="lengths, packing, masking and buckets")
    tasks: tuple[TaskSpec, ...] = Field(min_length=1, description="the sequence of tasks or domains, in order")
    method: Annotated[MethodSection, BeforeValidator(_split_method)] = Field(
        description="the continual-learning method: its name, and its options in the same section"
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="steps, batches, checkpoints")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer and schedule")
    federated: FederatedConfig | None = Field(
        None, description="several clients that learn one model, for `jaxcl federate`; none: one learns alone"
    )
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="how the devices are split")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is measured, and how")

    @field_validator("output", "local_output", "data_root", "weights")
    @classmethod
    def _is_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.field_name == "output" and is_url(str(value)):
            return value
        return value and place(value)

    @model_validator(mode="after")
    def _local_output_serves_a_url(self) -> ExperimentConfig:
        if self.local_output is not None and not is_url(self.output):
            raise ValueError(f"local_output: output is a folder already ({self.output!r}); local_output is for URLs")
        return self

    @model_validator(mode="after")
    def _task_names_differ(self) -> ExperimentConfig:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks: the name {repeated[0]!r} appears twice; names must be unique")
        return self

    def plain(self) -> dict[str, Any]:
        """Nested plain values as in `config.yaml`, from which `ExperimentConfig` can be validated again."""
        content = self.model_dump(mode="json")
        content["method"] = {"name": self.method.name, **content["method"]["options"]}
        return content


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Reads a configuration file.

    Args:
      path: a YAML file, or the name of a configuration that comes with jaxcl; see `jaxcl.config.find_config`.
      overrides: `KEY=VALUE` with dotted keys; `tasks.*.train=100` sets a key of every task.

    Returns:
      The configuration with all defaults, and with the model's sizes from `weights` if given.

    Raises:
      UserError: one line that names the key, the value, what is allowed and the nearest valid name.
    """
    return parse_config(override(read_yaml(find_config(os.fspath(path))), overrides), str(path))


def override(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets dotted keys of a configuration's plain values; see `apply_overrides`."""
    return apply_overrides(content, overrides, _is_text)


def _is_text(path: Sequence[str], content: Mapping[str, Any]) -> bool:
    if path[0] != "method":
        return takes_text(ExperimentConfig, path)
    method = content.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    if path[1:] == ["name"]:
        return True
    try:
        return takes_text(find_method(str(name)).Options, path[1:])
    except ValueError:  # reported when the configuration is validated
        return False


def parse_config(content: dict[str, Any], origin: str = "config") -> ExperimentConfig:
    """Validates nested plain values; error messages start with `origin`. See `load_config`.

    Args:
      content: the configuration.
      origin: where it comes from; opens the error messages.
    """
    content = with_data_root(content)
    weights, model = content.get("weights"), content.get("model") or {}
    if isinstance(weights, str) and isinstance(model, dict):
        content["model"] = merged(_model_of(weights, model, origin), model)
    config = validate(ExperimentConfig, content, origin)
    _check_model(config, origin)
    return config


def _model_of(weights: str, model: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The model section that weights have, for what `model` does not say.

    Nothing, if `model` names an architecture (such a section may be complete) and the weights do not say theirs or have
    another one: whether params fit is found when they are loaded.
    """
    from jaxcl.weights import read_config

    try:
        # max_length goes first: jaxcl may not support the weights' own window.
        window = {"max_length": model["max_length"]} if "max_length" in model else {}
        base = read_config(weights, **window).model_dump(mode="json")
    except UserError as error:
        if "architecture" in model:
            return {}
        raise ConfigError(f"{origin}: weights: {error}") from None
    return base if model.get("architecture", base["architecture"]) == base["architecture"] else {}


def with_data_root(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration's plain values with the `data_root` of the environment variable JAXCL_DATA, if set.

    Args:
      content: the configuration.
    """
    root = os.environ.get("JAXCL_DATA")
    return {**content, "data_root": root} if root else dict(content)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with the values of others in their place.

    >>> merged({"data": {"length": 96}, "seed": 0}, {"data": {"packing": True}})
    {'data': {'length': 96, 'packing': True}, 'seed': 0}
    """
    both = {key: merged(base[key], value) for key, value in changes.items() if _are_sections(base.get(key), value)}
    return {**base, **changes, **both}


def _are_sections(*values: object) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _check_model(config: ExperimentConfig, origin: str) -> None:
    """Checks that involve several sections."""
    try:
        find_method(config.method.name).check(config.method.options, config.model)
    except (ValueError, ValidationError) as error:
        raise ConfigError(f"{origin}: method.{error}") from None
