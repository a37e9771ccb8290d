"""One JSON value per process in a checkpoint: the position in its data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxcl.errors import UserError
from jaxcl.training.checksums import read_again


class ProcessJsonHandler(ocp.CheckpointHandler):
    """One JSON value per process, for what differs between processes: the position in their data."""

    def save(self, directory: Any, args: ProcessJsonSave) -> None:
        """Writes this process's file."""
        (directory / self._name()).write_text(json.dumps(args.item))

    def restore(self, directory: Any, args: ProcessJsonRestore | None = None) -> Any:
        """Reads this process's file.

        Raises:
          UserError: the checkpoint was written with a different number of processes, or the file is missing.
        """
        path = directory / self._name()
        if not path.exists():
            found = sorted(directory.glob("process_*.json"))
            counts = {other.stem.rpartition("_")[2] for other in found}
            if counts <= {str(jax.process_count())}:
                raise UserError(f"checkpoint {directory.parent}: the position in the data is missing ({path})")
            if all(json.loads(other.read_text()) is None for other in found):  # between two tasks
                return None
            raise UserError(
                f"checkpoint {directory.parent}: was written within a task by {max(counts, key=int)} processes and "
                f"cannot be resumed with {jax.process_count()}; start {max(counts, key=int)} processes"
            )
        return json.loads(read_again(Path(path), Path.read_bytes))

    def _name(self) -> str:
        return f"process_{jax.process_index()}_of_{jax.process_count()}.json"


@ocp.args.register_with_handler(ProcessJsonHandler, for_save=True)
@dataclasses.dataclass
class ProcessJsonSave(ocp.args.CheckpointArgs):
    """The value that `ProcessJsonHandler` saves."""

    item: Any


@ocp.args.register_with_handler(ProcessJsonHandler, for_restore=True)
@dataclasses.dataclass
class ProcessJsonRestore(ocp.args.CheckpointArgs):
    """Requests this process's value from `ProcessJsonHandler`."""
