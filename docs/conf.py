"""Configuration of the documentation site: Markdown (MyST), plus commands and docstrings from the code.

`make docs` builds it into build/site; warnings are errors, and nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexers.shell import BashLexer

from convert_to_quant import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "convert_to_quant"
author = "the authors of convert_to_quant"
copyright = f"{author}, MIT license"  # noqa: A001 - Sphinx's name for it
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "docstrings", "from_code"]
exclude_patterns = ["_ext"]
# Pages of results skip heading levels; two classes are named Layer.
suppress_warnings = ["myst.header", "ref.python"]

# --- Markdown
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False

# --- Docstrings: types from annotations, `code` in single backticks; see _ext/docstrings.py
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

# --- Names in docstrings and annotations that this site does not document
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(numpy|torch|mmap|PIL|Image|collections|contextlib|pathlib|types|typing|os)\..*"),
    (
        r"py:.*",
        r"convert_to_quant\.(families|engines\.(session|prompts|quantized_linear|provenance))\..*",
    ),
    (r"py:.*", r"convert_to_quant\.(.*\.)?_.*"),
    (r"py:.*", r"Parts|Path|Advance|Candidate|Float|Lattice|Prompts|Progress"),
    (r"py:.*", r"convert_to_quant\.(identity\.Identity|inspection\.Mix|lora\.Addition)"),
]

# --- The look
html_theme = "furo"
html_title = "convert_to_quant"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go, .c1"
highlight_language = "text"  # for blocks without a language
pygments_style = "friendly"
pygments_dark_style = "github-dark"

OUTSIDE = {"../benchmarks/README.md": "benchmarks.md", "../CHANGELOG.md": "changelog.md"}
"""Files outside of docs/ that pages link to, and the pages that include them."""


def link_inside(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Point links to files outside of docs/ to the pages that include them."""
    for outside, inside in OUTSIDE.items():
        source[0] = source[0].replace(f"]({outside}", f"]({inside}")


def setup(app: Sphinx) -> None:
    """Register with Sphinx, and highlight console blocks without prompts as shell."""
    app.connect("source-read", link_inside)
    app.add_lexer("console", BashLexer)
