"""Every reader of bytes from elsewhere, with small seeds that are made here."""

from __future__ import annotations

from tests.fuzz.harness import Target
from tests.fuzz.targets import data, messages, runs, stores, weights
from tests.fuzz.targets.known import KNOWN

__all__ = ["KNOWN", "TARGETS"]

TARGETS: dict[str, Target] = {
    **data.TARGETS, **stores.TARGETS, **weights.TARGETS, **runs.TARGETS, **messages.TARGETS,
}  # fmt: skip
