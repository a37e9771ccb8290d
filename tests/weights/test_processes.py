"""Two processes that read and write one checkpoint together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from jaxcl.models.network import Network
from jaxcl.weights import load_weights, save_hf
from tests.tiny.devices import flags
from tests.tiny.networks import CONFIGS, assert_equal_bits, random_params

CHILD = """
import sys
import jax, numpy as np
folder, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxcl.models.network import Network
from jaxcl.weights import load_params, read_config, save_hf, save_orbax

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
table = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
network = Network.create(read_config(folder + "/model"))
shardings = jax.tree.map(
    lambda axes: NamedSharding(mesh, P(*(table.get(axis) for axis in axes))),
    network.axes(),
    is_leaf=lambda node: isinstance(node, tuple),
)
params = load_params(folder + "/model", network, shardings=shardings)
assert not params["blocks"]["mlp"]["up"]["kernel"].is_fully_addressable
save_hf(folder + "/hf", network, params)
save_orbax(folder + "/orbax", network, params)
again = load_params(folder + "/orbax", network, shardings=shardings)
def same(a, b):
    for one, two in zip(a.addressable_shards, b.addressable_shards, strict=True):
        np.testing.assert_array_equal(one.data, two.data)
jax.tree.map(same, params, again)
"""


def test_two_processes_read_and_write_together(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(2)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), port, str(process)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        errors = [child.communicate(timeout=600)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    for name in ("hf", "orbax"):
        read, found = load_weights(tmp_path / name)
        assert read.config == network.config
        assert_equal_bits(found, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model", "orbax"]
