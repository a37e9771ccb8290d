"""Where compiled programs are kept: not together with those of another processor, or of another number of cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxcl.training.compile import programs_folder


def test_programs_of_other_cores_or_another_processor_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_text, about = Path.read_text, "processor: 0\nmodel name: X\nflags: fma avx2\ncpu MHz: 1000\n"

    def read(self: Path, **options: str) -> str:
        return about if str(self) == "/proc/cpuinfo" else read_text(self, **options)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    found = programs_folder()
    assert found.parent == tmp_path / "jaxcl" / "programs"
    assert programs_folder() == found
    about = about.replace("1000", "2000")  # which changes from moment to moment
    assert programs_folder() == found
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1})
    one = programs_folder()
    about = about.replace("avx2", "avx512f")
    assert len({found, one, programs_folder()}) == 3
