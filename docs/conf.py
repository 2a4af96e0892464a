"""The documentation site, built by `make docs`. Nothing is fetched from a network, neither to build it nor to read it."""

from __future__ import annotations

import re
from pathlib import Path

import fastlora

project = "fastlora"
release = fastlora.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fastlora {release}"
html_copy_source = html_show_copyright = False
html_static_path, html_css_files = ["_static"], ["site.css"]
smartquotes_action = "D"  # dashes alone: of "auto" and 'x' nothing may change, they are code
myst_heading_anchors = 3

default_role = "py:obj"  # `x` in a docstring: code, and a link where the site describes it
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torch's own words about nn.Module and Optimizer are not ours to repeat
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # "y: [..., N]" under Returns names what comes back; its type is in the signature
napoleon_custom_sections = ["Numerics", "Memory", "CUDA graphs"]


def read_as_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text, with `names` in backticks and formulas and code indented. reStructuredText wants the
    indented blocks announced, and would read |x| and a trailing_ outside of backticks as markup.
    """
    text, literal = [], False
    for index, line in enumerate(lines):
        after_a_blank_line = index > 1 and not lines[index - 1].strip() and not lines[index - 2].startswith(" ")
        if after_a_blank_line and line.startswith("    "):
            text += ["::", ""]
            literal = True
        literal = literal and (not line.strip() or line.startswith("    "))
        text.append(line if literal else _escaped(line))
    lines[:] = text


def _escaped(line: str) -> str:
    parts = line.split("`")
    parts[::2] = [re.sub(r"\||(?<=\w)_(?!\w)|(?<!\w)\*(?=\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


def unlink_what_is_no_page(app, docname: str, source: list[str]) -> None:
    """Pages link to folders and Markdown of the repository, which the site cannot follow: their names are left."""
    page = Path(app.srcdir, docname).parent

    def plain(link: re.Match[str]) -> str:
        target = page / link[2]
        outside = not target.resolve().is_relative_to(app.srcdir) and target.exists()
        return link[1] if outside and (target.is_dir() or target.suffix == ".md") else link[0]

    source[0] = re.sub(r"\[([^]]+)\]\((\.\./[^)#]+)\)", plain, source[0])


def setup(app) -> None:
    app.connect("autodoc-process-docstring", read_as_text, priority=400)  # before napoleon, which reads sections
    app.connect("source-read", unlink_what_is_no_page)
