"""Finds the mesh, rematerialisation and accumulation with which a configuration's step is fastest on a topology.

Every arrangement is first estimated by simple rules, then the most promising ones are compiled: a compilation takes
minutes, and most arrangements can be excluded without one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxcl.config import ExperimentConfig
from jaxcl.errors import UserError
from jaxcl.models.network import Network
from jaxcl.models.trainable import trained
from jaxcl.models.vision_config import vision_of
from jaxcl.planning.hardware import Chip, parse_topology
from jaxcl.planning.plan import Plan, Unplaceable, plan, row_shape
from jaxcl.planning.step import bytes_per_device
from jaxcl.sharding.mesh import MeshConfig

logger = logging.getLogger(__name__)

# Share of the memory for what is counted here; the rest is for buffers in flight, fragmentation and code.
_MARGIN = 0.9


class Arrangement(NamedTuple):
    """One way to run a step.

    Attributes:
      data: number of copies of the params.
      fsdp: number of parts of params and batch.
      tensor: number of parts of a layer.
      remat: rematerialisation policy.
      accumulate: micro-batches.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulate: int


class Estimate(NamedTuple):
    """Rough needs of an arrangement: bytes per chip and seconds per step."""

    bytes: float
    seconds: float


def search(
    config: ExperimentConfig, topology_name: str, step: str, compile_at_most: int = 3, images: int | None = None
) -> Plan:
    """The fastest arrangement found that fits, with the configured batch size.

    Args:
      config: the configuration; its mesh, `model.compute.remat` and `training.accumulate` are set by the search.
      topology_name: such as `v5e:4x4`.
      step: the step to optimise, `train` or `replay`.
      compile_at_most: maximal number of compiled arrangements.
      images: images per row; see `row_shape`.

    Raises:
      UserError: no arrangement fits, according to the estimate or the compiler.
    """
    topology = parse_topology(topology_name)
    ways = [(one, estimate(config, one, topology.chip, images)) for one in arrangements(config, topology.chips)]
    if not ways:
        raise UserError(
            f"training.batch_size: {config.training.batch_size} rows cannot be split over {topology.chips} chips by "
            "any mesh that keeps heads whole",
            exit_code=2,
        )
    possible = [pair for pair in ways if pair[1].bytes <= _MARGIN * topology.chip.memory]
    possible = sorted(possible or [min(ways, key=lambda pair: pair[1].bytes)], key=lambda pair: pair[1].seconds)
    tried: list[str] = []
    fitting: list[Plan] = []
    for one, guess in possible:
        if len(tried) == compile_at_most:
            break
        logger.info("%s: %.1f GB and %.3f s by estimate; compiling", one, guess.bytes / 1e9, guess.seconds)
        try:
            found = plan(arranged(config, one), topology_name, [step], images)
        except Unplaceable as error:
            logger.info("%s: %s", one, error)
            continue
        tried.append(str(tuple(one)))
        fitting += [found] if found.fits else []
    if not fitting:
        raise UserError(
            f"{topology_name}: no arrangement fits; compiled (data, fsdp, tensor, remat, accumulate): "
            f"{', '.join(tried) or 'none, the chips cannot be arranged that way'}"
        )
    return min(fitting, key=lambda one: one.roofline_seconds or math.inf)


def arranged(config: ExperimentConfig, one: Arrangement) -> ExperimentConfig:
    """The configuration with this arrangement.

    Args:
      config: the configuration.
      one: mesh, rematerialisation and accumulation.
    """
    compute = config.model.compute.model_copy(update={"remat": one.remat})
    return config.model_copy(
        update={
            "mesh": MeshConfig(data=one.data, fsdp=one.fsdp, tensor=one.tensor),
            "model": config.model.model_copy(update={"compute": compute}),
            "training": config.training.model_copy(update={"accumulate": one.accumulate}),
        }
    )


