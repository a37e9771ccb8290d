"""Saves a checkpoint, then one that the disk has no room for; prints what a user would see. Run as a program."""

from __future__ import annotations

import resource
import sys

import jax

from jaxcl.errors import UserError
from jaxcl.training.checkpoint import Checkpoints
from tests.tiny.trainer import make_params, make_trainer


def main(folder: str) -> int:
    with Checkpoints(folder, keep=1) as checkpoints:
        state = make_trainer().init(make_params())
        checkpoints.save(state, progress={"index": 0}, data=1)
        checkpoints.wait()
        big = state.replace(params={**state.params, "big": jax.random.normal(jax.random.key(0), (500_000,))})
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            checkpoints.save(big, progress={"index": 1})  # the write fails in the background
            checkpoints.wait()
        except UserError as error:
            latest = checkpoints.latest()
            print("still there:", latest and latest.progress)
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
