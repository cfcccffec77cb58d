"""Sphinx settings."""

import sys
from contextlib import suppress
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import get_type_hints

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
import catalogue
import error_pages
import plugin_reference
import recipe_keys
from matplotlib.figure import Figure

from kdlib.registry import registry

HERE = Path(__file__).parent

project = "kdlib"
author = "The kdlib authors"
project_copyright = "2026, the kdlib authors"
release = installed_version("kdlib-asc")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
smartquotes = False  # quotes belong to values
nitpicky = True
nitpick_ignore = [("py:class", "kdlib.progress.T")]  # a type variable
myst_enable_extensions = ["deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "kdlib"
html_static_path = ["_static"]
html_css_files = ["site.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_param = False  # types of settings are words, not names of classes
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
doctest_test_doctest_blocks = ""  # the examples of docstrings run in pytest; pages run here
exclude_patterns = ["_build", "generated", "results", "gallery", "integrations", "tutorial"]

# The inventories are text in Sphinx's first format (name, kind, page; the name is the anchor) and hold what these pages
# refer to, so that a build needs no network. To refresh one, fetch objects.inv from the address here, print it by
# `python -m sphinx.ext.intersphinx objects.inv`, and correct the pages of the names that are in the file.
intersphinx_mapping = {
    name: (address, f"_inventories/{name}.inv")
    for name, address in {
        "python": "https://docs.python.org/3",
        "torch": "https://docs.pytorch.org/docs/stable",
        "numpy": "https://numpy.org/doc/stable",
        "matplotlib": "https://matplotlib.org/stable",
    }.items()
}

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1,
    "parallel": 2,
}


def _bare_annotations(_app, function, _bound):
    """Turn ``Annotated[int, Field(ge=1)]`` into ``int``: the bounds stand in the text."""
    function = getattr(function, "__func__", function)
    with suppress(NameError, TypeError):  # of a named tuple, and where there are none
        function.__annotations__ = get_type_hints(function, localns={"Figure": Figure})


def _write_pages(_app, _config):
    generated = HERE / "generated"
    generated.mkdir(exist_ok=True)
    written = "\n".join(page.read_text(encoding="utf-8") for page in HERE.glob("*.md"))
    plugin_reference.write(HERE / "reference", registry(), elsewhere=written)
    catalogue.write(generated, registry(), HERE / "results" / "catalogue_digits.md")
    recipe_keys.write(generated / "recipe_keys.md")
    error_pages.check(HERE / "errors.md")


def setup(app):
    app.connect("config-inited", _write_pages)
    app.connect("autodoc-before-process-signature", _bare_annotations)
    plugins = {plugin.build: plugin for plugin in registry().plugins()}
    app.connect("autodoc-process-docstring", plugin_reference.with_types(plugins), priority=400)
