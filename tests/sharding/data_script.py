"""One of several processes that encode the rows of files together. Run as a program: FOLDER; prints JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.config import parse_config
from jaxcl.data import encode
from jaxcl.data.formats import lines
from jaxcl.run.components import build
from jaxcl.run.folder import RunFolder
from jaxcl.sharding import processes


def main(folder: Path) -> None:
    made: list[str] = []
    write = encode.write_shards

    def recorded(path: Path, *args: object, **options: Any) -> None:
        made.append(f"{path.parent.name}/{path.name.split('.')[1]}")
        write(path, *args, **options)  # type: ignore[arg-type]

    encode.write_shards, lines.RANGE = recorded, 2000  # type: ignore[assignment]
    processes.initialize(timeout=60)
    config = parse_config(json.loads((folder / "config.json").read_text()))
    parts = build(config, RunFolder(folder / "run"))
    parts.encode_all()
    index, count = jax.process_index(), jax.process_count()
    found = []
    for task in range(len(parts.tasks)):
        pipeline = parts.pipeline([parts.train_rows(task)])
        for step in (0, 3, pipeline.steps_per_epoch + 1):
            batch = pipeline.batch_at(step, seed=1, process_index=index, process_count=count)
            rows = zip(batch["tokens"], batch["segments"], batch["targets"], strict=True)
            found.append([hashlib.sha256(np.concatenate(row).tobytes()).hexdigest() for row in rows])
    print(json.dumps({"made": made, "rows": found, "prints": [task.train.fingerprint for task in parts.tasks]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
