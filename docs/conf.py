"""How `make docs` builds the pages: offline, and with every warning an error."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

import dp_flash_hf

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "dp-flash-hf"
author = "The dp-flash-hf authors"
copyright = "The dp-flash-hf authors, Apache-2.0"
release = version = dp_flash_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "mathml", "wing"]
exclude_patterns = ["_extensions"]
html_theme = "furo"
html_title = f"dp-flash-hf {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# A list under "Attributes". As directives they would be described twice, beside autodoc's; as `:ivar:` they read "Variables".
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
default_role = "code"  # of docstrings, which write names between single backticks
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
# Types of other packages have no page here, and nothing is downloaded to find theirs. Names in annotations that are private or
# type variables have none either.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!dp_flash_hf).*"),
    (r"py:.*", r".*\b_\w+"),
]


def keep_sentences(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Before napoleon, which takes "a: b" in the first line of a property for its type and description."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # a comment, which is a first line without a colon


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_sentences, priority=400)  # napoleon's is 500
