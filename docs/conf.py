"""Sphinx settings: `pip install -e ".[docs]" && sphinx-build -W docs docs/_build`."""

import importlib.metadata

project = "torchfast"
author = "The torchfast developers"
release = importlib.metadata.version("torchfast")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
myst_heading_anchors = 3
napoleon_use_ivar = True  # a documented field of a dataclass is described once
