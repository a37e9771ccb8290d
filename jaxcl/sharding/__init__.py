"""Where arrays live: the mesh of devices, rules from logical axes to mesh axes, and the start of several processes."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.sharding.clusters import ProcessId, find_process_id
    from jaxcl.sharding.layout import Layout
    from jaxcl.sharding.mesh import MeshConfig, make_mesh, mesh_sizes
    from jaxcl.sharding.processes import initialize, is_first, on_first, wait_for_all
    from jaxcl.sharding.rules import ACTIVATION_RULES, PARAM_RULES, partition, shardings

__all__ = [
    "ACTIVATION_RULES",
    "PARAM_RULES",
    "Layout",
    "MeshConfig",
    "ProcessId",
    "find_process_id",
    "initialize",
    "is_first",
    "make_mesh",
    "mesh_sizes",
    "on_first",
    "partition",
    "shardings",
    "wait_for_all",
]
