"""The check that all processes of a run see the same folder."""

from __future__ import annotations

import time

import jax
import numpy as np

from jaxcl.data.formats.storage import is_url
from jaxcl.errors import UserError
from jaxcl.run.folder import RunFolder
from jaxcl.sharding.processes import of_all_processes, on_each

# Seconds that a file may take to become visible on another machine.
_VISIBLE_SECONDS = 30
_TOKEN_BYTES = 32


def check_shared(folder: RunFolder, output: str) -> None:
    """Checks that all processes see the files of process 0: all read checkpoints, memory and teacher store.

    Args:
      folder: the run folder, claimed by process 0.
      output: the output of the configuration.

    Raises:
      UserError: a process does not see them.
    """
    own = folder.token.encode()[:_TOKEN_BYTES].ljust(_TOKEN_BYTES)
    first = of_all_processes(np.frombuffer(own, np.uint8))[0].tobytes().decode(errors="replace")
    on_each(lambda: _find_shared(folder, output, first))


def _find_shared(folder: RunFolder, output: str, token: str) -> None:
    for _ in range(_VISIBLE_SECONDS):
        if folder.is_run and folder.token == token:  # not a folder of the same name on another machine
            return
        time.sleep(1.0)  # network file systems may be slow
    remedy = "set local_output to" if is_url(output) else "choose"
    raise UserError(
        f"output {folder.path}: process {jax.process_index()} does not see what process 0 wrote there; "
        f"{remedy} a folder on storage that all processes share"
    )
