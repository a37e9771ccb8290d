"""Runs whose results are kept: an evidence script that was interrupted, or goes on elsewhere, repeats none of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PLACES = ("output", "data_root", "weights")  # where things lie changes nothing of what comes out


def recorded_run(
    config: dict[str, Any], record: Path, *, setting: dict[str, Any], prepare: Callable[[], Any]
) -> dict[str, Any]:
    """The results of a run: from its record if there is one, else by running it, which leaves the record.

    Args:
      config: the configuration, as nested plain values.
      record: a JSON file.
      setting: what else the results depend on, such as how the weights were made.
      prepare: makes what a run needs, such as its weights; not called where there is a record.

    Returns:
      The content of the run's `results.json`, without what a table needs not.

    Raises:
      SystemExit: the record is that of another configuration.
    """
    wanted = {"setting": setting, **{key: value for key, value in config.items() if key not in _PLACES}}
    if record.is_file():
        content = json.loads(record.read_text())
        if content["config"] != json.loads(json.dumps(wanted)):
            raise SystemExit(f"{record} holds another configuration; move it away to run this one")
        return content["results"]
    from jaxcl.config import parse_config
    from jaxcl.run.sequence import run

    prepare()
    results = run(parse_config(config)).results.model_dump(mode="json")
    results = {key: value for key, value in results.items() if value is not None and key not in ("data", "extra")}
    record.parent.mkdir(parents=True, exist_ok=True)
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    record.write_text(json.dumps({"config": wanted, "hardware": hardware, "results": results}, indent=1) + "\n")
    return results


def over_seeds(values: Sequence[Any], digits: int = 2) -> dict[str, Any]:
    """Mean and sample standard deviation over the first axis, rounded."""
    array = np.array(values, float)
    deviation = array.std(axis=0, ddof=1) if len(array) > 1 else np.full(array.shape[1:], np.nan)
    return {"mean": np.round(array.mean(axis=0), digits).tolist(), "deviation": np.round(deviation, digits).tolist()}


def file_name(variant: str, seed: int) -> str:
    """A variant and seed as part of a file's name.

    >>> file_name("das (update, no contrast)", 1)
    'das_update_no_contrast-seed1'
    """
    return f"{variant.translate(str.maketrans(' ', '_', '(),'))}-seed{seed}"


def run_all(
    variants: Sequence[str],
    seeds: Sequence[int],
    config: Callable[[str, int, Path], dict[str, Any]],
    out: Path,
    records: Path,
    setting: dict[str, Any],
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, list[dict[str, Any]]]:
    """Every variant under every seed, all variants of a seed before the next.

    Args:
      variants: names.
      seeds: seeds.
      config: the configuration of a variant and seed, with its run folder.
      out: gets the run folders.
      records: gets the records.
      setting: see `recorded_run`.
      prepare: see `recorded_run`.

    Returns:
      Results by variant, in the order of the seeds.
    """
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for seed in seeds:
        for variant in variants:
            name = file_name(variant, seed)
            content, record = config(variant, seed, out / name), records / f"{name}.json"
            results[variant].append(recorded_run(content, record, setting=setting, prepare=prepare))
    return results


def spread(value: dict[str, Any], digits: int = 1) -> str:
    """Mean and deviation of a single number as a cell of a table.

    >>> spread({"mean": 1.25, "deviation": 0.5}), spread({"mean": 1.25, "deviation": float("nan")})
    ('1.2 ± 0.5', '1.2')
    """
    mean, deviation = value["mean"], value["deviation"]
    return f"{mean:.{digits}f}" if np.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
