"""Families of checkpoints: `config.json` to switches and back, without torch. Numbers: `tests/parity/weights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING

from jaxcl.errors import UserError
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights import load_params, load_weights, named, save_hf
from jaxcl.weights.families import FAMILIES, MISSING, family_of, find_family
from jaxcl.weights.hf_config import from_hf, to_hf
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.families import DECODERS, ENCODERS, EVERY, OWN_MODELS, SWITCHES, config_of, content
from tests.tiny.networks import ROBERTA, assert_equal_bits, random_params

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "qk_norm": "flat"}


@pytest.mark.parametrize("name", EVERY | ENCODERS | OWN_MODELS)
def test_a_configuration_is_the_same_after_writing_and_reading(name: str) -> None:
    config = config_of(name)
    assert config.family == content(name)["model_type"]
    written = to_hf(config, {}, "float32")
    assert type(config)(**from_hf(written, "config.json")) == config
    assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize("name", DECODERS | ENCODERS | OWN_MODELS)
def test_params_are_the_same_after_writing_and_reading(name: str, tmp_path: Path) -> None:
    network = Network.create(config_of(name))
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    read, found = load_weights(tmp_path / "model")
    assert read.config == network.config
    assert_equal_bits(_read(found), _read(params))


def _read(params: Any) -> Any:
    """Without what the network does not read and files do not hold: the norm of ModernBERT's first layer."""
    flat = flatten(params)
    if "embed_norm/scale" in flat:
        flat |= {path: leaf[1:] for path, leaf in flat.items() if path.startswith("blocks/attention_norm/")}
    return unflatten(flat)


def test_every_family_is_tried_and_sets_what_others_leave_alone() -> None:
    assert {FAMILIES[name].model_type for name in DECODERS} == {
        family.model_type for family in FAMILIES.values() if family.head == "ForCausalLM"
    }
    plain = LlamaConfig(vocab_size=1, hidden_size=2, intermediate_size=1, num_layers=1, num_heads=1)
    found = [config_of(name) for name in EVERY | ENCODERS]
    for field in SWITCHES:
        assert any(getattr(config, field) != getattr(plain, field) for config in found), field
    for field, values in {
        "norm_placement": {"pre", "post", "sandwich"},
        "qk_norm": {"none", "head", "flat"},
        "norm_scale": {"weight", "one_plus"},
    }.items():
        assert {getattr(config, field) for config in found} == values
    kinds = {config.rope_scaling.type for config in found if config.rope_scaling is not None}
    assert kinds == {"linear", "llama3", "dynamic", "yarn", "longrope"}


@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_keys_that_a_file_leaves_out_mean_what_they_mean_there(name: str) -> None:
    theirs = CONFIG_MAPPING[name]()
    for key, value in FAMILIES[name].defaults.items():
        if key in ("hidden_act", "hidden_activation") and not hasattr(theirs, key):
            continue  # the two names of one key
        if key in ("use_bidirectional_attention", "attention_bias", "no_rope_layer_interval"):
            assert bool(getattr(theirs, key, False)) == bool(value), key
        elif key == "sliding_window" and getattr(theirs, "use_sliding_window", True) is False:
            assert getattr(theirs, key) is None  # not used by default
        elif key != "head_dim" or value is not None:
            assert getattr(theirs, key) == value, key


@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_a_file_of_sizes_alone_is_read_as_there(name: str) -> None:
    """Patterns of layers and bases of frequencies of a file that says nothing about them."""
    sizes = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 8}
    ours = LlamaConfig(**from_hf({"model_type": name, "num_attention_heads": 32, **sizes}, "config.json"))
    theirs = CONFIG_MAPPING[name](num_attention_heads=32, **sizes)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    if "sliding_attention" in rope and ours.rope_scaling is None:
        assert (ours.window_rope_theta or ours.rope_theta) == rope["sliding_attention"]["rope_theta"]
    window = theirs.sliding_window if hasattr(theirs, "sliding_window") else None
    types = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 8
    assert list(ours.windowed) == [kind == "sliding_attention" for kind in types]
    assert ours.window == (window if any(ours.windowed) else 0)
    assert (ours.num_kv_heads, ours.max_length) == (theirs.num_key_value_heads or 32, theirs.max_position_embeddings)
    assert ours.tie_embeddings == theirs.tie_word_embeddings


