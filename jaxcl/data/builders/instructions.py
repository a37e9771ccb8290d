"""Instruction benchmarks: TRACE and the SuperNI continual benchmark, with a folder of JSON lists per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxcl.data.builders.base import ManualBuilder, Row
from jaxcl.data.builders.manual import Layout
from jaxcl.data.files import parse_json, read_data_text
from jaxcl.data.values import as_text
from jaxcl.errors import UserError

#: TRACE's task sequences (Wang et al., 2023, arXiv 2310.06762), as SEEKR's paper uses them.
TRACE_ORDERS = (
    ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
    ("NumGLUE-cm", "NumGLUE-ds", "FOMC", "20Minuten", "C-STANCE", "Py150", "MeetingBank", "ScienceQA"),
)

#: Task sequences over twelve SuperNI tasks (Wang et al., 2022, arXiv 2204.07705), as SEEKR's paper uses them.
SUPERNI_ORDERS = (
    (
        "task1572",
        "task363",
        "task1290",
        "task181",
        "task002",
        "task1510",
        "task073",
        "task748",
        "task511",
        "task591",
        "task195",
        "task875",
    ),
    (
        "task748",
        "task073",
        "task1572",
        "task195",
        "task591",
        "task363",
        "task1510",
        "task181",
        "task511",
        "task002",
        "task1290",
        "task875",
    ),
)

_SPLITS = {"train": "train.json", "validation": "eval.json", "test": "test.json"}


class _Instructions(ManualBuilder):
    """Rows of prompt and answer, one configuration per task."""

    # Splits that may be missing in a task's folder.
    optional: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        """The task's folder in the manual folder."""
        return str(self.builder_config.description)

    @property
    def layouts(self) -> Sequence[Layout]:
        """One folder per task."""
        files = {split: [f"{self.folder}/{name}"] for split, name in _SPLITS.items()}
        return [Layout(files, 'a JSON list of {"prompt": ..., "answer": ...}', self.optional)]

    def read(self, files: Mapping[str, Sequence[Path]]) -> dict[str, list[Row]]:
        """Prompts and answers; see `ManualBuilder.read`."""
        return {split: _pairs(path) for split, (path,) in files.items()}

    def _features(self) -> dict[str, Any]:
        return {"prompt": tfds.features.Text(), "answer": tfds.features.Text()}


class Trace(_Instructions):
    """TRACE: eight tasks of 5,000 training rows (folder `LLM-CL-Benchmark_5000` of the published archive)."""

    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=task.lower(), description=task) for task in TRACE_ORDERS[0])

    @property
    def published(self) -> Mapping[str, int]:
        """The number of training rows per task in the paper."""
        return {"train": 5000}

    def _info(self) -> Any:
        text = f"Task {self.folder} of TRACE, a benchmark for continual learning of large language models."
        return self.described(text, "https://github.com/BeyonderXX/TRACE", self._features())


class Superni(_Instructions):
    """The SuperNI continual benchmark: twelve tasks of Super-NaturalInstructions, up to 1,000 training rows each."""

    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=task, description=task) for task in SUPERNI_ORDERS[0])
    optional = frozenset({"validation"})

    def _info(self) -> Any:
        text = f"{self.folder} of Super-NaturalInstructions, prepared for continual learning."
        return self.described(text, "https://github.com/jinghan1he/SEEKR", self._features())


def _pairs(path: Path) -> list[Row]:
    rows = parse_json(read_data_text(path), path)
    if not isinstance(rows, list):
        raise UserError(f'{path}: expected a JSON list of {{"prompt": ..., "answer": ...}}')
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"prompt", "answer"} <= row.keys():
            raise UserError(f"{path} row {number}: expected an object with prompt and answer")
        found.append({field: as_text(row[field], field, f"{path} row {number}") for field in ("prompt", "answer")})
    return found
