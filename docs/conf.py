"""Settings of Sphinx, which makes pages of docs/ and of the docstrings: `./run docs`, without a network.

Every warning is an error there, so a page or a docstring that would come out wrong does not pass.
"""

from __future__ import annotations

import linearize

project = "linearize"
author = "The linearize authors"
version = release = linearize.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The source is the whole repository, so that a link is the same here and on the pages of a code host.
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "build", "linearize", "passes", "kernels", "tests", "benchmarks", "examples"]

# Markdown. Headings can be linked to, as on the pages of a code host.
myst_heading_anchors = 3

# Docstrings are in Google's style, and a word in single backticks is code.
default_role = "literal"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"linearize {release}"
html_show_copyright = False
html_copy_source = False
