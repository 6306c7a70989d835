"""Configuration of the documentation."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "gallery" / "training")]

import draw_architecture
import error_examples
import support_table

import perexample

project = "perexample"
copyright = "2026, the perexample authors"
version = release = perexample.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "perexample"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"sidebar_hide_name": False}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"
napoleon_custom_sections = ["Guarantees", "Cost"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The gallery's helpers are in a folder beside its pages.
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[1], os.environ.get("PYTHONPATH", "")])
sphinx_gallery_conf = {
    "examples_dirs": "../gallery",
    "gallery_dirs": "auto_gallery",
    "ignore_pattern": r"training",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "gallery_order.PageOrder",
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
    "matplotlib_animations": False,
    "parallel": os.cpu_count(),  # so many pages run at a time
}

draw_architecture.main(Path(__file__).parent / "_static" / "architecture.svg")
support_table.main(Path(__file__).parent / "generated" / "support.inc")
error_examples.main(Path(__file__).parent / "generated" / "errors.inc")  # after the table: it registers rules


def link_to_examples(app, what, name, obj, options, lines):
    """Exceptions of the API point to the code that raises them."""
    if what == "exception" and name.rpartition(".")[2] in error_examples.NAMES:
        lines += ["", f"Examples: :ref:`{name.rpartition('.')[2]} <error-{name.rpartition('.')[2]}>`."]


def setup(app):
    """Called by sphinx."""
    app.connect("autodoc-process-docstring", link_to_examples)
