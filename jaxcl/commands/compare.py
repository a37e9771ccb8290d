"""`jaxcl compare`: the same sequence with several methods, settings and seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxcl.commands.jobs import run_jobs
from jaxcl.commands.sweep import PlannedRun, label, plan_runs, shared_options
from jaxcl.config import find_config
from jaxcl.config.experiment import override
from jaxcl.config.file import ConfigError, read_yaml
from jaxcl.errors import UserError
from jaxcl.reporting.comparison import comparison_table, read_comparison, write_comparison
from jaxcl.run.sequence import run
from jaxcl.sharding.processes import initialize, is_first, on_first


def compare(
    config: str,
    overrides: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int] | None,
    out: Path,
    sweeps: Mapping[str, Sequence[str]] | None = None,
    jobs: int = 1,
    budget: int | None = None,
) -> Path:
    """Runs every method with every setting and seed, each in its own run folder, and compares the results.

    The method of the configuration keeps its options. The other methods share its options of the same name (such as
    `replay`, so that methods are compared with the same memory) and have defaults for the rest.

    In a sweep, runs also score the dev rows, by which a setting is chosen for each method; a run that diverges is left
    out, with all runs of its setting. What is finished is not run again, so a sweep can be widened.

    Args:
      config: a YAML file, or the name of a configuration that comes with jaxcl.
      overrides: `KEY=VALUE` for all runs.
      methods: names of methods.
      seeds: seeds; `None`: that of the configuration.
      out: folder for a run folder `METHOD-SETTING-seedN` per run, `comparison.json` and an HTML page.
      sweeps: values of a grid, by dotted key; see `jaxcl.commands.sweep.plan_runs`.
      jobs: number of runs at once, each in a process of its own; 1: one after another in this process.
      budget: most settings per method, drawn from its grid; `None`: all.

    Returns:
      The page.

    Raises:
      UserError: the configuration is invalid for one of the methods (raised before any run), a run fails, or every
        run of a sweep fails.
    """
    initialize()
    if jobs > 1 and jax.process_count() > 1:
        raise ConfigError(f"--jobs: {jobs} runs at once are for one machine; these are {jax.process_count()} processes")
    sweeps = sweeps or {}
    content = override(read_yaml(find_config(config)), [*overrides, *(["evaluation.dev=true"] if sweeps else [])])
    seeds = [int(content.get("seed", 0))] if seeds is None else seeds
    planned = plan_runs(content, config, methods, seeds, sweeps, out, budget)
    if is_first():
        for line in shared_options(content, methods, sweeps):
            print(line, file=sys.stderr)
    failed = _run_all(planned, jobs, out / "jobs", keep_going=bool(sweeps))
    done = [one for one in planned if one.title not in failed]
    if not done:
        raise UserError(f"all runs failed; the first: {next(iter(failed.values()))}")
    swept = _swept(done, sweeps, failed) if sweeps else None
    on_first(lambda: write_comparison(out, [Path(one.config.output) for one in done], swept))
    if is_first():
        print(f"\n{comparison_table(read_comparison(out))}", flush=True)
        for title, reason in failed.items():
            print(f"left out: {title}: {reason}", flush=True)
    return out / "comparison.html"


def _run_all(planned: Sequence[PlannedRun], jobs: int, folder: Path, *, keep_going: bool) -> dict[str, str]:
    """Runs everything; returns why runs failed, by title."""
    configs = {one.title: one.config for one in planned}
    if jobs > 1:
        failed = run_jobs(configs, jobs, folder)
    else:
        failed = {}
        for title, config in configs.items():
            if is_first():
                print(f"{title}: {config.output}", flush=True)
            try:
                run(config)
            except UserError as error:
                if not keep_going or error.exit_code != 1:
                    raise
                failed[title] = str(error)
    if failed and not keep_going:
        title, reason = next(iter(failed.items()))
        raise UserError(f"{title}: {reason}")
    return failed


def _swept(
    done: Sequence[PlannedRun], sweeps: Mapping[str, Sequence[str]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """What the page has to know of the sweep: see `jaxcl.reporting.comparison_data.collect`."""
    return {
        "keys": list(sweeps),
        "settings": [", ".join(label(one.setting).values()) for one in done],
        "failed": dict(failed),
    }
