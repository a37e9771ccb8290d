"""`jaxcl importance`: which units or heads of a model matter for given tasks, measured without training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxcl.config import ExperimentConfig, load_config, parse_config
from jaxcl.config.experiment import override
from jaxcl.data.formats.storage import is_url
from jaxcl.data.memory import Memory
from jaxcl.errors import UserError
from jaxcl.evaluation.results import write_arrays
from jaxcl.methods import METHODS, find_method
from jaxcl.methods.base import Method
from jaxcl.models.trainable import Params
from jaxcl.reporting.importance_page import write_importance
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.fingerprints import check_same
from jaxcl.run.folder import RunFolder
from jaxcl.run.model import latest_params
from jaxcl.run.remembering import Kept, remember
from jaxcl.run.tasks import running_task
from jaxcl.sharding.processes import initialize


class _Subject(NamedTuple):
    """The measured model.

    Attributes:
      folder: folder of the tokenizer.
      params: reads its params.
      before: reads its params before training; `None` for a model that was not trained in a run.
      words: description, for the page.
    """

    folder: RunFolder
    params: Callable[[Components], Params]
    before: Callable[[Components], Params] | None
    words: str


def measure_importance(source: str, overrides: Sequence[str], out: Path | None, *, trust: bool = False) -> Path:
    """Runs the method's passes before and after each task, without the training in between.

    For a run folder, the latest checkpoint is measured, and comparisons of a model before and after training use the
    run's initial model as the former. Its tokenizer, its weights and the data of its tasks must be those that it was
    trained with, but for tasks that the overrides change. For a configuration, its initial model is measured.

    Args:
      source: a run folder, a YAML file, or the name of a configuration that comes with jaxcl.
      overrides: `KEY=VALUE` for the configuration (with a run folder: for that of the run).
      out: gets `importance.npz`, a PNG a picture and `importance.html`; `None`: the configuration's `output` with
        `_importance` behind.
      trust: whether the configuration of a run may name code outside jaxcl; see `jaxcl.config.trust`.

    Returns:
      The page.

    Raises:
      UserError: the method measures nothing, or the configuration, data or checkpoint cannot be used.
    """
    initialize()
    with tempfile.TemporaryDirectory() as scratch:
        config, subject = _subject(source, overrides, Path(scratch), trust)
        out = _beside(config.output) if out is None else out
        method = find_method(config.method.name)
        if method.tables is Method.tables:
            able = ", ".join(name for name in METHODS if find_method(name).tables is not Method.tables)
            raise UserError(
                f"method.name: {config.method.name} measures no importance; allowed: {able}, or a method with tables",
                exit_code=2,
            )
        note = ""
        if subject.before is None:
            options, note = method.without_training(config.method.options)
            section = config.method.model_copy(update={"options": options})
            config = config.model_copy(update={"method": section})
        parts = build(config, subject.folder)
        tables = importance_tables(parts, subject.params(parts), subject.before)
    if jax.process_index() == 0:
        write_arrays(out / "importance.npz", tables)
        write_importance(out, tables, parts.names, title=f"{config.method.name} on {subject.words}", note=note)
    return out / "importance.html"


def _beside(output: str) -> Path:
    if is_url(output):
        raise UserError(f"output {output}: is a URL; name a folder for the arrays and the page by --out", exit_code=2)
    return Path(f"{output}_importance")


def importance_tables(
    parts: Components, params: Params, before: Callable[[Components], Params] | None = None
) -> dict[str, np.ndarray]:
    """The method's tables after `prepare` and `consolidate` on every task, with the same params throughout.

    Args:
      parts: the parts of a run over the tasks.
      params: the model's params, with the run's shardings.
      before: reads the params used as those before each task; `None`: `params`.
    """
    method, layout = parts.method, parts.layout
    state, kept = parts.trainer.init_method(params), Kept(Memory(seed=parts.config.seed), {})

    def params_before() -> Params:
        return params if before is None else before(parts)

    for index in range(parts.phases):
        task = running_task(parts, kept, index, stage="before", params_before=params_before)
        state = layout.place(method.prepare(params, state, task))
        kept = remember(parts, kept, index, params)
        task = running_task(parts, kept, index, stage="after", params_before=params_before)
        state = layout.place(method.consolidate(params, state, task))
    return {name: np.asarray(table) for name, table in task.compile(method.tables)(state).items()}


def _subject(source: str, overrides: Sequence[str], scratch: Path, trust: bool) -> tuple[ExperimentConfig, _Subject]:
    if not Path(source).is_dir():
        config = load_config(source, overrides)
        words = config.weights or "a model from scratch"
        return config, _Subject(RunFolder(scratch), initial_params, None, words)
    folder = RunFolder.open(Path(source))
    content = folder.content(trust=trust)
    run = parse_config(content, str(folder.config_file))
    config = parse_config(override(content, overrides), str(folder.config_file))

    def latest(parts: Components) -> Params:
        params, saved = latest_params(folder, parts.trainer.target.params)
        check_same(parts, saved, run)
        return params

    return config, _Subject(folder, latest, initial_params, f"the model of {source}")
