"""Whether two folders hold the same runs to the bit: results, metrics and the last checkpoint's arrays.

For changes that must change no number. In one environment, run the same commands before and after, from two checkouts:

    git worktree add ../before REVISION
    for tree in ../before .; do
      (cd $tree && PYTHONPATH=$PWD python -m jaxcl compare configs/quickstart_seekr.yaml tasks.*.train=192 \
        training.epochs=1 method.replay.every=2 evaluation.limit=16 training.log_every=1 \
        --methods sequential,replay,seekr,derpp,ewc,lwf --out runs/same)
    done
    python -m benchmarks.same_runs ../before/runs/same runs/same
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# Times, attempts and versions differ; a row of metrics is compared without what is measured in seconds.
_FREE = {"seconds", "task_seconds", "timing", "versions", "attempts", "peak_memory_bytes"}


def differences(one: Path, other: Path) -> Iterator[str]:
    """A line for each thing in which two run folders differ."""
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for name in sorted((results[0].keys() | results[1].keys()) - _FREE):
        if results[0].get(name) != results[1].get(name):
            yield f"results.json: {name}: {results[0].get(name)} and {results[1].get(name)}"
    metrics = [
        [_timeless(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)
    ]
    if metrics[0] != metrics[1]:
        yield "metrics.jsonl"
    arrays = [last_arrays(folder / "checkpoints") for folder in (one, other)]
    for name in sorted(arrays[0].keys() | arrays[1].keys()):
        first, second = (found.get(name) for found in arrays)
        if first is None or second is None:
            yield f"{name}: only in one of them"
        elif first.dtype != second.dtype or not np.array_equal(first, second, equal_nan=True):
            yield f"{name}: other values"


def last_arrays(checkpoints: Path) -> dict[str, Any]:
    """Every array of the last checkpoint, by name."""
    last = max(
        (folder for folder in checkpoints.iterdir() if folder.name.isdigit()), key=lambda folder: int(folder.name)
    )
    found = {}
    for item in sorted(folder for folder in last.iterdir() if (folder / "_METADATA").exists()):
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored(item.resolve())):
            found[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def restored(item: Path) -> Any:
    """The arrays of a checkpoint on the host, whatever devices they were on."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        shapes = checkpointer.metadata(item).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=on_host))


def _timeless(line: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if "second" not in name and "time" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    options = parser.parse_args()
    runs = sorted(path.parent.relative_to(options.one) for path in options.one.rglob("results.json"))
    count = 0
    for run in runs:
        found = list(differences(options.one / run, options.other / run))
        count += len(found)
        print(f"{run}: {'; '.join(found) or 'equal'} ({len(last_arrays(options.one / run / 'checkpoints'))} arrays)")
    raise SystemExit(f"{count} differences" if count or not runs else 0)


if __name__ == "__main__":
    main()
