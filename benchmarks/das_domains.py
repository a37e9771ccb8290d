"""What each method keeps of three domains: a small encoder, pre-trained on news, learns them one after the other.

    JAXCL_DATA=data python -m benchmarks.das_domains --out runs/das_domains [--seeds 0,1,2] [--variants sequential,das]

Reviews of restaurants, biomedical abstracts, papers on language processing (the training texts of SciERC), in this
order; each has an end task (aspect sentiment, ChemProt, SciERC), for which a copy of the model is fine-tuned. The
encoder is pre-trained once; a seed decides order, masking, dropout and the end tasks' heads. Runs go on where they
stopped. Prints one JSON object: mean and sample standard deviation over the seeds of

- `perplexity`: of masked tokens in the test texts, geometric mean over the domains at the end, and its growth on
  earlier domains since each was learned (the factor by which it rose; 1: nothing forgotten);
- `f1`: mean over the end tasks at the end, and the forgetting rate (DAS, section 4: mean over earlier domains of the
  score right after the domain minus the score at the end, in points);
- `matrix`: perplexity of each domain (columns) before anything and after each domain (rows), and the end tasks' F1
  with no adaptation, right after the domain, and at the end;
- `seconds` of training and of what the method does between domains.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

MODEL = {
    "architecture": "roberta",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_layers": 4,
    "num_heads": 6,
    "max_length": 64,
}
LIMITS = {"train": 960, "dev": 300, "test": 800}
DOMAINS = [
    {
        "name": "restaurant",
        "source": "text:das/domains/restaurant_reviews.txt.gz",
        "end_task": {
            "source": "jsonl:das/end_tasks/restaurant",
            "pair_field": "aspect",
            "metric": "macro_f1",
            **LIMITS,
        },
    },
    {
        "name": "biomedical",
        "source": "text:das/domains/biomedical_abstracts.txt.gz",
        "end_task": {"source": "jsonl:das/end_tasks/chemprot", "metric": "micro_f1", **LIMITS},
    },
    {
        "name": "papers",
        "kind": "text",
        "source": "jsonl:das/end_tasks/scierc",
        "end_task": {"source": "jsonl:das/end_tasks/scierc", "metric": "macro_f1", **LIMITS},
    },
]
REPLAY = {"fraction": 0.05, "every": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {"name": "sequential"},
    "ewc": {"name": "ewc", "fisher_examples": 512},
    "derpp": {"name": "derpp", "replay": REPLAY},
    "replay": {"name": "replay", "replay": REPLAY},
    "das (update)": {"name": "das", "mask_on": "update"},
    "das (gradient)": {"name": "das", "mask_on": "gradient"},
    "das (update, no contrast)": {"name": "das", "mask_on": "update", "contrast_weight": 0.0},
    "das (update, quantile)": {"name": "das", "mask_on": "update", "normalisation": "quantile"},
    "das (update, shared)": {"name": "das", "mask_on": "update", "shared": "mean"},
}
DAS = {"importance_examples": 512}


def pretrain(out: Path, steps: int) -> Path:
    """The encoder, trained on news from scratch, as a Hugging Face folder with its tokenizer."""
    from jaxcl.config import parse_config
    from jaxcl.experiment import run
    from jaxcl.inference import convert

    weights = out / "pretrained"
    if not (weights / "config.json").is_file():
        config = {
            "seed": 0,
            "output": str(out / "pretraining"),
            "data_root": os.environ.get("JAXCL_DATA", "."),
            "model": MODEL,
            "tokenizer": {"vocab_size": MODEL["vocab_size"]},
            "data": {"length": 64, "packing": True},
            "tasks": [{"name": "news", "source": "text:das/domains/news.txt.gz", "test": 400}],
            "method": {"name": "sequential"},
            "training": {"batch_size": 32, "steps": steps, "log_every": 50, "checkpoint_every": 0},
            "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.01},
        }
        run(parse_config(config))
        convert(str(out / "pretraining"), weights, "hf", "float32")
    return weights


def domains_config(variant: str, seed: int, out: Path, weights: Path, steps: int) -> dict[str, Any]:
    method = dict(VARIANTS[variant])
    if method["name"] == "das":
        method = {**DAS, **method}
    return {
        "seed": seed,
        "output": str(out / f"{variant.translate(str.maketrans(' ', '_', '(),'))}-seed{seed}"),
        "data_root": os.environ.get("JAXCL_DATA", "."),
        "weights": str(weights),
        "model": {},
        "data": {"length": 64, "packing": True},
        "tasks": DOMAINS,
        "method": method,
        "training": {"batch_size": 32, "steps": steps, "log_every": 25, "checkpoint_every": 0},
        "optimizer": {"learning_rate": 5e-4, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.01},
        "evaluation": {
            "batch_size": 64,
            "limit": 300,
            "before": True,
            "end_tasks": "last",
            "end_task": {"epochs": 3, "batch_size": 32, "learning_rate": 5e-4, "length": 64, "patience": 3},
        },
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds, from the results of a variant's runs."""

    def over_seeds(values: list[Any]) -> dict[str, Any]:
        array = np.array(values, float)
        deviation = array.std(axis=0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1:])
        return {"mean": np.round(array.mean(axis=0), 2).tolist(), "deviation": np.round(deviation, 2).tolist()}

    perplexities = [np.array([one["initial"], *one["matrix"]], float) for one in results]
    scores = [end_task_scores(one) for one in results]
    return {
        "perplexity": over_seeds([np.exp(np.log(one[-1]).mean()) for one in perplexities]),
        "growth": over_seeds(
            [
                np.exp(np.mean([np.log(one[-1, i] / one[i + 1, i]) for i in range(one.shape[1] - 1)]))
                for one in perplexities
            ]
        ),
        "f1": over_seeds([one[2].mean() for one in scores]),
        "forgetting_rate": over_seeds([np.mean(one[1, :-1] - one[2, :-1]) for one in scores]),
        "matrix": over_seeds(perplexities),
        "end_tasks": over_seeds(scores),
        "training_seconds": over_seeds([one["timing"]["training"] for one in results]),
        "method_seconds": over_seeds([one["timing"].get("method", 0.0) for one in results]),
    }


def end_task_scores(results: dict[str, Any]) -> np.ndarray:
    """F1 of each domain's end task `[3, domains]`: with no adaptation, right after the domain, at the end."""
    rows = np.full((3, len(DOMAINS)), np.nan)
    for name, part in results["further"].items():
        if not name.startswith("end task") or name.endswith("accuracy"):
            continue
        for domain in range(len(DOMAINS)):
            column = [part["initial"][domain], part["matrix"][domain][domain], part["matrix"][-1][domain]]
            if None not in column:
                rows[:, domain] = column
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/das_domains"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--variants", default=",".join(list(VARIANTS)[:6]), help=f"of {', '.join(VARIANTS)}, separated by ;"
    )
    parser.add_argument("--pretraining", type=int, default=1500, help="steps")
    parser.add_argument("--steps", type=int, default=150, help="steps a domain")
    options = parser.parse_args()

    from jaxcl.config import parse_config
    from jaxcl.experiment import run

    weights = pretrain(options.out, options.pretraining)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for variant in options.variants.split(";"):
            config = parse_config(domains_config(variant, seed, options.out, weights, options.steps))
            run(config)
            results.setdefault(variant, []).append(json.loads((Path(config.output) / "results.json").read_text()))
    print(
        json.dumps(
            {
                "variants": {variant: summary(rows) for variant, rows in results.items()},
                "seeds": options.seeds,
                "steps": options.steps,
                "pretraining": options.pretraining,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