def test_fused_tensors_hold_their_parts_in_order(tmp_path: Path) -> None:
    network = Network.create(config_of("phi3", num_kv_heads=2))
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    blocks = params["blocks"]
    qkv = tensors["model.layers.1.self_attn.qkv_proj.weight"]  # 4 + 2 + 2 heads of 8
    assert qkv.shape == (64, 32)
    np.testing.assert_array_equal(qkv[8 * 3 + 2], blocks["attention"]["query"]["kernel"][1, :, 3, 2])
    np.testing.assert_array_equal(qkv[32 + 8 + 5], blocks["attention"]["key"]["kernel"][1, :, 1, 5])
    np.testing.assert_array_equal(qkv[48 + 3], blocks["attention"]["value"]["kernel"][1, :, 0, 3])
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.gate_up_proj.weight"][28 + 7], blocks["mlp"]["up"]["kernel"][0, :, 7]
    )


def fused(tensors: dict[str, np.ndarray], layers: int, experts: int) -> dict[str, np.ndarray]:
    """Tensors by expert, put together as transformers 5 holds them."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp.experts"

        def stack(part: str, block: str = block) -> np.ndarray:
            return np.stack([tensors[f"{block}.{expert}.{part}_proj.weight"] for expert in range(experts)])

        found[f"{block}.gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        found[f"{block}.down_proj"] = stack("down")
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_experts_are_read_from_tensors_of_their_own_and_from_those_of_a_layer(name: str, tmp_path: Path) -> None:
    network = Network.create(config_of(name))
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    kernels = {part: params["blocks"]["mlp"][part]["kernel"] for part in ("router", "gate", "down")}
    block = "model.layers.1.mlp."
    np.testing.assert_array_equal(tensors[f"{block}gate.weight"], kernels["router"][1].T)
    np.testing.assert_array_equal(tensors[f"{block}experts.2.gate_proj.weight"], kernels["gate"][1, 2].T)
    np.testing.assert_array_equal(tensors[f"{block}experts.3.down_proj.weight"], kernels["down"][1, 3].T)
    for key, value in named(network, params).items():
        np.testing.assert_array_equal(tensors[key], value)
    save_file(fused(tensors, layers=2, experts=4), tmp_path / "model" / "model.safetensors")
    assert_equal_bits(load_weights(tmp_path / "model")[1], params)
    # A part of the experts for each device.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    split, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "tensor"), PartitionSpec()))
    shardings = jax.tree.map(lambda leaf: split if len(leaf.shape) == 4 else whole, network.shapes())
    assert_equal_bits(load_params(tmp_path / "model", network, shardings=shardings), params)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    network = Network.create(config_of("olmoe"))
    save_hf(tmp_path / "model", network, random_params(network))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"the tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing"):
        load_weights(tmp_path / "model")


def test_the_routers_loss_is_read_where_transformers_would_use_it() -> None:
    asked = content("olmoe") | {"output_router_logits": True}
    weights = [
        LlamaConfig(**from_hf(keys, "config.json")).router_loss_weight
        for keys in (content("olmoe"), asked, asked | {"router_aux_loss_coef": 0.5})
    ]
    assert weights == [0.0, 0.01, 0.5]


def test_a_file_that_has_a_vision_tower_gives_its_text_part(tmp_path: Path) -> None:
    network = Network.create(config_of("gemma3_text"))
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    folder = tmp_path / "model"
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    tensors = load_file(folder / "model.safetensors")
    names = {name: "language_model." + name for name in tensors}
    tensors = {names[name]: value for name, value in tensors.items()}
    save_file(tensors | {"vision_tower.vision_model.post_layernorm.weight": np.ones(3)}, folder / "model.safetensors")
    read, found = load_weights(folder)
    assert read.config == network.config
    assert_equal_bits(found, params)


def test_a_vision_tower_may_leave_most_of_its_text_part_to_the_defaults() -> None:
    """What Gemma 3's own files hold."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    rope = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = LlamaConfig(**from_hf({"model_type": "gemma3", "text_config": text | rope}, "config.json"))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.layer_types == ("window",) * 5 + ("full",)
    assert (config.window, config.rope_theta, config.window_rope_theta) == (1024, 1e6, 1e4)
    assert config.tie_embeddings


