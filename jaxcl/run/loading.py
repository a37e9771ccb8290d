"""Opens the data of a run: its tasks, their end tasks, and the general rows that they are mixed with."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from jaxcl.config import ExperimentConfig
from jaxcl.data.cache import Cache
from jaxcl.data.formats.find import SCHEMES
from jaxcl.data.formats.storage import is_url
from jaxcl.data.sources import TaskData, load_general, load_task
from jaxcl.data.spec import SourceSpec, TaskSpec
from jaxcl.data.split import ListRows
from jaxcl.errors import UserError

Spec = TypeVar("Spec", bound=SourceSpec)


def open_task(spec: TaskSpec, config: ExperimentConfig, cache: Cache) -> TaskData:
    """A task's rows; empty if its data is gone.

    Raises:
      UserError: see `load_task`; or the data is gone, and the task's section does not say what kind it was.
    """
    if not spec.data_gone:
        mix = tuple(rooted(one, config.data_root) for one in spec.mix)
        rooted_spec = rooted(spec.model_copy(update={"mix": mix}), config.data_root)
        return load_task(rooted_spec, cache=cache, deduplicate=config.data.deduplicate)
    if spec.kind is None:
        raise UserError(
            f"task {spec.name}: its kind cannot be inferred, because data_gone is true; set kind", exit_code=2
        )
    return TaskData(spec.name, spec.kind, ListRows(), ListRows(), ListRows())


def open_general(config: ExperimentConfig, cache: Cache) -> TaskData | None:
    """The general rows of `data.general`, if there are any."""
    spec = config.data.general
    if spec is None:
        return None
    return load_general(rooted(spec, config.data_root), cache=cache, deduplicate=config.data.deduplicate)


def rooted(spec: Spec, root: str) -> Spec:
    """A source's section with relative paths resolved from the folder `root`.

    >>> rooted(SourceSpec(source="json:FOMC"), "data/TRACE").source
    'json:data/TRACE/FOMC'
    >>> rooted(SourceSpec(source="parquet:hf://datasets/x/y/*.parquet"), "data").source
    'parquet:hf://datasets/x/y/*.parquet'
    >>> rooted(SourceSpec(source="json:train.json", image_folder="images"), "data").image_folder
    'data/images'
    """
    if spec.image_folder is not None:
        spec = spec.model_copy(update={"image_folder": str(Path(root) / spec.image_folder)})
    scheme, _, rest = spec.source.partition(":")
    if scheme not in SCHEMES or is_url(rest):
        return spec
    return spec.model_copy(update={"source": f"{scheme}:{Path(root) / Path(rest).expanduser()}"})


__all__ = ["open_general", "open_task", "rooted"]
