"""`jaxcl plan`: compiles the steps of a configuration for hardware that is not available here."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import Field

from jaxcl.config import ExperimentConfig
from jaxcl.data.plan import Shape
from jaxcl.data.sources import expected_kind
from jaxcl.errors import UserError
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.images import Images
from jaxcl.models.network import Network
from jaxcl.models.vision_config import vision_of
from jaxcl.planning.hardware import Topology, find_devices, parse_topology
from jaxcl.planning.step import StepPlan, plan_step
from jaxcl.run.checks import longest_prefix
from jaxcl.run.components import make_trainer
from jaxcl.schema import Schema
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import AXES, make_mesh, mesh_sizes
from jaxcl.training.config import check_batch_size, micro_batch_size
from jaxcl.training.state import TrainState
from jaxcl.training.stored import stored_shapes
from jaxcl.training.trainer import Trainer


class Plan(Schema):
    """The needs of a configuration on a topology."""

    topology: str = Field(description="kind of chip and grid")
    compiler: str = Field(
        description="tpu: the TPU compiler; host: that of this machine, whose memory figures are not a TPU's, and "
        "for GPUs, whose bfloat16 it computes in float32, are an upper estimate"
    )
    mesh: dict[str, int] = Field(description="size of each mesh axis")
    batch_size: int = Field(description="rows per training step")
    accumulate: int = Field(description="micro-batches per step")
    remat: str = Field(description="rematerialisation policy")
    images: int = Field(0, description="images (or tiles of larger ones) per row")
    parameters: int = Field(description="number of parameters of the model")
    active_parameters: int | None = Field(
        None, description="of them, those that a token is computed with, in a model with experts; none: all"
    )
    chip_memory: float = Field(description="bytes per chip that a program can use")
    fits: bool = Field(description="whether every step fits")
    bytes_per_chip: float = Field(description="memory of the step that needs the most")
    flops: float | None = Field(None, description="operations of a training step, per chip")
    roofline_seconds: float | None = Field(None, description="lower bound for the seconds of a training step")
    steps: dict[str, StepPlan] = Field(description="the steps by name")
    versions: dict[str, str] = Field(description="versions of jax and the compiler")


class Unplaceable(UserError):
    """The topology's chips cannot be arranged as this mesh; another mesh may be possible."""


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      lower: returns the lowered program.
      arguments: its arguments, by part.
      loop_trips: see `ToolHooks.loop_trips`.
      resident: arrays that stay on the chips but are not arguments, by part.
    """

    lower: Callable[[], Any]
    arguments: Mapping[str, Any]
    loop_trips: int = 1
    resident: Mapping[str, Any] = {}


def plan(
    config: ExperimentConfig, topology_name: str, steps: Sequence[str] | None = None, images: int | None = None
) -> Plan:
    """Compiles a configuration's steps for a topology, without reading data, weights or tokenizer.

    Args:
      config: the configuration; its mesh section must fit the number of chips.
      topology_name: such as `v5p:4x4x4`.
      steps: names of the steps to compile, see `programs`; none: all.
      images: images per row; see `row_shape`.

    Raises:
      UserError: an unknown topology or step, or a mesh, batch, model or number of images that does not fit it.
    """
    topology = parse_topology(topology_name)
    mesh, compiler = topology_mesh(config, topology)
    if compiler == "tpu" and config.model.compute.kernel == "auto":
        compute = config.model.compute.model_copy(update={"kernel": "splash"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"compute": compute})})
    found = programs(config, mesh, images)
    if unknown := sorted(set(steps or ()) - set(found)):
        raise UserError(f"steps: no {', '.join(unknown)} here; allowed: {', '.join(found)}", exit_code=2)
    chosen = {name: found[name] for name in found if steps is None or name in steps}
    network = Network.create(config.model)
    plans = {
        name: plan_step(
            one.lower(),
            one.arguments,
            topology.chip,
            causal=network.causal,
            loop_trips=one.loop_trips,
            experts=network.num_experts or 1,
            window_share=sum(network.config.windowed) / network.num_layers,
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
        images=row_shape(config, network.causal, images).images,
        parameters=network.num_params,
        active_parameters=network.num_active_params if network.num_experts else None,
        chip_memory=topology.chip.memory,
        fits=all(one.fits for one in plans.values()),
        bytes_per_chip=max(one.bytes_per_chip for one in plans.values()),
        flops=training.flops if training else None,
        roofline_seconds=training.roofline_seconds if training else None,
        steps=plans,
        versions=_versions(compiler),
    )


def programs(config: ExperimentConfig, mesh: Mesh, images: int | None = None) -> dict[str, Program]:
    """The programs of a run, with their largest shapes.

    Args:
      config: the configuration.
      mesh: the devices that the programs are for.
      images: images per row; see `row_shape`.

    Returns:
      `train`; `replay`, a step on remembered rows, for methods with replay; the method's measurements between tasks;
      `generate`, for decoders whose tasks are prompts and answers.
    """
    network = Network.create(config.model)
    layout = Layout.create(mesh, network.axes(), network.shapes())
    training, evaluation = config.training, config.evaluation
    check_batch_size(training.batch_size, training.accumulate, layout.batch_ways)
    method = config.method.build(network, len(config.tasks))
    trainer = make_trainer(config, method, layout)
    unpacked = config.model_copy(update={"data": config.data.model_copy(update={"pack_pairs": False})})
    # Rows of the memory, and those that are measured between tasks, hold one pair each.
    packed, shape = (
        shape._replace(length=shape.length + longest_prefix(method))
        for shape in (row_shape(one, network.causal, images) for one in (config, unpacked))
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.replicated)
    target, batch = trainer.target, _batch(config, training.batch_size, packed, layout)
    optimizer = target.opt_state, target.low_bits
    parts = {"params": target.params, "optimizer": optimizer, "method": target.method_state}

    def step(batch: Batch) -> Program:
        return Program(
            lambda: trainer.jitted_step.lower(target, batch, key), {**parts, "batch": batch}, method.loop_trips
        )

    found = {"train": step(batch)}
    if method.replay is not None and not method.joint:
        found["replay"] = step(_remembered(config, method, target, shape, layout))
    # Between tasks the optimizer's state stays on the chips, although it is not an argument.
    processes = len({device.process_index for device in mesh.devices.flat})
    measured = _batch(config, micro_batch_size(training, layout.batch_ways, processes), shape, layout)
    given = (target.params, target.params, target.method_state, measured, key)
    moments = {"optimizer": optimizer}
    for name in jax.eval_shape(method.measurements, *given):

        def measure(before: Any, params: Any, state: Any, batch: Batch, key: Any, name: str = name) -> Any:
            return method.measurements(before, params, state, batch, key)[name]

        lower = functools.partial(jax.jit(trainer.compile.trace(measure)).lower, *given)
        arguments = {"params": target.params, "method": target.method_state, "batch": measured}
        found[name] = Program(lower, arguments, resident=moments)
    if network.causal and {"pairs", "chat"} & set(map(expected_kind, config.tasks)):
        check_batch_size(evaluation.batch_size, 1, layout.batch_ways, key="evaluation.batch_size")
        found["generate"] = _generation(config, network, trainer, shape.images)
    return found


def row_shape(config: ExperimentConfig, causal: bool, images: int | None = None) -> Shape:
    """The largest shape of a batch's rows over all tasks, from the configuration alone; see `expected_kind`.

    Args:
      config: the configuration.
      causal: the model is a decoder; an encoder learns masked text only.
      images: images (or tiles of larger ones) per row; none: as many as a prompt has room for, if the model sees.

    Returns:
      The shape with the longest rows; of equally long ones, that with more scored positions. Rows of text have no
      images.

    Raises:
      UserError: a prompt has no room for the images, or the model does not see.
    """
    data, tiles = config.data, _images(config, images)
    if not causal:
        return Shape(data.length, round(data.length * data.mask_rate))
    length = data.prompt_length + data.answer_length
    pairs = Shape(length, length if data.pack_pairs else data.answer_length, tiles)
    kinds = set(map(expected_kind, config.tasks))
    if data.general is not None:
        kinds.add(expected_kind(data.general))
    shapes = {pairs if kind in ("pairs", "chat") else Shape(data.length, None) for kind in kinds}
    return max(shapes, key=lambda shape: (shape.length, shape.length if shape.predict is None else shape.predict))


def _images(config: ExperimentConfig, images: int | None) -> int:
    """Images per row, see `row_shape`."""
    vision = vision_of(config.model)
    room = 0 if vision is None else config.data.prompt_length // vision.image_tokens
    if images is not None and images > room:
        reason = (
            "the model does not see (model.vision is none)"
            if vision is None
            else f"a prompt of {config.data.prompt_length} tokens has room for {room} of {vision.image_tokens} each"
        )
        raise UserError(f"images: {images} per row; {reason}", exit_code=2)
    return room if images is None else images


def topology_mesh(config: ExperimentConfig, topology: Topology) -> tuple[Mesh, str]:
    """The configuration's mesh over the topology's chips, and the compiler for it (`Plan.compiler`).

    Args:
      config: the configuration, whose mesh is laid out.
      topology: the chips.

    Raises:
      Unplaceable: the chips cannot be arranged as the mesh.
      UserError: the mesh does not fit the number of chips.
    """
    sizes = mesh_sizes(config.mesh, topology.chips)
    devices = find_devices(topology)
    if devices is not None:
        types = (jax.sharding.AxisType.Auto,) * len(AXES)
        try:
            # As in `make_mesh`, which is used with real chips.
            mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices.devices)
        except NotImplementedError as error:
            raise Unplaceable(f"mesh: {str(error).splitlines()[0]}", exit_code=2) from error
        return mesh, "tpu"
    # One CPU device per chip.
    with contextlib.suppress(RuntimeError):  # too late if jax has initialised its devices already
        jax.config.update("jax_num_cpu_devices", topology.chips)
    if len(jax.devices()) < topology.chips:
        raise UserError(f"topology {topology.name}: this process has only {len(jax.devices())} devices to compile for")
    return make_mesh(config.mesh, jax.devices()[: topology.chips]), "host"


def _batch(config: ExperimentConfig, rows: int, shape: Shape, layout: Layout, **fields: Any) -> Batch:
    images = _tiles(config, rows, shape.length, shape.images, layout)
    return Batch.abstract(rows, shape.length, shape.predict, sharding=layout.batch, images=images, **fields)


def _tiles(config: ExperimentConfig, rows: int, length: int, images: int, layout: Layout) -> Images | None:
    """Shapes of the raw pixels of a batch, and of their places in its rows."""
    vision = vision_of(config.model)
    if vision is None or not images:
        return None
    side = vision.image_size
    pixels = jax.ShapeDtypeStruct((rows, images, side, side, 3), jnp.uint8, sharding=layout.batch)
    arrays: Any = pixels, jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=layout.batch)
    return Images(*arrays)


def _remembered(
    config: ExperimentConfig, method: Method[Any], target: TrainState, shape: Shape, layout: Layout
) -> Batch:
    """Shapes of a batch of remembered rows, with what the method stores with them."""
    rows = config.training.batch_size
    teacher = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout.batch)
        for name, value in stored_shapes(method, target.params, target.method_state, rows, shape).items()
    }
    return _batch(config, rows, shape, layout, origin="memory", teacher=teacher or None)


def _generation(config: ExperimentConfig, network: Network, trainer: Trainer, images: int) -> Program:
    rows, length = config.evaluation.batch_size, config.data.prompt_length + longest_prefix(trainer.method)
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
    # Of tiles, a program is compiled for each power of 2.
    count = 1 << (images - 1).bit_length() if images else 0
    target, shown = trainer.target, _tiles(config, rows, length, count, trainer.layout)
    return Program(
        lambda: generator.jitted.lower(target.params, tokens, lengths, None, shown),
        {"params": target.params, "batch": (tokens, lengths, shown)},
        resident={"optimizer": (target.opt_state, target.low_bits), "method": target.method_state},
    )


def _versions(compiler: str) -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu") if compiler == "tpu" else ("jax", "jaxlib")
    return {name: importlib.metadata.version(name) for name in names}


def as_json(found: Plan) -> str:
    """The plan as JSON, with numbers of six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        return value

    return json.dumps(short(found.model_dump(mode="json")), indent=1)
