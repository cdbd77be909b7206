"""How Sphinx builds the documentation: `sphinx-build -W docs docs/_build/html`."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pytest-gpushare"
author = "The pytest-gpushare developers"
copyright = f"2026, {author}"
release = importlib.metadata.version("pytest-gpushare")

extensions = ["myst_parser", "sphinx_design", "gpushare_reference"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "examples"]
nitpicky = True

html_theme = "furo"
html_title = f"pytest-gpushare {release}"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
