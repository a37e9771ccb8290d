"""`jaxcl compare`: the same sequence with several methods and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl.config import ExperimentConfig, find_config, parse_config
from jaxcl.config.experiment import override
from jaxcl.config.file import ConfigError, read_yaml
from jaxcl.methods import find_method
from jaxcl.reporting.comparison import comparison_table, read_comparison, write_comparison
from jaxcl.run.sequence import run
from jaxcl.sharding.processes import initialize, is_first, on_first


def compare(
    config: str, overrides: Sequence[str], methods: Sequence[str], seeds: Sequence[int] | None, out: Path
) -> Path:
    """Runs every method with every seed, each in its own run folder, and compares the results.

    The method of the configuration keeps its options. The other methods share its options of the same name (such as
    `replay`, so that methods are compared with the same memory) and have defaults for the rest.

    Args:
      config: a YAML file, or the name of a configuration that comes with jaxcl.
      overrides: `KEY=VALUE` for all runs.
      methods: names of methods.
      seeds: seeds; `None`: that of the configuration.
      out: folder for a run folder `METHOD-seedN` per run, `comparison.json` and an HTML page.

    Returns:
      The page.

    Raises:
      UserError: the configuration is invalid for one of the methods (raised before any run), or a run fails.
    """
    initialize()
    content = override(read_yaml(find_config(config)), overrides)
    seeds = [int(content.get("seed", 0))] if seeds is None else seeds
    runs = [
        (name, seed, _variant(content, config, name, seed, out / f"{name.replace(':', '.')}-seed{seed}"))
        for name in dict.fromkeys(methods)
        for seed in dict.fromkeys(seeds)
    ]
    for name, seed, variant in runs:
        if is_first():
            print(f"{name}, seed {seed}: {variant.output}", flush=True)
        run(variant)
    on_first(lambda: write_comparison(out, [Path(variant.output) for _, _, variant in runs]))
    if is_first():
        print(f"\n{comparison_table(read_comparison(out))}", flush=True)
    return out / "comparison.html"


def _variant(content: dict[str, Any], origin: str, method: str, seed: int, output: Path) -> ExperimentConfig:
    own = content.get("method") or {}
    own = {"name": own} if isinstance(own, str) else dict(own)
    try:
        known = find_method(method).Options.model_fields
    except ValueError as error:
        raise ConfigError(f"--methods: {error}") from None
    shared = own if own.get("name") == method else {key: value for key, value in own.items() if key in known}
    return parse_config(
        {**content, "seed": seed, "output": str(output), "method": {**shared, "name": method}},
        f"{origin} with {method}",
    )
