"""`jaxcl run`, of which this process gets SIGTERM in a loop. Run as a program: CONFIG [LOOP BATCH]."""

from __future__ import annotations

import contextlib
import sys

from jaxcl import cli
from tests.tiny.faults import asked_to_stop


def main(config: str, loop: str | None = None, batch: str = "0") -> int:
    with contextlib.nullcontext() if loop is None else asked_to_stop(loop, int(batch), code=130):
        return cli.main(["run", config])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
