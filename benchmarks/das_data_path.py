"""The data path of the published DAS setting: six domains of text, with few steps of a small encoder on each.

    python -m benchmarks.das_data_path --megabytes 300

Writes six domains and runs `jaxcl run` twice with the setting's row length and masking: the first run encodes the
domains, the second finds them in the cache. Prints a JSON object per run: seconds in all, seconds for the data
(reading, counting and encoding, or opening the cache), and the largest memory of the process. Model, batches and steps
are small.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.data_scale import sentences, write_corpus

DOMAINS = ("restaurant", "acl", "ai", "phone", "pubmed", "camera")


def config(folder: Path, output: str) -> dict[str, object]:
    """The setting of `das_roberta_base` on files, with a small encoder."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "max_length": 256}
    return {
        "seed": 2021,
        "output": str(folder / output),
        "model": {"architecture": "roberta", "vocab_size": 8000, **sizes},
        "tokenizer": {"vocab_size": 8000, "train_rows": 5000},
        "data": {"length": 164, "packing": False, "mask_rate": 0.15, "cache": str(folder / "cache")},
        "tasks": [{"name": name, "source": f"text:{folder / name}.txt", "heldout": 0.001} for name in DOMAINS],
        "method": {"name": "das_paper", "importance_examples": 64},
        "training": {"batch_size": 32, "steps": 2, "log_every": 1},
        "optimizer": {"name": "adamw", "learning_rate": 1.0e-4},
        "evaluation": {"batch_size": 64, "limit": 64},
    }


def run(folder: Path, output: str) -> dict[str, float]:
    """One run in a process of its own."""
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(config(folder, output)))
    command = [sys.executable, "-m", "benchmarks.das_data_path", "--run", str(path)]
    started = time.perf_counter()
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    results = json.loads((folder / output / "results.json").read_text())
    return {"seconds": time.perf_counter() - started, "data_s": results["timing"]["data"], **found}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300.0, help="size of each domain")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        from jaxcl.cli import main as jaxcl

        code = jaxcl(["run", str(options.run)])
        print(json.dumps({"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        sys.exit(code)
    with tempfile.TemporaryDirectory() as place:
        folder, pool = Path(place), sentences()
        for number, name in enumerate(DOMAINS):
            write_corpus(folder / f"{name}.txt", options.megabytes, pool, number)
        for output in ("first", "second"):
            print(json.dumps({"run": output, **{k: round(v, 2) for k, v in run(folder, output).items()}}), flush=True)


if __name__ == "__main__":
    main()