def test_null_means_what_a_missing_key_means_but_for_caps() -> None:
    nulls = {"tie_word_embeddings": None, "rms_norm_eps": None, "final_logit_softcapping": None}
    config = LlamaConfig(**from_hf(content("gemma2") | nulls, "config.json"))
    assert (config.tie_embeddings, config.norm_eps, config.logit_cap, config.attention_cap) == (True, 1e-6, None, 50.0)


def test_a_norm_that_casts_first_is_what_transformers_has() -> None:
    assert to_hf(config_of("llama", norm_scale="cast"), {}, "float32") == to_hf(config_of("llama"), {}, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_placement": "post"}, r"llama has no such network: norm_placement=post would be read as pre"),
        (
            {"family": "olmoe", **EXPERTS, "expert_size": 9},
            r"olmoe has no such network: expert_size=9 would be read as 28",
        ),
        ({"family": "llama", **EXPERTS}, r"llama has no such network: num_experts=4 would be read as 0"),
        ({"family": "qwen2"}, r"qwen2 has no such network: .*bias"),
        ({"family": "gpt_oss"}, r"model_type=gpt_oss is not supported: it needs attention sinks"),
        ({"family": "nonsense"}, r"model\.family: model_type=nonsense is not supported; allowed are llama, mistral"),
    ],
)
def test_networks_that_a_family_lacks_are_not_exported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_hf(config_of("llama", **changes), {}, "float32")


