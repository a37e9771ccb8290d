from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.sharding import rules
from jaxcl.sharding.mesh import AXES
from jaxcl.sharding.rules import ACTIVATION_RULES, PARAM_RULES, mirror, partition, shardings


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Any:
    return AbstractMesh((data, fsdp, tensor), AXES)


def specs(network: Network, mesh: Any) -> dict[str, P]:
    tree = shardings(network.axes(), network.shapes(), mesh)
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in flat}


LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 8}


def test_every_param_of_the_decoder() -> None:
    network = Network.create(LlamaConfig(**LLAMA, num_kv_heads=4, tie_embeddings=False, attention_bias=True))
    got = specs(network, abstract_mesh(fsdp=2, tensor=2))
    projection, bias = P(None, "fsdp", "tensor", None), P(None, "tensor", None)
    expected = {
        "embed/embedding": P("tensor", "fsdp"),
        "blocks/attention_norm/scale": P(None, "fsdp"),
        "blocks/attention/query/kernel": projection,
        "blocks/attention/key/kernel": projection,
        "blocks/attention/value/kernel": projection,
        "blocks/attention/query/bias": bias,
        "blocks/attention/key/bias": bias,
        "blocks/attention/value/bias": bias,
        "blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        "blocks/mlp_norm/scale": P(None, "fsdp"),
        "blocks/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
        "final_norm/scale": P("fsdp"),
        "head/kernel": P("fsdp", "tensor"),
    }
    assert {name: spec for name, spec in got.items() if name in expected} == expected
    assert set(got) - set(expected) <= {"blocks/attention/out/bias"}


def test_every_param_of_the_encoder_has_a_rule() -> None:
    config = RobertaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_labels=3)
    got = specs(Network.create(config), abstract_mesh(fsdp=2, tensor=2))
    split = {name for name, spec in got.items() if any(spec)}
    kernels = {name for name in got if name.endswith(("kernel", "word/embedding"))}
    assert kernels <= split
    assert got["blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")


def test_a_mesh_of_one_splits_nothing() -> None:
    network = Network.create(LlamaConfig(**LLAMA))
    assert not any(any(spec) for spec in specs(network, abstract_mesh()).values())