def arrangements(config: ExperimentConfig, chips: int) -> Iterator[Arrangement]:
    """Arrangements that split heads, mlp or experts, and batch evenly.

    There is one copy of the params, or one per `tensor` group.

    Args:
      config: the configuration.
      chips: number of chips.
    """
    model, rows = config.model, config.training.batch_size
    network, vision = Network.create(model), vision_of(model)
    for tensor in (size for size in range(1, chips + 1) if chips % size == 0):
        if model.num_heads % tensor or (network.num_experts or model.intermediate_size) % tensor:
            continue
        if vision is not None and vision.num_heads % tensor:
            continue
        rest = chips // tensor
        for data, fsdp in {(1, rest), (rest, 1)}:
            if model.hidden_size % fsdp:
                continue
            for accumulate in (size for size in (1, 2, 4, 8, 16) if rows % (size * rest) == 0):
                for remat in ("none", "dots", "full"):
                    yield Arrangement(data, fsdp, tensor, remat, accumulate)


def estimate(config: ExperimentConfig, one: Arrangement, chip: Chip, images: int | None = None) -> Estimate:
    """Memory and time of a plain training step, by rules of thumb.

    Memory: params, moments and gradient, divided by `fsdp * tensor`, and what each layer keeps for its backward pass:
    its input (`full`), also its matrix products (`dots`), or all of its activations (`none`). Time: the larger of
    compute, with 6 operations per active param and token (8 with `full`, which repeats the forward pass; 2 fewer for
    params that are not trained), and communication: gathering the params for each pass, scattering the gradient, and
    two sums over `tensor` per layer and pass. A tower is counted likewise, with patches in the place of tokens.

    Args:
      config: the configuration, already arranged.
      one: its arrangement.
      chip: what a chip can do.
      images: images per row; see `row_shape`.
    """
    model, network = config.model, Network.create(config.model)
    shape = row_shape(config, network.causal, images)
    params = network.num_params
    shapes = network.shapes()
    learned = _size(trained(shapes))
    held = bytes_per_device(shapes) - bytes_per_device(trained(shapes))
    width = 2 if model.compute.dtype == "bfloat16" else 4
    first = 2 if config.optimizer.moment_dtype == "bfloat16" else 4
    moments = {"adamw": first + 4, "lion": first, "rmsprop": 4}.get(
        config.optimizer.name, first if config.optimizer.b1 else 0
    )
    gradient = 2 if one.accumulate == 1 and model.compute.param_dtype == "bfloat16" else 4
    # Of a bfloat16 param that is trained, its low bits are kept as well; see `jaxcl.training.low_bits`.
    state = (held + learned * (4 + moments + gradient)) / (one.fsdp * one.tensor)

    rows = config.training.batch_size // (one.data * one.fsdp * one.accumulate)
    tokens = rows * shape.length
    hidden = model.hidden_size
    kept, working = _activations(tokens, hidden, network.active_units, one)
    scored = rows * min(shape.predict or shape.length, 512)
    activations = (model.num_layers * kept + working) * width + 8 * scored * model.vocab_size

    work = tokens * one.accumulate
    active: float = (network.num_active_params - _size(shapes.get("vision", {}))) * work
    vision = vision_of(model)
    if vision is not None and shape.images:
        patches = rows * shape.images * vision.side**2
        kept, working = _activations(patches, vision.hidden_size, vision.intermediate_size, one)
        activations += (vision.num_layers * kept + working) * width
        merged = _size(shapes["vision"]["tower"]) + _size(shapes["vision"]["connector"]) / vision.shuffle**2
        active += merged * patches * one.accumulate
    products = (6 if one.remat == "full" else 4) + 2 * learned / params
    compute = products * active / one.tensor / chip.flops
    passes = 3 if one.remat == "full" else 2
    gathered = (passes * one.accumulate * width * params + 4 * learned) / one.tensor if one.fsdp > 1 else 0.0
    if one.data > 1:
        gathered += 2 * 4 * learned / (one.fsdp * one.tensor)
    summed = 2 * passes * model.num_layers * 2 * work * hidden * width * (one.tensor - 1) / one.tensor
    return Estimate(state + activations, max(compute, (gathered + summed) / chip.interconnect))


def _activations(tokens: int, hidden: int, units: int, one: Arrangement) -> tuple[float, float]:
    """Numbers that a layer keeps for its backward pass, and those that it works with in it."""
    wide, split = units / one.tensor, hidden / one.tensor
    whole = 6 * hidden + 8 * split + 6 * wide
    per_token = {"full": hidden, "dots": 2 * hidden + 4 * split + 3 * wide, "none": whole}
    return tokens * per_token[one.remat], tokens * whole


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