def test_what_is_not_here_is_refused_with_the_switch_that_is_missing() -> None:
    assert not set(MISSING) & set(FAMILIES)
    for name, missing in MISSING.items():
        with pytest.raises(UserError, match=f"config.json: model_type={name} is not supported: it needs {missing}$"):
            find_family(name, "config.json")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
        ("modernbert", {"layer_types": ["chunked_attention"] * 2}, r"layer_types: chunked_attention is not supported"),
        ("modernbert", {"layer_types": ["full_attention"]}, r"layer_types has 1 entries for 2 layers"),
        ("modernbert", {"tie_word_embeddings": False}, r"tie_word_embeddings=False is not supported"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"scaled rotary positions are not"),
        ("deberta-v2", {"conv_kernel_size": 3}, r"conv_kernel_size=3 is not supported; allowed is 0, as in DeBERTa-v3"),
        ("deberta-v2", {"share_att_key": None}, r"share_att_key=False is not supported; allowed is True"),
        ("deberta-v2", {"position_biased_input": None}, r"position_biased_input=True is not supported"),
        ("deberta-v2", {"pos_att_type": "c2p"}, r"pos_att_type=c2p is not supported; allowed is c2p\|p2c"),
        ("deberta-v2", {"embedding_size": 16}, r"embedding_size=16 is not supported; allowed is 32"),
        ("modernbert", {"mlp_dropout": 0.1}, r"embedding_dropout=0.0, mlp_dropout=0.1, classifier_dropout=0.0 is not"),
        ("ministral", {"layer_types": ["chunked_attention"] * 2}, r"layer_types: chunked_attention is not supported"),
        ("ministral", {"layer_types": ["full_attention"]}, r"layer_types has 1 entries for 2 layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported; allowed is 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported; allowed is \[\]"),
        ("qwen3_moe", {"num_experts": 0}, r"num_experts=0 is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv=8.0 is not supported"),
        ("phi3", {"embd_pdrop": 0.1}, r"embd_pdrop=0.1 is not supported; allowed is 0.0"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"rope_type=linear in sliding_attention is not supported",
        ),
    ],
)
def test_settings_that_a_family_lacks(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf(content(name) | changes, "config.json")


def test_the_older_name_of_the_first_gemmas_activation_means_its_approximation() -> None:
    assert config_of("gemma").activation == "gelu_tanh"
    assert from_hf(content("gemma") | {"hidden_act": "gelu"}, "config.json")["activation"] == "gelu_tanh"


def test_xlm_roberta_is_roberta_by_another_name(tmp_path: Path) -> None:
    network = Network.create(RobertaConfig(**ROBERTA, family="xlm-roberta"))
    save_hf(tmp_path / "model", network, random_params(network))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("xlm-roberta", ["XLMRobertaForMaskedLM"])
    read, found = load_weights(tmp_path / "model")
    assert read.config == network.config
    assert_equal_bits(found, random_params(network))


def test_an_encoder_made_of_the_decoder() -> None:
    with pytest.raises(UserError, match="num_labels must be 0 to export"):
        to_hf(config_of("eurobert", num_labels=3), {}, "float32")
    with pytest.raises(UserError, match="mlp_bias=True is not supported"):
        from_hf(content("eurobert") | {"mlp_bias": True}, "config.json")
    assert not Network.create(config_of("eurobert")).causal


def test_modernbert_counts_windows_by_both_sides_and_layers_by_distance() -> None:
    config = config_of("modernbert", num_layers=7)
    assert (config.window, config.windowed[:4]) == (5, (False, True, False, True))  # from a pattern of two layers
    plain = from_hf({"model_type": "modernbert"}, "config.json")
    published = config_of("modernbert", **plain)
    assert published.layer_types == ("full", "window", "window")
    assert (published.window, published.rope_theta, published.window_rope_theta) == (65, 160_000.0, 10_000.0)
    theirs = CONFIG_MAPPING["modernbert"]()
    assert [kind == "sliding_attention" for kind in theirs.layer_types] == list(published.windowed)
    written = to_hf(published, {}, "float32")
    assert (written["local_attention"], written["global_attn_every_n_layers"]) == (128, 3)
    assert "global_attn_every_n_layers" not in to_hf(config_of("modernbert-layer-types"), {}, "float32")
    for key, value in FAMILIES["modernbert"].defaults.items():
        assert getattr(theirs, key) == value, key


def test_the_norm_that_modernbert_lacks_is_in_no_file(tmp_path: Path) -> None:
    network = Network.create(config_of("modernbert", num_layers=1))
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    assert not [name for name in load_file(tmp_path / "model" / "model.safetensors") if "attn_norm" in name]
    _, found = load_weights(tmp_path / "model")
    assert found["blocks"]["attention_norm"]["scale"].shape == (1, 32)


def test_the_norm_that_modernbert_lacks_is_left_out_where_devices_share_the_layers(tmp_path: Path) -> None:
    network = Network.create(config_of("modernbert"))
    save_hf(tmp_path / "model", network, random_params(network))
    mesh = Mesh(np.array(jax.devices()[:1]), ("stage",))
    places = jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*("stage" if axis == "layers" else None for axis in axes))),
        network.axes(),
        is_leaf=lambda axes: isinstance(axes, tuple),
    )
    shared, whole = (load_params(tmp_path / "model", network, shardings=given) for given in (places, None))
    assert_equal_bits(shared, whole)
    assert not np.any(shared["blocks"]["attention_norm"]["scale"][0])
    assert np.all(shared["blocks"]["attention_norm"]["scale"][1])


def test_both_heads_of_debertas_files_are_read(tmp_path: Path) -> None:
    """Published files have the head by its newer name, whatever `legacy` says, and more that no model uses."""
    network = Network.create(config_of("deberta-v2"))
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    old, new = "cls.predictions.", "lm_predictions.lm_head."
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(old)}
    assert len(head) == 5
    tensors |= {new + name.removeprefix(old).removeprefix("transform."): value for name, value in head.items()}
    tensors |= {"mask_predictions.classifier.weight": np.ones((1, 32), np.float32)}
    tensors |= {"deberta.embeddings.position_embeddings.weight": np.ones((12, 32), np.float32)}
    save_file(tensors, file)
    assert_equal_bits(load_weights(tmp_path / "model")[1], params)


def test_deberta_takes_the_longest_distance_from_the_longest_text() -> None:
    assert (config_of("deberta-v2").max_distance, config_of("deberta-v2").span) == (12, 8)
    without = config_of("deberta-v2-no-buckets")
    assert (without.position_buckets, without.max_distance, without.span) == (0, 5, 5)
    theirs = CONFIG_MAPPING["deberta-v2"]()
    for key, value in FAMILIES["deberta-v2"].defaults.items():
        assert getattr(theirs, key) == value, key


def test_families_know_their_own_name() -> None:
    for name in DECODERS | ENCODERS:
        assert family_of(config_of(name)).model_type == name
