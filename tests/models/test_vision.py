"""Images in a decoder: what changes with them, what must not, and what is compiled without them."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxcl.functional.soft_masks import LAYER, TOWER, Unit
from jaxcl.models.images import Images
from jaxcl.models.network import Network, Params
from jaxcl.models.trainable import trained
from jaxcl.models.vision import position_ids
from jaxcl.models.vision_config import VisionConfig
from jaxcl.sharding.rules import shardings
from jaxcl.training.freeze import moving
from tests.tiny.networks import init, tiny_llama
from tests.tiny.seeing import IMAGE_TOKENS, SIZES, batch, images_of, seeing

SHARED = f"{TOWER}{LAYER}"


def states(network: Network, params: Params, images: Images | None) -> np.ndarray:
    return np.asarray(jax.jit(network.hidden)(params, batch(images)).states)


def test_a_program_without_images_is_that_of_the_decoder_alone() -> None:
    network, text = seeing(), tiny_llama()
    given = batch(None)

    def program(network: Network, part: Params) -> str:
        rest = {name: leaf for name, leaf in network.shapes().items() if name not in part}

        def loss(part: Params, rest: Params) -> jax.Array:
            return jnp.sum(network.logits(part | rest, network.hidden(part | rest, given).states))

        lowered = jax.jit(jax.value_and_grad(loss)).lower(part, rest).as_text()
        return re.sub(r"@\w+", "@function", lowered)

    assert program(network, text.shapes()) == program(text, text.shapes())
    start, alone = init(network), init(text)
    jax.tree.map(np.testing.assert_array_equal, {name: start[name] for name in alone}, alone)


def test_layers_of_the_tower_are_scanned() -> None:
    def lines(layers: int) -> int:
        network = seeing(num_layers=layers)
        given = batch(images_of([[0], [0]], 1))
        return len(jax.jit(network.hidden).lower(network.shapes(), given).as_text().splitlines())

    assert lines(3) == lines(7)  # the decoder has 2: what has its shapes is one function with it


def test_an_image_changes_what_comes_after_it_in_its_own_row() -> None:
    network = seeing()
    params = init(network)
    images = images_of([[0, 1], [0, 1]], 2)
    base = states(network, params, images)
    other = dataclasses.replace(images, pixels=images.pixels.at[0, 1].add(1.0))
    changed = np.abs(states(network, params, other) - base).max(axis=-1) > 0
    assert not changed[0, :6].any()
    assert changed[0, 6:].all()
    assert not changed[1].any()


def test_frames_that_nothing_points_at_and_the_order_of_images_change_nothing() -> None:
    network = seeing()
    params = init(network)
    two = images_of([[0, 1], [1, 0]], 2)
    base = states(network, params, two)

    def filled(value: float) -> np.ndarray:
        pixels = jnp.concatenate([two.pixels, jnp.full((2, 1, 8, 8, 3), value)], axis=1)
        return states(network, params, dataclasses.replace(two, pixels=pixels))

    np.testing.assert_array_equal(filled(jnp.nan), filled(1.0))
    # Other shapes and places are other products, whose last digits are the processor's affair.
    np.testing.assert_allclose(filled(1.0), base, rtol=1e-5, atol=1e-5)
    swapped = dataclasses.replace(images_of([[1, 0], [0, 1]], 2), pixels=two.pixels[:, ::-1])
    np.testing.assert_allclose(states(network, params, swapped), base, rtol=1e-5, atol=1e-5)


def test_no_gradient_comes_from_frames_that_nothing_points_at() -> None:
    network = seeing()
    images = images_of([[0], [1]], 2)

    def loss(pixels: jax.Array) -> jax.Array:
        given = dataclasses.replace(images, pixels=pixels)
        return jnp.sum(jnp.square(network.hidden(init(network), batch(given)).states))

    slopes = np.abs(np.asarray(jax.jit(jax.grad(loss))(images.pixels))).max(axis=(2, 3, 4)) > 0
    np.testing.assert_array_equal(slopes, [[True, False], [False, True]])


def test_raw_pixels_are_normalised() -> None:
    network = seeing(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    params, images = init(network), images_of([[0], [0]], 1)
    raw = np.random.default_rng(1).integers(0, 256, images.pixels.shape).astype(np.uint8)
    normal = (raw / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    found, expected = (
        states(network, params, dataclasses.replace(images, pixels=jnp.asarray(pixels)))
        for pixels in (raw, normal.astype(np.float32))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rematerialisation_changes_no_gradient() -> None:
    images, slopes = images_of([[0, 1], [1, 0]], 2), []
    for remat in ("none", "dots", "full"):
        config = seeing().config
        network = Network.create(
            config.model_copy(update={"compute": config.compute.model_copy(update={"remat": remat})})
        )

        def loss(params: Params, network: Network = network) -> jax.Array:
            return jnp.sum(jnp.square(network.hidden(params, batch(images)).states))

        slopes.append(jax.jit(jax.grad(loss))(init(network)))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes[0]["vision"])) > 0
    for other in slopes[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), slopes[0], other)


def test_a_model_without_a_tower_refuses_images() -> None:
    with pytest.raises(ValueError, match="images: expected a config with vision"):
        tiny_llama().embed(init(tiny_llama()), batch(images_of([[0], [0]], 1)))
    images = images_of([[0], [0]], 1)
    with pytest.raises(ValueError, match="2 pixels times a multiple of 2, got 6 and 8"):
        seeing().embed(init(seeing()), batch(dataclasses.replace(images, pixels=images.pixels[:, :, :6])))


def test_params_of_the_tower_say_what_they_are() -> None:
    network = tiny_llama(vision=VisionConfig(**SIZES), lora={"rank": 2})
    axes, vision = network.axes(), network.shapes()["vision"]
    assert axes["vision"]["tower"]["blocks"]["query"]["kernel"] == ("tower_layers", "embed", "heads", "head_dim")
    units = network.units()["vision"]
    assert units["tower"]["blocks"]["query"]["kernel"] == Unit("tower_heads", 2)
    assert units["tower"]["blocks"]["out"]["kernel"] == Unit("tower_heads", 1)
    assert units["tower"]["blocks"]["up"]["bias"] == Unit("tower_intermediate", 1)
    assert units["tower"]["blocks"]["down"]["kernel"] == Unit("tower_output", 2)
    assert units["tower"]["blocks"]["out"]["bias"] == units["tower"]["blocks"]["mlp_norm"]["scale"] == Unit(SHARED, 0)
    assert units["connector"]["kernel"] == Unit("connector_output", 1, layer=0)
    assert "vision" not in trained(network.shapes())
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    placed = shardings(axes, network.shapes(), mesh)["vision"]["tower"]["blocks"]["up"]["kernel"]
    assert placed.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    # Layers of the decoder are frozen, those of the tower are not among them.
    moves = moving(axes, network.shapes(), layers=1, embeddings=True)
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(moves["vision"]))
    assert jax.tree.structure(moves["vision"]) == jax.tree.structure(vision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"hidden_size \(8\) must be a multiple of num_heads \(3\)"),
        ({"patch_size": 9}, r"patch_size \(9\) must be at most image_size \(8\)"),
        ({"shuffle": 3}, r"shuffle \(3\) must divide the patches along a side, image_size / patch_size \(4\)"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VisionConfig(**SIZES | change)


def test_pixels_beyond_the_last_whole_patch_are_not_seen() -> None:
    network = seeing(image_size=9)  # as SmolVLM-2.2B, whose images of 384 pixels have 27 patches of 14 along a side
    assert network.config.vision is not None
    assert network.config.vision.image_tokens == IMAGE_TOKENS
    params, images = init(network), images_of([[0], [0]], 1)
    wide = jnp.pad(images.pixels, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=3.0)
    found = states(network, params, dataclasses.replace(images, pixels=wide))
    np.testing.assert_array_equal(found, states(network, params, images))


@pytest.mark.parametrize("side", [1, 3, 4, 6, 7, 14, 26, 27, 32])
def test_positions_of_an_image(side: int) -> None:
    ids = np.asarray(position_ids(side, side, side, None))
    # Within rounding: a coordinate may fall just short of its boundary.
    off = np.arange(side * side).reshape(side, side) - ids
    assert set(np.unique(off)) <= {0, 1, side, side + 1}
    seen = jnp.ones((2, side, side), bool)
    np.testing.assert_array_equal(position_ids(side, side, side, seen), np.broadcast_to(ids, (2, side, side)))


def test_positions_of_a_part_of_a_frame() -> None:
    seen = jnp.zeros((1, 4, 4), bool).at[0, :2, :1].set(True)
    assert position_ids(4, 4, 4, seen)[0].tolist() == [[0, 0, 0, 0], [8, 0, 0, 0], [0] * 4, [0] * 4]
