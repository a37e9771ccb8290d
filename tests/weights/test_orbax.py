"""Orbax folders, and conversion between everything."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.models.network import Network
from jaxcl.weights import convert, load_params, load_weights, read_config, save_hf, save_orbax
from tests.tiny.networks import CONFIGS, assert_equal_bits, random_params


def in_bfloat16(network: Network) -> Network:
    compute = network.config.compute.model_copy(update={"param_dtype": "bfloat16"})
    return Network.create(network.config.model_copy(update={"compute": compute}))


@pytest.mark.parametrize("name", ["llama-labels", "bert"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_keeps_every_bit(name: str, dtype: str, tmp_path: Path) -> None:
    network = Network.create(CONFIGS[name])
    if dtype == "bfloat16":
        network = in_bfloat16(network)
    params = random_params(network)
    save_orbax(tmp_path / "model", network, params)
    read, found = load_weights(tmp_path / "model")
    assert read.config == network.config
    assert_equal_bits(found, params)
    wide = load_params(tmp_path / "model", network, dtype="float32")
    assert_equal_bits(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def test_heads_as_with_other_checkpoints(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_orbax(tmp_path / "model", network, random_params(network))
    labelled = Network.create(CONFIGS["llama-labels"])
    with pytest.raises(UserError, match=r"the tensor classifier/out/kernel is missing: the checkpoint lacks a head"):
        load_params(tmp_path / "model", labelled)
    found = load_params(tmp_path / "model", labelled, key=jax.random.key(0))
    assert found["classifier"]["out"]["kernel"].shape == (24, 3)
    assert_equal_bits(found["blocks"], random_params(network)["blocks"])
    tied = Network.create(network.config.model_copy(update={"tie_embeddings": True}))
    with pytest.raises(UserError, match=r"head/kernel differs from embedding.*tie_embeddings=false"):
        load_params(tmp_path / "model", tied)


def test_params_of_another_network_are_named(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_orbax(tmp_path / "model", network, random_params(network))
    biased = Network.create(network.config.model_copy(update={"mlp_bias": True}))
    with pytest.raises(UserError, match=r"the tensor blocks/mlp/\w+/bias is missing, and 2 more"):
        load_params(tmp_path / "model", biased)
    wider = Network.create(network.config.model_copy(update={"intermediate_size": 21}))
    with pytest.raises(UserError, match=r"blocks/mlp/\w+/kernel has shape \[3, .*\]; .* needs \[3, .*21.*\]"):
        load_params(tmp_path / "model", wider)


def test_incomplete_folders(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_orbax(tmp_path / "model", network, random_params(network))
    with pytest.raises(UserError, match="exists already"):
        save_orbax(tmp_path / "model", network, random_params(network))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    (tmp_path / "model" / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"params is not a complete Orbax checkpoint"):
        load_params(tmp_path / "model", network)
    (tmp_path / "model" / "jaxcl_model.json").write_text('{"architecture": "llama"}')
    with pytest.raises(UserError, match=r"jaxcl_model\.json: vocab_size: Field required"):
        read_config(tmp_path / "model")


def test_there_and_back_through_both_formats(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama-biases"])
    params = random_params(network)
    ids = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}
    save_hf(tmp_path / "a", network, params, token_ids=ids)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert convert(tmp_path / "a", tmp_path / "b", format="orbax") == tmp_path / "b"
    convert(tmp_path / "b", tmp_path / "c", format="hf")
    read, found = load_weights(tmp_path / "c")
    assert read.config == network.config
    assert_equal_bits(found, params)
    for folder in "bc":
        assert (tmp_path / folder / "tokenizer.json").read_text() == "{}"


def test_special_tokens_survive_conversion(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_hf(tmp_path / "a", network, random_params(network), token_ids={"bos_token_id": 3, "eos_token_id": [4, 5]})
    convert(tmp_path / "a", tmp_path / "b")
    content = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (content["bos_token_id"], content["eos_token_id"]) == (3, [4, 5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversion_to_reduced_precision(dtype: str, tmp_path: Path) -> None:
    network = Network.create(CONFIGS["roberta"])
    params = random_params(network)
    save_hf(tmp_path / "a", network, params)
    convert(tmp_path / "a", tmp_path / "b", dtype=dtype)
    _, found = load_weights(tmp_path / "b")
    assert_equal_bits(found, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params))
    if dtype == "float16":
        with pytest.raises(UserError, match=r"dtype=float16 cannot be written as orbax; allowed are float32, bfloat16"):
            convert(tmp_path / "a", tmp_path / "c", format="orbax", dtype=dtype)
    else:
        convert(tmp_path / "a", tmp_path / "c", format="orbax", dtype=dtype)
        half, found = load_weights(tmp_path / "c")
        assert half.config.compute.param_dtype == "bfloat16"
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"bfloat16"}


def test_the_tokenizer_writer_is_asked_only_where_no_files_lie(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_hf(tmp_path / "a", network, random_params(network))
    asked: list[Path] = []
    convert(tmp_path / "a", tmp_path / "b", write_tokenizer=asked.append)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "c", write_tokenizer=asked.append)
    assert asked == [tmp_path / "b"]


def test_a_misspelt_dtype_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype=float64 cannot be written as hf") as error:
        convert(tmp_path, tmp_path / "b", dtype="float64")
    assert error.value.exit_code == 2


def test_committed_only_where_asked(tmp_path: Path) -> None:
    """Params without a sharding must combine with arrays on any mesh, from every kind of checkpoint."""
    network = Network.create(CONFIGS["llama"])
    params = random_params(network)
    save_hf(tmp_path / "a", network, params)
    save_orbax(tmp_path / "b", network, params)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for folder in (tmp_path / "a", tmp_path / "b"):
        free, fixed = load_params(folder, network), load_params(folder, network, shardings=sharding)
        assert not any(leaf.committed for leaf in jax.tree.leaves(free))
        assert all(leaf.committed for leaf in jax.tree.leaves(fixed))
        jax.tree.map(np.testing.assert_array_equal, free, fixed)


def test_cast_params_are_read_back_as_they_were_cast(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(network))
    save_orbax(tmp_path / "model", network, half)
    assert_equal_bits(load_weights(tmp_path / "model")[1], half)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As tensorstore words it.
    text = "RESOURCE_EXHAUSTED: Error writing \"a\": Failed to write 436 bytes: No space left [os_error_code='28']"

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError(text)

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointer.save", fail)
    network = Network.create(CONFIGS["llama"])
    with pytest.raises(UserError, match=r"cannot write .*model: No space left on device"):
        save_orbax(tmp_path / "model", network, random_params(network))
    assert list(tmp_path.iterdir()) == []
    text = "something else"
    with pytest.raises(ValueError, match="something else"):
        save_orbax(tmp_path / "model", network, random_params(network))
