"""Builds the parts of a run from its configuration: data, tokenizer, network, method, trainer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from jaxcl.config import ExperimentConfig
from jaxcl.data.cache import Cache, Share
from jaxcl.data.chat_rows import ChatRows, messages_of
from jaxcl.data.chat_templates import find_template
from jaxcl.data.conversations import end_of_turn
from jaxcl.data.encode import Texts
from jaxcl.data.images.reference import shown
from jaxcl.data.memory import Memory, TaskMemory
from jaxcl.data.mixture import MixedRows, MixturePipeline
from jaxcl.data.packed_pairs import pack_pairs
from jaxcl.data.pairs import PairRows, shapes_for, tiles_of
from jaxcl.data.pipeline import Pipeline
from jaxcl.data.plan import Shape, spread_sizes
from jaxcl.data.rows import EncodedRows, HostBatch
from jaxcl.data.sources import TaskData, load_end_task
from jaxcl.data.spec import DataConfig, Kind, TokenizerConfig
from jaxcl.data.text import TextRows
from jaxcl.data.tokenizer import Tokenizer, prepare_tokenizer
from jaxcl.errors import UserError
from jaxcl.methods.base import Method
from jaxcl.models.network import Network
from jaxcl.models.soft_tokens import SOFT_TOKENS, start_from_words
from jaxcl.models.trainable import Params, overlay
from jaxcl.models.vision_config import vision_of
from jaxcl.run.checks import check_copies, check_metrics, check_private_data, check_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.run.images import image_processor, let_see
from jaxcl.run.loading import open_general, open_task, rooted
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import make_mesh
from jaxcl.sharding.processes import everywhere, on_each, on_first
from jaxcl.training.config import check_batch_size
from jaxcl.training.privacy import check_private
from jaxcl.training.trainer import Trainer
from jaxcl.weights.locate import locate


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of a run, which are the same for all its tasks.

    Attributes:
      config: the configuration.
      tasks: rows of every task, in the order learned; empty for a task whose data is gone.
      tokenizer: text to ids and back.
      network: the network.
      method: the continual-learning method.
      layout: shardings of the run's arrays.
      trainer: the compiled step.
      cache: where the rows of files are encoded.
      gone_sizes: sizes of the pairs of tasks whose data is gone, as far as the run remembers examples of them.
      general: general rows that all tasks are mixed with, if there are any.
    """

    config: ExperimentConfig
    tasks: tuple[TaskData, ...]
    tokenizer: Tokenizer
    network: Network
    method: Method
    layout: Layout
    trainer: Trainer
    cache: Cache
    gone_sizes: tuple[Int[np.ndarray, "examples 2"], ...] = ()
    general: TaskData | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def phases(self) -> int:
        """Number of trainings: one per task, or one on all tasks together."""
        return 1 if self.method.joint else len(self.tasks)

    def phase_name(self, index: int) -> str:
        """Name of what the model is trained on in a phase: the task, or all tasks."""
        return "all tasks" if self.method.joint else self.tasks[index].name

    @functools.cached_property
    def all_train_rows(self) -> Mapping[int, EncodedRows]:
        """The encoded training examples of every task whose data is not gone, by index."""
        available = (index for index, spec in enumerate(self.config.tasks) if not spec.data_gone)
        return {index: self.encode(index, "train") for index in available}

    def train_rows(self, index: int) -> EncodedRows:
        """The encoded training examples of a task.

        Raises:
          UserError: its data is gone.
        """
        if index not in self.all_train_rows:
            raise UserError(f"task {self.names[index]}: its examples are needed (tasks.{index}.data_gone is true)")
        return self.all_train_rows[index]

    @functools.cached_property
    def shapes(self) -> list[Shape] | None:
        """Shapes of prompt-answer batches, shared by all tasks and the memory, because a step is compiled per shape."""
        rows = [*self.all_train_rows.values()]
        if self.general is not None:
            rows += [self.general_rows(index) for index in range(len(self.tasks))]
        pairs = [one for one in dict.fromkeys(rows) if one.group == PairRows.group]
        sizes = [*(one.sizes for one in pairs), *self.gone_sizes]
        tiles = [*map(tiles_of, pairs), *(np.zeros(len(one), np.int64) for one in self.gone_sizes)]
        return shapes_for(np.concatenate(sizes), self.config.data, np.concatenate(tiles)) if sizes else None

    @functools.cached_property
    def learned_rows(self) -> Mapping[int, EncodedRows]:
        """The rows of the training batches of every task whose data is not gone: its examples, packed if configured."""
        if not self.config.data.pack_pairs or self.shapes is None:
            return self.all_train_rows
        if self.shapes[-1].images:
            raise UserError("data.pack_pairs: rows with images are not packed; allowed is false", exit_code=2)
        return pack_pairs(self.all_train_rows, self.shapes[-1].length)

    @functools.cached_property
    def _general(self) -> dict[tuple[int, ...], EncodedRows]:
        return {}

    def general_rows(self, index: int) -> EncodedRows:
        """The encoded general examples that a task is mixed with; one object for all tasks with one prompt prefix.

        Args:
          index: which task.
        """
        assert self.general is not None
        prefix = tuple(self.method.prompt_prefix(index)) if self.general.answered else ()
        if prefix not in self._general:
            self._general[prefix] = self._encode(self.general.train, self.general.kind, index, "data.general")
        return self._general[prefix]

    def encode(self, index: int, split: str) -> EncodedRows:
        """The encoded examples of a task.

        Args:
          index: which task.
          split: `train`, `dev` or `test`.

        Raises:
          UserError: the split is empty.
        """
        task, spec = self.tasks[index], self.config.tasks[index]
        if not getattr(task, split):
            raise UserError(f"task {task.name}: no {split} examples")
        if not task.mixed:
            return self._encode(getattr(task, split), task.kind, index, task.name)
        there = [(one, of.weight) for one, of in zip(task.mixed, spec.mix, strict=True) if getattr(one, split)]
        sources = [self._encode(getattr(one, split), one.kind, index, one.name) for one, _ in there]
        return MixedRows(sources, [weight for _, weight in there], spec.mix_by, name=task.name)

    def rows_of(self, rows: Texts, index: int) -> PairRows | TextRows:
        """Rows of a task, encoded.

        Args:
          rows: rows of the task's kind, or its examples as they were encoded before.
          index: which task.
        """
        return self._encode(rows, self.tasks[index].kind, index, self.tasks[index].name)

    def _encode(self, rows: Texts, kind: Kind, index: int, name: str) -> PairRows | TextRows:
        if kind in ("pairs", "chat"):
            return self._pairs(rows, kind, index, name, self.config.data)
        return TextRows(
            rows,
            self.tokenizer,
            self.config.data,
            objective="causal" if self.network.causal else "masked",
            task=index,
            name=name,
            cache=self.cache,
        )

    def encode_all(self) -> None:
        """Encodes what will be trained on and what text is scored, so that errors come first and no step waits."""
        for index in self.all_train_rows:
            if not self.tasks[index].answered:
                self.encode(index, self.config.evaluation.split)
        if self.general is not None:
            self.general_rows(0)
        _ = self.shapes  # refuses lengths that are too small

    @functools.cached_property
    def end_tasks(self) -> Mapping[int, TaskData]:
        """The end tasks of all domains that have one and can be scored, by index."""
        config = self.config
        return {
            index: load_end_task(rooted(spec.end_task, config.data_root), spec.name)
            for index, spec in enumerate(config.tasks)
            if spec.end_task is not None and not spec.data_gone
        }

    @functools.cached_property
    def train_prints(self) -> list[str]:
        """Fingerprint of each task's training rows in their order."""
        return [task.train.fingerprint["ordered"] for task in self.tasks]

    def about(self, task: TaskMemory) -> dict[str, str | int]:
        """What a task's teacher store belongs to: the task, its rows and tokenizer, and the sizes of the model."""
        network = self.network
        sizes = {"layers": network.num_layers, "heads": network.num_heads, "vocabulary": network.vocab_size}
        return {"task": task.name, "rows": task.rows, "tokenizer": self.tokenizer.fingerprint, **sizes}

    def encode_written(self, rows: Sequence[Mapping[str, str]], index: int, name: str) -> PairRows:
        """Prompts and answers that a model wrote for a task, encoded; too long answers are cut.

        Args:
          rows: rows with `prompt` and `answer`.
          index: number of the task.
          name: name of the task.
        """
        data = self.config.data.model_copy(update={"on_long_answer": "cut"})
        return self._pairs(rows, self.tasks[index].kind, index, name, data)

    def _pairs(self, rows: Texts, kind: Kind, index: int, name: str, data: DataConfig) -> PairRows:
        encoded = ChatRows if kind == "chat" else PairRows
        return encoded(
            rows,
            self.tokenizer,
            data,
            task=index,
            name=name,
            prompt_prefix=self.method.prompt_prefix(index),
            cache=self.cache,
        )

    def pipeline(
        self, sources: Sequence[EncodedRows], *, batch_size: int | None = None, origin: str = "task"
    ) -> Pipeline:
        """Training batches of encoded examples; see `Pipeline`, and `MixturePipeline` if a source is a mixture.

        Args:
          sources: encoded examples.
          batch_size: rows of a batch; none: `training.batch_size`.
          origin: see `Pipeline`.
        """
        size = batch_size or self.config.training.batch_size
        kind = MixturePipeline if any(isinstance(rows, MixedRows) for rows in sources) else Pipeline
        return kind(sources, size, self.config.data, shapes=self.shapes, origin=origin)

    def training_pipeline(self, index: int) -> Pipeline:
        """Batches of the rows that a phase trains on, without memory and general rows."""
        indices = list(self.learned_rows) if self.method.joint else [index]
        if not self.method.joint:
            self.train_rows(index)  # its data may be gone
        return self.pipeline([self.learned_rows[one] for one in indices])


