"""The runs of a comparison: methods, swept settings and seeds; equal settings are one run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.config import ExperimentConfig, parse_config
from jaxcl.config.experiment import override
from jaxcl.config.file import ConfigError
from jaxcl.methods import ReplayOptions, find_method

Setting = dict[str, str]
"""Values by dotted key, as text."""

_OWN_OPTIONS = {
    "seed": "--seeds",
    "output": "--out",
    "method": "--methods",
    "method.name": "--methods",
}


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
      method: name of the method.
      setting: the swept values that concern it.
      seed: its seed.
      config: its configuration.
    """

    method: str
    setting: Setting
    seed: int
    config: ExperimentConfig

    @property
    def title(self) -> str:
        """Method, setting and seed in words."""
        return ", ".join([self.method, *label(self.setting).values(), f"seed {self.seed}"])


def plan_runs(
    content: Mapping[str, Any],
    origin: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    sweeps: Mapping[str, Sequence[str]],
    out: Path,
    budget: int | None = None,
) -> list[PlannedRun]:
    """The runs of a grid, methods in the given order.

    The method of the configuration keeps its options; the others share its options of the same name. A swept key
    `method.X` concerns the methods that have an option X: the others have one run for all its values. A key after the
    name of a method, `NAME:KEY`, concerns that method alone, and stands there for the same key without a name.

    Args:
      content: the configuration's plain values, with the overrides for all runs.
      origin: where they come from, for messages.
      methods: names of methods.
      seeds: seeds.
      sweeps: values by dotted key.
      out: folder for the run folders.
      budget: the largest number of settings per method. From a larger grid this many are drawn, always the same ones.

    Raises:
      UserError: a configuration is invalid, a key has an option of its own, or no method has the option.
    """
    options = {method: _options(method) for method in dict.fromkeys(methods)}
    for name in sweeps:
        _check_key(name, options)
    runs: dict[str, PlannedRun] = {}
    folders: dict[str, str] = {}
    for method, known in options.items():
        settings = drawn(list(grid(_own(sweeps, method, known))), budget)
        for setting, seed in itertools.product(settings, dict.fromkeys(seeds)):
            folder = out / folder_name(method, setting, seed)
            config = _configure(content, origin, method, known, setting, seed, folder)
            same = json.dumps({**config.plain(), "output": ""}, sort_keys=True)
            if same not in runs:
                if folders.setdefault(folder.name, same) != same:
                    raise ConfigError(f"--sweep: two settings would have the folder {folder.name}; give shorter values")
                runs[same] = PlannedRun(method, setting, seed, config)
    return list(runs.values())


def grid(sweeps: Mapping[str, Sequence[str]]) -> Iterator[Setting]:
    """Every combination of values; a single empty setting without any key.

    >>> list(grid({"a": ["1", "2"], "b": ["x"]}))
    [{'a': '1', 'b': 'x'}, {'a': '2', 'b': 'x'}]
    """
    for values in itertools.product(*sweeps.values()):
        yield dict(zip(sweeps, values, strict=True))


def drawn(settings: Sequence[Setting], budget: int | None) -> list[Setting]:
    """All settings, or `budget` of them drawn without replacement, in their order. Every call draws the same ones.

    >>> [one["a"] for one in drawn(list(grid({"a": "123456789"})), 3)]
    ['1', '7', '9']
    """
    if budget is None or budget >= len(settings):
        return list(settings)
    return [settings[index] for index in sorted(random.Random(0).sample(range(len(settings)), budget))]


def label(setting: Setting) -> dict[str, str]:
    """`key=value` by key: short keys where they differ, and numbers in one notation.

    >>> list(label({"optimizer.learning_rate": "1e-3", "method.strength": "100"}).values())
    ['learning_rate=0.001', 'strength=100']
    """
    short = [key.rpartition(".")[2] for key in setting]
    return {
        key: f"{name if short.count(name) == 1 else key}={_number(value)}"
        for name, (key, value) in zip(short, setting.items(), strict=True)
    }


def folder_name(method: str, setting: Setting, seed: int) -> str:
    """Name of a run folder, which is the same in every comparison that has the run.

    >>> folder_name("ewc", {"optimizer.learning_rate": "1e-3"}, 0)
    'ewc-learning_rate=0.001-seed0'
    """
    parts = [method.replace(":", "."), *label(setting).values()]
    return "-".join([*(re.sub(r"[^\w.+=-]+", "_", part) for part in parts), f"seed{seed}"])


def _number(value: str) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


def _options(method: str) -> set[str]:
    try:
        return set(find_method(method).Options.model_fields)
    except ValueError as error:
        raise ConfigError(f"--methods: {error}") from None


def _check_key(name: str, options: Mapping[str, set[str]]) -> None:
    method, _, key = name.rpartition(":")
    if key in _OWN_OPTIONS:
        raise ConfigError(f"--sweep {name}: give {_OWN_OPTIONS[key]} instead")
    if method and method not in options:
        raise ConfigError(f"--sweep {name}: {method} is none of the methods {', '.join(options)}")
    if method and not _concerns(key, options[method]):
        raise ConfigError(f"--sweep {name}: {method} does not have this option")
    if not any(_concerns(key, known) for known in options.values()):
        raise ConfigError(f"--sweep {key}: none of the methods {', '.join(options)} has this option")


def _own(sweeps: Mapping[str, Sequence[str]], method: str, options: set[str]) -> dict[str, Sequence[str]]:
    """The values of the keys that concern a method, without its name."""
    parts = {name: name.rpartition(":") for name in sweeps}
    shared = {key: sweeps[name] for name, (of, _, key) in parts.items() if not of and _concerns(key, options)}
    return shared | {key: sweeps[name] for name, (of, _, key) in parts.items() if of == method}


def _concerns(key: str, options: set[str]) -> bool:
    first, _, rest = key.partition(".")
    return first != "method" or rest.partition(".")[0] in options


def _method_section(content: Mapping[str, Any]) -> dict[str, Any]:
    own = content.get("method") or {}
    return {"name": own} if isinstance(own, str) else dict(own)


def _shared(own: Mapping[str, Any], method: str, options: set[str]) -> dict[str, Any]:
    """What of the configuration's section `method` a method has as well."""
    return {key: value for key, value in own.items() if own.get("name") == method or key in options}


def shared_options(
    content: Mapping[str, Any], methods: Sequence[str], sweeps: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Lines on options that a method has from the section of another one, for which they may mean another thing."""
    own = _method_section(content)
    swept = {name.rpartition(":")[2].removeprefix("method.") for name in sweeps}
    general = ReplayOptions.model_fields.keys() | swept | {"name"}
    for method in methods:
        shared = sorted(_shared(own, method, _options(method)).keys() - general)
        if shared and method != own.get("name"):
            values = ", ".join(f"{key}={own[key]}" for key in shared)
            yield f"{method}: {values}, from the section of {own.get('name')}; to choose: --sweep {method}:method.KEY"


def _configure(
    content: Mapping[str, Any], origin: str, method: str, options: set[str], setting: Setting, seed: int, output: Path
) -> ExperimentConfig:
    shared = _shared(_method_section(content), method, options)
    changed = {**content, "seed": seed, "output": str(output), "method": {**shared, "name": method}}
    changed = override(copy.deepcopy(changed), [f"{key}={value}" for key, value in setting.items()])
    return parse_config(changed, " ".join([origin, "with", method, *label(setting).values()]))
