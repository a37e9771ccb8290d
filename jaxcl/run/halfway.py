"""The loops of a run between the steps of training, which may be stopped and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxcl.run.components import Components
from jaxcl.run.folder import RunFolder
from jaxcl.run.remote.uploads import Uploads
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.halfway import Halfway


def halfway_loops(
    parts: Components,
    folder: RunFolder,
    checkpoints: Checkpoints,
    uploads: Uploads,
    saved: Saved | None,
    fingerprints: Mapping[str, Any],
) -> Halfway:
    """The loops of a run that continues from a checkpoint. What they save is uploaded with the latest checkpoint.

    Args:
      parts: the parts of the run.
      folder: its folder.
      checkpoints: the series in it.
      uploads: those of the run.
      saved: the checkpoint; `None`: the run begins.
      fingerprints: of its data, which may have been changed on purpose: what was found in other data is not used.
    """

    def upload() -> None:
        checkpoints.wait()
        uploads.stage()
        uploads.submit(None)

    digest = hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()
    number = -1 if saved is None else saved.number
    about = {"fingerprints": digest}
    return Halfway(folder.halfway, parts.layout.mesh, checkpoint=number, about=about, saved=upload)