class Processes(Share):
    """The work that the processes of a run share."""

    def __init__(self) -> None:
        self.index = jax.process_index()
        self.count = jax.process_count()

    def agree(self, found: bool) -> bool:
        """Whether it is so in every process."""
        return everywhere(found)

    def together(self, action: Callable[[], object]) -> None:
        """Runs an action in every process and waits for all; an error of one is raised in all."""
        on_each(action)


class ProcessShare:
    """This process's share of a pipeline: its rows of each batch."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.steps_per_epoch = pipeline.steps_per_epoch

    def once(self, limit: int | None = None, seed: int | None = None) -> Iterator[HostBatch]:
        """See `Pipeline.once`."""
        return self._pipeline.once(limit, seed, jax.process_index(), jax.process_count())

    def batch_at(self, step: int, *, seed: int) -> HostBatch:
        """See `Pipeline.batch_at`."""
        index, count = jax.process_index(), jax.process_count()
        return self._pipeline.batch_at(step, seed=seed, process_index=index, process_count=count)


def build(config: ExperimentConfig, folder: RunFolder) -> Components:
    """Builds everything but the params.

    Args:
      config: the configuration.
      folder: the run folder; the tokenizer is saved in it.

    Raises:
      UserError: data cannot be read, a batch cannot be split over the mesh, or the tokenizer does not match the model.
    """
    network = Network.create(config.model)
    layout = Layout.create(make_mesh(config.mesh), network.axes(), network.shapes())
    processes = jax.process_count()
    check_batch_size(config.training.batch_size, config.training.accumulate, layout.batch_ways, processes)
    check_batch_size(config.evaluation.batch_size, 1, layout.batch_ways, processes, key="evaluation.batch_size")
    if any(spec.end_task is not None for spec in config.tasks):
        size = config.evaluation.end_task.batch_size
        check_batch_size(size, 1, layout.batch_ways, processes, key="evaluation.end_task.batch_size")
    cache = Cache(config.data.cache, Processes())
    tasks = tuple(open_task(spec, config, cache) for spec in config.tasks)
    general = open_general(config, cache)
    method = config.method.build(network, len(tasks))
    check_tasks(config, tasks, method, general)
    check_copies(config, tasks, method)
    check_metrics(config, tasks)
    tokenizer = load_tokenizer(config, tasks if general is None else (*tasks, general), folder.tokenizer)
    tokenizer.check_vocab(network.vocab_size)
    trainer = make_trainer(config, method, layout)
    sizes = _gone_sizes(config, tasks, method, folder)
    return Components(config, tasks, tokenizer, network, method, layout, trainer, cache, sizes, general)


def _gone_sizes(
    config: ExperimentConfig, tasks: Sequence[TaskData], method: Method, folder: RunFolder
) -> tuple[Int[np.ndarray, "examples 2"], ...]:
    """Sizes of the pairs of tasks whose data is gone, as the run's memory knows them."""
    gone = {index for index, spec in enumerate(config.tasks) if spec.data_gone and tasks[index].answered}
    if not gone or method.replay is None or not folder.memory.is_file():
        return ()
    return tuple(spread_sizes(one.sizes) for one in Memory.load(folder.memory).tasks if one.task in gone)


