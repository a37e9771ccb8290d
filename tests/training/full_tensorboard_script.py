"""Writes rows to TensorBoard on a disk that is soon full, then to the log. Run as a program: FOLDER."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from jaxcl.training.sinks import JsonLines, TensorBoard


def main(folder: Path) -> None:
    sinks = [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard", after=3)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for step in range(100):
        for sink in sinks:
            sink.write({"step": step, "task": 0, "kind": "task", "loss": 1.0, "grad_norm": 2.0, "seconds": 3.0})
    for sink in sinks:
        sink.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
