"""How Sphinx makes the site: `python -m sphinx -W --keep-going -b html docs build/docs`."""

from __future__ import annotations

from typing import Any

from pygments.lexers.special import TextLexer  # type: ignore[import-untyped]
from sphinx.application import Sphinx

from assistream_flask import __version__

project = "assistream"
author = "the assistream contributors"
project_copyright = "the assistream contributors, MIT licence"
release = version = __version__

# Nothing here reaches out: the site is built without a network, and its pages load nothing from elsewhere.
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
# As the code says it: resolved, one signature fills a screen.
autodoc_type_aliases: dict[str, str] = {}

html_theme = "furo"
html_title = "assistream"
html_static_path: list[str] = []
html_extra_path = ["reference/openapi.yaml"]
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}


def setup(app: Sphinx) -> None:
    """Have Sphinx show a drawing that the repository's pages draw as the text that it is."""
    app.add_lexer("mermaid", TextLexer)
