"""A run over four devices, once undisturbed and once killed twice, also at the checkpoint before the decay."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax


def main(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.test_trunk import TEXT, WSD, check_equal
    from tests.tiny.faults import killed_at_save
    from tests.tiny.runs import run

    content = {**TEXT, "mesh": {"data": 2, "fsdp": 2}, "optimizer": {**WSD, "warm_moments": 1}}
    run(content, folder / "whole", "sequential")
    for save in (3, 2):  # the second run begins after the first checkpoint of the resumed one
        with killed_at_save(save):
            run(content, folder / "run", "sequential")
    run(content, folder / "run", "sequential")
    check_equal(folder / "run", folder / "whole")
    print(json.dumps({"devices": jax.device_count(), "equal": True}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
