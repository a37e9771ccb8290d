"""`jaxcl run` whose second checkpoint, or whose upload, takes a minute. Run as a program: WHICH FOLDER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from jaxcl import cli
from jaxcl.config.file import dump_yaml
from jaxcl.run.remote.mirror import Mirror
from jaxcl.training import checkpoint
from tests.tiny.runs import PAIRS


def main(which: str, folder: Path) -> int:
    write = checkpoint.write_checksums

    def wait(*_: object) -> None:
        (folder / "waiting").touch()
        time.sleep(60)

    if which == "checkpoint":
        checkpoint.write_checksums = lambda place: (wait() if (folder / "told").exists() else None, write(place))
    else:
        Mirror.upload = wait  # type: ignore[method-assign]
    run = {
        **PAIRS,
        "training": {"batch_size": 8, "steps": 100_000, "log_every": 5, "checkpoint_every": 0},
        "method": "sequential",
    }
    places = {"output": str(folder / "run")}
    if which == "upload":
        places = {"output": f"file://{folder}/bucket", "local_output": str(folder / "run")}
    (folder / "run.yaml").write_text(dump_yaml({**run, **places}))
    return cli.main(["run", str(folder / "run.yaml")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
