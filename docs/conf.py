"""The documentation site: `make site` builds it from these pages and from the docstrings of the public names."""

import sys
from pathlib import Path

import jaxcl

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "jaxcl"
author = "The jaxcl authors"
copyright = "The jaxcl authors"
version = release = jaxcl.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "public_names",
]
html_theme = "furo"
html_title = f"jaxcl {version}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Pages are Markdown. Notebooks are shown as they lie here; `make test-slow` runs them.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Docstrings are Google style; single backticks mean code and `$...$` mathematics, as in Markdown.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autoclass_content = "both"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Types of other libraries have no page here, nor have jaxcl's own that are not public.
nitpick_ignore_regex = [("py:.*", ".*")]
