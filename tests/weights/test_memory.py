"""How much memory loading takes, and what is read from the file for params on several devices."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.weights import fill, load_params, save_hf
from jaxcl.weights.source import Safetensors
from tests.tiny.devices import flags
from tests.tiny.networks import CONFIGS, random_params

# About 24 MB in float32; deep enough that a layer is small beside the whole.
DEEP = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=10,
    num_heads=8,
    max_length=64,
)


def test_loading_takes_little_more_than_the_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network.create(DEEP)
    params = random_params(network)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_hf(tmp_path / "model", network, params)
    del params
    load_params(tmp_path / "model", network)  # what is compiled or imported on first use is not counted
    on_device = []
    read = Safetensors.read

    def watched(self: Safetensors, name: str, index: tuple[slice, ...]) -> np.ndarray:
        on_device.append(sum(array.nbytes for array in jax.live_arrays()))
        return read(self, name, index)

    monkeypatch.setattr(Safetensors, "read", watched)
    before = sum(array.nbytes for array in jax.live_arrays())
    tracemalloc.start()
    loaded = load_params(tmp_path / "model", network)
    # Traced: the host's memory (numpy, safetensors), without that of jax's arrays.
    _, host = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == total
    device = max(on_device) - before
    assert device >= 0.9 * total  # the last parameter is allocated before its layers are read
    assert host >= 512 * 256 * 4  # a layer's tensor was seen on the host
    assert device + host < 1.3 * total


@pytest.mark.parametrize(("how", "share"), [("int8", 0.25), ("nf4", 0.14)])
def test_quantising_while_loading_never_holds_the_model(
    how: Any, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Network.create(DEEP)
    params = random_params(plain)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_hf(tmp_path / "model", plain, params)
    del params
    network = Network.create(LlamaConfig(**{**DEEP.model_dump(), "lora": {"rank": 1}, "quantise": how}))
    on_device = []
    layer = fill._set_layer

    def watched(sharding: Any) -> Any:
        on_device.append(sum(array.nbytes for array in jax.live_arrays()))
        return layer(sharding)

    monkeypatch.setattr(fill, "_set_layer", watched)
    before = sum(array.nbytes for array in jax.live_arrays())
    loaded = load_params(tmp_path / "model", network, key=jax.random.key(0))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert held < (share + 0.06) * total  # and embedding, head, adapters
    layer_bytes = 512 * 256 * 4
    assert max(on_device) - before <= held + 2 * layer_bytes


def test_saving_holds_a_tensor_at_a_time(tmp_path: Path) -> None:
    network = Network.create(DEEP)
    params = random_params(network)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_hf(tmp_path / "a", network, params)
    tracemalloc.start()
    save_hf(tmp_path / "b", network, params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 512 * 256 * 4 <= peak < 0.15 * total


CHILD = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxcl.models.network import Network
from jaxcl.weights import load_params, read_config, save_hf, save_orbax
from jaxcl.weights.tree import flatten, unflatten
from jaxcl.weights.source import Safetensors

folder = sys.argv[1]
network = Network.create(read_config(folder + "/model"))
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
table = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
is_axes = lambda node: isinstance(node, tuple)
shardings = jax.tree.map(
    lambda axes: NamedSharding(mesh, P(*(table.get(axis) for axis in axes))), network.axes(), is_leaf=is_axes
)
read = []
original = Safetensors.read
def counting(self, name, index):
    part = original(self, name, index)
    read.append(part.nbytes)
    return part
Safetensors.read = counting
whole = load_params(folder + "/model", network)
full = sum(read)
read.clear()
sharded = load_params(folder + "/model", network, shardings=shardings)
# Two data replicas share what is read, and cutting along axes of the file reads nothing twice.
vectors = sum(leaf.nbytes for leaf in jax.tree.leaves(whole) if leaf.ndim < 3)
assert full <= sum(read) <= full + vectors, (full, sum(read))
for path, leaf in flatten(sharded).items():
    assert leaf.sharding == flatten(shardings)[path], path
    np.testing.assert_array_equal(leaf, flatten(whole)[path])
for how in ("int8", "nf4"):
    config = dict(network.config.model_dump(), lora=dict(rank=2), quantise=how)
    held = Network.create(type(network.config)(**config))
    axes = jax.tree.map(
        lambda axes: NamedSharding(mesh, P(*(table.get(axis) for axis in axes))), held.axes(), is_leaf=is_axes
    )
    read.clear()
    key = jax.random.key(0)
    split = flatten(load_params(folder + "/model", held, shardings=axes, key=key))
    assert sum(read) <= full + vectors, (full, sum(read))
    for path, leaf in flatten(load_params(folder + "/model", held, key=key)).items():
        assert split[path].sharding == flatten(axes)[path], path
        if "lora" not in path:
            np.testing.assert_array_equal(split[path], leaf)
query = sharded["blocks"]["attention"]["query"]["kernel"]
assert query.addressable_shards[0].data.shape == (3, 12, 2, 8)
by_layer = Mesh(np.array(jax.devices()[:3]), ("stage",))
staged = jax.tree.map(lambda axes: NamedSharding(by_layer, P(*("stage" if a == "layers" else None for a in axes))),
                      network.axes(), is_leaf=is_axes)
for path, leaf in flatten(load_params(folder + "/model", network, shardings=staged)).items():
    assert leaf.sharding == flatten(staged)[path], path
    np.testing.assert_array_equal(leaf, flatten(whole)[path])
save_hf(folder + "/again", network, sharded)
same = load_params(folder + "/again", network)
save_orbax(folder + "/orbax", network, sharded)
other = load_params(folder + "/orbax", network, shardings=NamedSharding(mesh, P()))
for path, leaf in flatten(whole).items():
    np.testing.assert_array_equal(flatten(same)[path], leaf)
    np.testing.assert_array_equal(flatten(other)[path], leaf)
    assert flatten(other)[path].sharding.is_fully_replicated
print("sharded ok")
"""


def test_params_on_eight_devices_are_read_in_parts(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_hf(tmp_path / "model", network, random_params(network))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(8)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "sharded ok" in done.stdout


def test_loaded_params_are_the_devices_own(tmp_path: Path) -> None:
    """A donated param must not drag a copy of the file's memory along."""
    network = Network.create(CONFIGS["llama"])
    save_hf(tmp_path / "model", network, random_params(network))
    params = load_params(tmp_path / "model", network)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(doubled)} == pointers
    expected = random_params(network)
    for found, leaf in zip(jax.tree.leaves(doubled), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, 2 * np.asarray(leaf))
