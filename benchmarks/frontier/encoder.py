"""A small encoder that knows general text: the counterpart of the decoder in the benchmark files, made on first use.

    JAXCL_DATA=data python -m benchmarks.frontier.encoder

A masked language model of 1.1M params, of the decoder's size and vocabulary, trained for 4,000 steps of 32 rows of 96
tokens with three tokens of ten masked. Its loss ends at about 3.1 nats per masked token.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks.frontier.data import data_root

STEPS = 4000


def encoder(work: Path) -> Path:
    """The encoder's folder, a Hugging Face checkpoint with its tokenizer; trained if it is not there.

    Args:
      work: folder for what benchmarks make.
    """
    folder = work / "encoder" / "model"
    if folder.is_dir():
        return folder

    from jaxcl.commands.convert import convert
    from jaxcl.config import parse_config
    from jaxcl.run.sequence import run

    trained = work / "encoder" / "run"
    run(parse_config(training(trained), "frontier encoder"))
    convert(str(trained), folder, "hf", "float32")
    shutil.rmtree(trained)
    return folder


def training(output: Path) -> dict[str, Any]:
    """The configuration of its training.

    Args:
      output: the run folder.
    """
    return {
        "output": str(output),
        "model": {
            "architecture": "roberta",
            "vocab_size": 2048,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_layers": 4,
            "num_heads": 4,
            "max_length": 128,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "tokenizer": {"vocab_size": 2048},
        "data": {"length": 96, "packing": True, "mask_rate": 0.3},
        "tasks": [{"name": "general", "source": f"text:{data_root() / 'frontier' / 'general.txt.gz'}"}],
        "method": {"name": "sequential"},
        "training": {"batch_size": 32, "steps": STEPS, "log_every": 100, "checkpoint_every": 500},
        "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.01},
        "evaluation": {"batch_size": 32},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="folder for what benchmarks make")
    print(encoder(parser.parse_args().work))
