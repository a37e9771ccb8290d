"""One run: its folder, its parts, the sequence of tasks, and the model that comes out of it.

>>> from jaxcl.config import load_config
>>> from jaxcl.run import load_model, run
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.run.components import Components, build
    from jaxcl.run.folder import RunFolder
    from jaxcl.run.model import Model, load_model
    from jaxcl.run.sequence import Outcome, run

__all__ = [
    "Components",
    "Model",
    "Outcome",
    "RunFolder",
    "build",
    "load_model",
    "run",
]
