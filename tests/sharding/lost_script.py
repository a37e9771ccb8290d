"""One of two processes that a test kills or stops. Run as a program: HOW FOLDER."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from jaxcl import cli
from jaxcl.sharding import processes


def work(args: object) -> None:
    """Goes from one collective to the next, sleeps, computes in Python, or fails alone."""
    how, folder = sys.argv[1], Path(sys.argv[2])
    index = os.environ["JAX_PROCESS_ID"]
    processes.initialize(timeout=60)
    processes.wait_for_all("the start")
    (folder / f"up{index}").touch()
    while how != "collective" or processes.everywhere(True):
        if how == "alone" or how == "collective":
            time.sleep(0.05)
        elif how == "end" and index == "1":
            raise OSError("no luck")


if __name__ == "__main__":
    cli._ACTIONS["run"] = work
    sys.exit(cli.main(["run", "config.yaml"]))