def make_trainer(config: ExperimentConfig, method: Method, layout: Layout) -> Trainer:
    """The method's trainer, as configured.

    Raises:
      UserError: private training is configured, but the method cannot be trained privately.
    """
    training = config.training
    if training.privacy is not None:
        check_private(method, config.method.name)
        check_private_data(config)
    federated = config.federated
    return Trainer(
        method,
        config.optimizer,
        layout,
        accumulate=training.accumulate,
        seed=config.seed,
        privacy=training.privacy,
        drift=None if federated is None else federated.drift,
        freeze_a=federated is not None and federated.only_adapters(config.model.lora is not None),
    )


def load_tokenizer(config: ExperimentConfig, tasks: tuple[TaskData, ...], folder: Path) -> Tokenizer:
    """The run's tokenizer, saved in `folder`: configured, from the weights, or trained on tasks and general rows."""
    if jax.process_count() > 1:  # process 0 writes it, the others read it
        on_first(lambda: _load_tokenizer(config, tasks, folder))
    return _load_tokenizer(config, tasks, folder)


def _load_tokenizer(config: ExperimentConfig, tasks: tuple[TaskData, ...], folder: Path) -> Tokenizer:
    settings = config.tokenizer
    weights = None if config.weights is None else locate(config.weights)[1]
    if settings.path is None and weights is not None:
        settings = TokenizerConfig(path=str(weights))
    texts = functools.partial(_texts, tasks, settings.train_rows)
    vision = vision_of(config.model)
    images = None if vision is None else image_processor(vision, config.data.images, weights)
    specials = () if images is None else images.specials()
    masked = not Network.create(config.model).causal
    tokenizer = prepare_tokenizer(settings, texts, folder, masked=masked, specials=specials)
    if vision is not None and images is not None:
        let_see(tokenizer, vision, images, folder)
    if any(task.kind == "chat" for task in tasks):
        # The model that the run leaves is asked by this template, and its answers end as the template ends them.
        template = find_template(config.data.chat_template, tokenizer)
        ends = tuple(dict.fromkeys([*tokenizer.end_ids, end_of_turn(tokenizer, config.data.chat_template)]))
        if (template, ends) != (tokenizer.chat_template, tokenizer.end_ids):
            tokenizer.chat_template, tokenizer.end_ids = template, ends
            if jax.process_index() == 0:
                tokenizer.save(folder)
    if settings.path is not None and not (folder / "tokenizer.json").exists():
        tokenizer.save(folder)
    return tokenizer


def _texts(tasks: tuple[TaskData, ...], limit: int | None) -> Iterator[str]:
    for task in tasks:
        for row in itertools.islice(task.train, limit):
            if task.kind == "chat":
                yield from (shown(message["content"]) for message in messages_of(row))
            else:
                yield from (shown(value) for key, value in row.items() if key in ("prompt", "answer", "text"))


def initial_params(components: Components) -> Params:
    """The initial params of a run, sharded: read from `weights`, or randomly initialised.

    Raises:
      UserError: the weights cannot be read, or do not match the configured model.
    """
    config, network, layout = components.config, components.network, components.layout
    key = jax.random.key(config.seed)
    if config.weights is not None:
        from jaxcl.weights import load_params

        params = load_params(config.weights, network, shardings=layout.params, key=key, fresh_head=config.fresh_head)
    else:
        params = jax.jit(network.init, out_shardings=layout.params)(key)
    if network.num_soft_tokens:
        places = {SOFT_TOKENS: layout.params[SOFT_TOKENS]}
        params = overlay(params, jax.jit(start_from_words, out_shardings=places)(params, key))
    return params
