"""`jaxcl plan`: compiles the real steps of a configuration for hardware that is not here."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from pydantic import Field

from jaxcl.config import ExperimentConfig
from jaxcl.data.plan import Shape
from jaxcl.errors import UserError
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.network import Network
from jaxcl.planning.hardware import Topology, find_devices, parse_topology
from jaxcl.planning.step import StepPlan, plan_step
from jaxcl.run.components import make_trainer
from jaxcl.schema import Schema
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import AXES, make_mesh, mesh_sizes
from jaxcl.training.config import check_batch_size, micro_batch_size
from jaxcl.training.trainer import Trainer


class Plan(Schema):
    """What a configuration needs on a topology."""

    topology: str = Field(description="kind of chip and grid")
    compiler: str = Field(description="tpu: the TPU's; host: this machine's, whose memory is not the TPU's")
    mesh: dict[str, int] = Field(description="ways of each mesh axis")
    batch_size: int = Field(description="rows of a training step")
    accumulate: int = Field(description="micro-batches of a step")
    remat: str = Field(description="rematerialisation policy")
    parameters: int = Field(description="params of the model")
    chip_memory: float = Field(description="bytes of a chip that a program can use")
    fits: bool = Field(description="every step fits")
    bytes_per_chip: float = Field(description="memory of the step that needs most")
    flops: float | None = Field(None, description="operations of a training step, one chip")
    roofline_seconds: float | None = Field(None, description="least seconds of a training step")
    steps: dict[str, StepPlan] = Field(description="by name")
    versions: dict[str, str] = Field(description="of jax and the compiler")


class Unplaceable(UserError):
    """No arrangement of a topology's chips is this mesh; another mesh may be one."""


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      lower: gives the lowered program.
      arguments: what it is given, by part.
      unknown_turns: see `Method.turns`.
      resident: what lies on the chips meanwhile, by part.
    """

    lower: Callable[[], Any]
    arguments: Mapping[str, Any]
    unknown_turns: int = 1
    resident: Mapping[str, Any] = {}


def plan(config: ExperimentConfig, topology_name: str, steps: Sequence[str] | None = None) -> Plan:
    """Compiles a configuration's steps for a topology. Reads no data, no weights and no tokenizer.

    Args:
      config: the configuration; its mesh section must fit the number of chips.
      topology_name: such as `v5p:4x4x4`.
      steps: names of the steps to compile, as `programs` gives them; none: all.

    Raises:
      UserError: an unknown topology or step, or a mesh, batch or model that does not fit it.
    """
    topology = parse_topology(topology_name)
    mesh, compiler = topology_mesh(config, topology)
    if compiler == "tpu" and config.model.compute.kernel == "auto":
        compute = config.model.compute.model_copy(update={"kernel": "splash"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"compute": compute})})
    found = programs(config, mesh)
    if unknown := sorted(set(steps or ()) - set(found)):
        raise UserError(f"steps: no {', '.join(unknown)} here; there are {', '.join(found)}", exit_code=2)
    chosen = {name: found[name] for name in found if steps is None or name in steps}
    network = Network.create(config.model)
    plans = {
        name: plan_step(
            one.lower(),
            one.arguments,
            topology.chip,
            causal=network.causal,
            unknown_turns=one.unknown_turns,
            resident=one.resident,
        )
        for name, one in chosen.items()
    }
    training = plans.get("replay") or plans.get("train")
    return Plan(
        topology=topology.name,
        compiler=compiler,
        mesh=dict(mesh.shape),
        batch_size=config.training.batch_size,
        accumulate=config.training.accumulate,
        remat=config.model.compute.remat,
        parameters=network.num_params,
        chip_memory=topology.chip.memory,
        fits=all(one.fits for one in plans.values()),
        bytes_per_chip=max(one.bytes_per_chip for one in plans.values()),
        flops=training.flops if training else None,
        roofline_seconds=training.roofline_seconds if training else None,
        steps=plans,
        versions=_versions(compiler),
    )


def programs(config: ExperimentConfig, mesh: Mesh) -> dict[str, Program]:
    """The programs of a run, at their largest shape.

    Args:
      config: the configuration.
      mesh: the devices that the programs are for.

    Returns:
      `train`; `replay`, a step on remembered rows, for methods that have such; what the method measures between tasks;
      `generate`, for decoders whose tasks are prompts and answers.
    """
    network = Network.create(config.model)
    layout = Layout.create(mesh, network.axes(), network.shapes())
    training, evaluation = config.training, config.evaluation
    check_batch_size(training.batch_size, training.accumulate, layout.batch_ways)
    method = config.method.build(network, len(config.tasks))
    trainer = make_trainer(config, method, layout)
    shape = row_shape(config, network.causal)
    shape = shape._replace(length=shape.length + method.longest_opening)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.replicated)
    target, batch = trainer.target, _batch(training.batch_size, shape, layout)
    parts = {"params": target.params, "optimizer": target.opt_state, "method": target.method_state}

    def step(batch: Batch) -> Program:
        return Program(lambda: trainer.jitted_step.lower(target, batch, key), {**parts, "batch": batch}, method.turns)

    found = {"train": step(batch)}
    if method.replay is not None and not method.joint:
        found["replay"] = step(_remembered(method, target, training.batch_size, shape, layout))
    # Between tasks the optimizer's state stays where it is: it counts, though no program sees it.
    processes = len({device.process_index for device in mesh.devices.flat})
    measured = _batch(micro_batch_size(training, layout.batch_ways, processes), shape, layout)
    given = (target.params, target.params, target.method_state, measured, key)
    moments = {"optimizer": target.opt_state}
    for name in jax.eval_shape(method.measurements, *given):

        def measure(before: Any, params: Any, state: Any, batch: Batch, key: Any, name: str = name) -> Any:
            return method.measurements(before, params, state, batch, key)[name]

        lower = functools.partial(jax.jit(trainer.compile.trace(measure)).lower, *given)
        arguments = {"params": target.params, "method": target.method_state, "batch": measured}
        found[name] = Program(lower, arguments, resident=moments)
    if network.causal and shape.predict is not None:
        check_batch_size(evaluation.batch_size, 1, layout.batch_ways, key="evaluation.batch_size")
        found["generate"] = _generation(config, network, trainer)
    return found


def row_shape(config: ExperimentConfig, causal: bool) -> Shape:
    """The largest shape of a batch's rows, told from the configuration alone.

    Args:
      config: the configuration.
      causal: the network is a decoder.
    """
    data = config.data
    if not causal:
        return Shape(data.length, round(data.length * data.mask_rate))
    task = config.tasks[0]
    text = task.kind == "text" or task.end_task is not None or task.source.startswith(("text:", "stdlib:docstrings"))
    return Shape(data.length, None) if text else Shape(data.prompt_length + data.answer_length, data.answer_length)


def topology_mesh(config: ExperimentConfig, topology: Topology) -> tuple[Mesh, str]:
    """The configuration's mesh over chips that are not here, and which compiler serves it: see `Plan.compiler`.

    Args:
      config: the configuration, whose mesh is laid out.
      topology: the chips.

    Raises:
      Unplaceable: the chips cannot be arranged so.
      UserError: the mesh does not fit their number.
    """
    sizes = mesh_sizes(config.mesh, topology.chips)
    devices = find_devices(topology)
    if devices is not None:
        types = (jax.sharding.AxisType.Auto,) * len(AXES)
        try:
            # As `make_mesh` does where the chips are.
            mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices.devices)
        except NotImplementedError as error:
            raise Unplaceable(f"mesh: {str(error).splitlines()[0]}", exit_code=2) from error
        return mesh, "tpu"
    # As many devices as there are chips, all of them this machine's processor.
    with contextlib.suppress(RuntimeError):  # too late where jax has looked for devices already
        jax.config.update("jax_num_cpu_devices", topology.chips)
    if len(jax.devices()) < topology.chips:
        raise UserError(f"topology {topology.name}: this process has {len(jax.devices())} devices to compile for")
    return make_mesh(config.mesh, jax.devices()[: topology.chips]), "host"


def _batch(rows: int, shape: Shape, layout: Layout, **fields: Any) -> Batch:
    def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.batch)

    whole, scored = (rows, shape.length), (rows, shape.length if shape.predict is None else shape.predict)
    # Where every position is scored, the data says so by leaving the list of positions out.
    positions = None if shape.predict is None else array(*scored)
    return Batch(
        array(*whole),
        array(*whole),
        array(*whole),
        positions,
        array(*scored),
        array(*scored, dtype=jnp.float32),
        array(rows),
        array(rows),
        **fields,
    )


def _remembered(method: Method, target: Any, rows: int, shape: Shape, layout: Layout) -> Batch:
    """A batch of remembered rows, with what the method stores beside them, from shapes alone."""
    batch = _batch(rows, shape, layout, kind="memory")
    signals = jax.eval_shape(method.signals, target.params, target.method_state, batch, jax.random.key(0))
    if signals is None:
        return batch
    zeros = {name: np.zeros(value.shape[1:], value.dtype) for name, value in signals.items()}
    collated = method.collate([method.trim(zeros)], shape)
    teacher = {
        name: jax.ShapeDtypeStruct((rows, *value.shape[1:]), value.dtype, sharding=layout.batch)
        for name, value in collated.items()
    }
    return _batch(rows, shape, layout, kind="memory", teacher=teacher)


def _generation(config: ExperimentConfig, network: Network, trainer: Trainer) -> Program:
    rows, length = config.evaluation.batch_size, config.data.prompt_length + trainer.method.longest_opening
    generator = Generator(
        network,
        batch_size=rows,
        prompt_length=length,
        max_new_tokens=config.evaluation.max_new_tokens,
        eos_id=2,
        pad_id=0,
        trace=trainer.compile.trace,
    )
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=trainer.layout.batch)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=trainer.layout.batch)
    params = trainer.target.params
    return Program(
        lambda: generator.jitted.lower(params, tokens, lengths, None),
        {"params": params, "batch": (tokens, lengths)},
        resident={"optimizer": trainer.target.opt_state, "method": trainer.target.method_state},
    )


def _versions(compiler: str) -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu") if compiler == "tpu" else ("jax", "jaxlib")
    return {name: importlib.metadata.version(name) for name in names}


def as_json(found: Plan) -> str:
    """The plan as JSON, numbers with six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        return value

    return json.dumps(short(found.model_dump(mode="json")), indent=1)
