"""What both sides of a run over Flower need: its tools, and an environment in which it says nothing to others."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from jaxcl.errors import UserError

MESSAGE = "message"
"""Name of the record, and of the one array in it, that holds a message's bytes."""


def check_installed() -> None:
    """Checks that Flower is there.

    Raises:
      UserError: it is not; names the command that installs it.
    """
    if importlib.util.find_spec("flwr") is None:
        raise UserError("federated: pip install 'jaxcl[federated]' (flwr) to train over a network", exit_code=2)


def tool(name: str) -> str:
    """The path of one of Flower's commands: that of this environment.

    Raises:
      UserError: it is missing.
    """
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise UserError(f"{name}: not found; pip install 'jaxcl[federated]'")
    return found


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: no telemetry, no check for updates, files of its own.

    Args:
      home: a folder for Flower's files.
    """
    own = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        # Flower starts its processes by name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return {**os.environ, **own}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends one of Flower's processes with those that it has started.

    Args:
      process: the first one of its group.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


__all__ = ["MESSAGE", "check_installed", "end", "environment", "tool"]
