"""Sphinx settings."""

import ast
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import catalogue

project = "kdlib"
author = "The kdlib authors"
project_copyright = "2026, the kdlib authors"
release = installed_version("kdlib-asc")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "kdlib"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
doctest_test_doctest_blocks = ""  # the examples of docstrings run in pytest; pages run here
exclude_patterns = ["_build", "generated", "results", "tutorial"]


class _Bare(ast.NodeTransformer):
    """Turn ``Annotated[int, Field(ge=1)]`` into ``int``: the bounds stand in the text."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
            return self.visit(node.slice.elts[0])
        return self.generic_visit(node)


def _bare_annotations(_app, function, _bound):
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if isinstance(annotation, str) and "Annotated" in annotation:
            function.__annotations__[name] = ast.unparse(_Bare().visit(ast.parse(annotation, mode="eval")))


GENERATED = Path(__file__).parent / "generated"
GENERATED.mkdir(exist_ok=True)
catalogue.write(GENERATED)


def setup(app):
    app.connect("autodoc-before-process-signature", _bare_annotations)
