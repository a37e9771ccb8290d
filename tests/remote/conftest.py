"""A URL whose storage fails on demand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxcl.run.remote import claim, objects
from tests.tiny.storage import FaultySystem


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultySystem]]:
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(claim, "BEAT", 0.02)
    FaultySystem.reset()
    yield FaultySystem
    FaultySystem.reset()