@pytest.mark.parametrize("ways", [2, 4])
def test_heads_that_do_not_divide_stay_whole_with_a_note(caplog: pytest.LogCaptureFixture, ways: int) -> None:
    rules._noted.clear()
    config = LlamaConfig(**{**LLAMA, "hidden_size": 36, "num_heads": 9, "num_kv_heads": 3})
    with caplog.at_level(logging.INFO, logger="jaxcl.sharding.rules"):
        got = specs(Network.create(config), abstract_mesh(fsdp=2, tensor=ways))
    for name in ("query", "key", "value"):
        assert got[f"blocks/attention/{name}/kernel"] == P(None, "fsdp", None, None)
    assert got["blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    notes = [record.message for record in caplog.records]
    assert f"axis heads of size 9 is kept whole on mesh tensor={ways}" in notes
    assert f"axis kv_heads of size 3 is kept whole on mesh tensor={ways}" in notes
    assert len(notes) == len(set(notes)), "one note an axis, not one an array"


def test_blocks_are_split_as_their_numbers_if_there_are_enough() -> None:
    """56 blocks along embed divide by 8 and not by 16; there the codes alone are split."""
    sizes = {"hidden_size": 3584, "num_heads": 28, "num_kv_heads": 4, "intermediate_size": 18944}
    network = Network.create(LlamaConfig(**LLAMA | sizes, lora={"rank": 2}, quantise="nf4"))
    for fsdp, blocks in ((8, "fsdp"), (16, None)):
        got = specs(network, abstract_mesh(fsdp=fsdp, tensor=4))
        assert got["blocks/attention/key/kernel"] == P(None, "fsdp", "tensor", None)
        assert got["blocks/attention/key/kernel_scale"] == P(None, blocks, "tensor", None)
        assert got["blocks/mlp/down/kernel_scale"] == P(None, "tensor", "fsdp")


@pytest.mark.parametrize("name", ["embed", "mlp"])
def test_other_axes_that_do_not_divide_are_an_error(name: str) -> None:
    tree = {"blocks": {"kernel": (name, None)}}
    shapes = {"blocks": {"kernel": jax.ShapeDtypeStruct((10, 2), jnp.float32)}}
    with pytest.raises(UserError, match=rf"blocks/kernel: axis {name} of size 10 cannot be split over mesh \w+=4"):
        shardings(tree, shapes, abstract_mesh(fsdp=4, tensor=4))


def test_a_batch_that_does_not_divide_names_axis_size_and_mesh() -> None:
    with pytest.raises(UserError, match=r"axis batch of size 10 cannot be split over mesh data=2, fsdp=2; .* of 4"):
        partition(("batch", "length"), (10, 3), abstract_mesh(data=2, fsdp=2), ACTIVATION_RULES)


def test_collisions_unknown_names_and_wrong_ranks_are_refused() -> None:
    mesh = abstract_mesh(tensor=2)
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' are both split over mesh axis 'tensor'"):
        partition(("heads", "mlp"), (4, 4), mesh, PARAM_RULES)
    with pytest.raises(ValueError, match=r"no rule for axis 'head'; known axes: .*heads"):
        partition(("head",), (4,), mesh, PARAM_RULES)
    with pytest.raises(ValueError, match="each of the 2 axes"):
        partition(("heads",), (4, 4), mesh, PARAM_RULES)


def test_collisions_are_refused_on_any_mesh() -> None:
    """A model that runs on one device must not fail first on a pod."""
    tree = {"blocks": {"kernel": ("heads", "mlp")}}
    shapes = {"blocks": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    with pytest.raises(
        ValueError, match="blocks/kernel: axes 'heads' and 'mlp' are both split over mesh axis 'tensor'"
    ):
        shardings(tree, shapes, abstract_mesh())
    with pytest.raises(ValueError, match="both split"):
        partition(("heads", "mlp"), (4, 4), abstract_mesh(), PARAM_RULES)


def test_optimizer_state_is_laid_out_like_the_params_it_mirrors() -> None:
    params = {"a": {"kernel": jnp.zeros((256, 128))}, "b": jnp.zeros((4,))}
    mesh = abstract_mesh(fsdp=2, tensor=2)
    layout = {"a": {"kernel": NamedSharding(mesh, P("fsdp", "tensor"))}, "b": NamedSharding(mesh, P("tensor"))}
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params)
    got = mirror(state, params, layout, mesh)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    adam = got[1][0]
    assert adam.mu == layout
    assert adam.nu == layout
    assert adam.count.spec == P()
    factored = mirror(jax.eval_shape(optax.scale_by_factored_rms().init, params), params, layout, mesh)
    assert factored.v_row["a"]["kernel"].spec == P(), "rows have another shape than the param"
    assert factored.v["b"].spec == P("tensor")


def test_method_state_may_hold_copies_of_params_and_anything_else() -> None:
    params = {"w": jnp.zeros((8, 4)), "v": jnp.zeros((4,))}
    mesh = abstract_mesh(fsdp=2)
    layout = {"w": NamedSharding(mesh, P("fsdp")), "v": NamedSharding(mesh, P())}
    state = {"importance": jnp.zeros((8, 4)), "anchors": [params, params], "w": jnp.zeros((8, 4)), "none": {}}
    got = mirror(state, params, layout, mesh)
    assert got["anchors"] == [layout, layout]
    assert got["importance"].spec == P()
    assert got["w"].spec == P(), "a lone array that is called like a param is none"


def test_a_part_of_the_params_is_laid_out_like_them() -> None:
    params = {"query": {"kernel": jnp.zeros((8, 4)), "lora_a": jnp.zeros((8, 2))}, "v": jnp.zeros((4,))}
    mesh = abstract_mesh(fsdp=2)
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    layout = {"query": {"kernel": split, "lora_a": split}, "v": whole}
    part = {"query": {"lora_a": jnp.zeros((8, 2))}}
    state = {"moments": part, "longer": {"query": {"lora_a": jnp.zeros((3, 8, 2))}}, "other": {"key": part["query"]}}
    got = mirror(state, params, layout, mesh)
    assert got["moments"] == {"query": {"lora_a": split}}
    assert got["longer"] == {"query": {"lora_a": whole}}
    assert got["other"] == {"key": {"lora_a": whole}}


def test_activations_on_a_real_mesh() -> None:
    from jaxcl.models.axes import constrain, constraints, per_shard, shards

    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    with constraints(rules.Activations(mesh)):
        x = jnp.arange(12.0).reshape(3, 4)
        np.testing.assert_array_equal(jax.jit(lambda x: constrain(x, "batch", "embed"))(x), x)
        doubled = per_shard(lambda x: 2 * x, [("batch", "embed")], ("batch", "embed"))
        np.testing.assert_array_equal(jax.jit(doubled)(x), 2 * x)
        assert shards("heads") == 1


def test_every_activation_is_split_as_this_table_says() -> None:
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    expected = {
        ("batch", "length", "embed"): (("data", "fsdp"), None, None),
        ("batch", "length", "heads", "head_dim"): (("data", "fsdp"), None, "tensor", None),
        ("batch", "length", "kv_heads", "head_dim"): (("data", "fsdp"), None, "tensor", None),
        ("batch", "length", "mlp"): (("data", "fsdp"), None, "tensor"),
        ("batch", "length", "vocab"): (("data", "fsdp"), None, "tensor"),
        ("batch", "labels"): (("data", "fsdp"), None),
    }
    for names, parts in expected.items():
        assert tuple(rules.partition(names, [8] * len(names), mesh, rules.ACTIVATION_RULES)) == parts, names
