"""`jaxcl plan`: what a configuration needs of hardware that is not here.

`plan` compiles a configuration's steps for a described topology, `search` tries arrangements of the mesh, `table`
prints what was found. Below them, `step`, `cost`, `hlo` and `hardware` know programs and chips, and nothing of runs.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.planning import cost, hardware, hlo, plan, search, step, table

__all__ = [
    "cost",
    "hardware",
    "hlo",
    "plan",
    "search",
    "step",
    "table",
]
