"""What the verbs of the command line do, one module per verb; `jaxcl.cli` only parses their arguments."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.commands import chat, compare, convert, extend, generate, importance, teacher

__all__ = [
    "chat",
    "compare",
    "convert",
    "extend",
    "generate",
    "importance",
    "teacher",
]
