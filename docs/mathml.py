"""Formulas as MathML, which browsers draw by themselves: no script from elsewhere, also where there is no network."""

import html

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging


def converted(node, *, as_block):
    """MathML; what cannot be converted is a warning, and shown as it was written."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        return f"<code>{html.escape(node.astext())}</code>"


def inline(translator, node):
    """A formula in a line."""
    translator.body.append(converted(node, as_block=False))
    raise nodes.SkipNode


def display(translator, node):
    """A formula by itself."""
    translator.body.append(f'<div class="math">{converted(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Called by sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
