"""The site, by `make docs`. Pages are Markdown; what can be told and called is read from the source as it is built."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

from dmpo_lightning import __version__
from dmpo_lightning.commands.options import stated_options
from dmpo_lightning.commands.signatures import places, summary

project, author, release = "dmpo-lightning", "The dmpo-lightning contributors", __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dmpo-lightning {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

# Inventories of others are on the network. Without it, as in continuous integration, their names stay plain text.
ONLINE = os.environ.get("DMPO_DOCS_ONLINE") == "1"
INVENTORIES = {
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
    "lightning": "https://lightning.ai/docs/pytorch/stable",
    "transformers": "https://huggingface.co/docs/transformers/main/en",
}
intersphinx_mapping = {name: (address, None) for name, address in INVENTORIES.items()} if ONLINE else {}
# Types in signatures are not all on a page. What a page links to must be there.
nitpick_ignore_regex = [("py:(class|obj|data|exc)", ".*")]

OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository's root that are pages of the site."""


def options() -> Iterator[str]:
    """Every option as Markdown, as ``dmpo-lightning options`` lists them."""
    for place, path, found in places(stated_options()):
        yield f"## {path.rpartition('.')[2]}\n\n`--{place}`: `{path}`. {summary(path).replace('``', '`')}\n"
        for name, option in found.items():
            default = "required" if option.default is None else f"default `{option.default.replace('None', 'null')}`"
            text = re.sub("`+", "`", option.text)
            yield f"`--{place}.{name}`\n: {option.words}; {default}. {text}\n"
        yield ""


def read(app: Any, page: str, source: list[str]) -> None:
    """Fills in what is generated, and leads to pages of the site what leads to files beside `docs`."""
    text = source[0].replace("<!-- options -->", "\n".join(options()) if "<!-- options -->" in source[0] else "")
    for file, name in OUTSIDE.items():
        text = re.sub(rf"\]\((\.\./)+{re.escape(file)}", lambda found, name=name: "](" + name, text)
    if page == "decisions/README":
        pages = sorted(each.stem for each in Path(app.srcdir, "decisions").glob("[0-9]*.md"))
        text += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"
    source[0] = text


def fences(app: Any, what: str, name: str, described: Any, settings: Any, lines: list[str]) -> None:
    """Examples of docstrings, which are fenced as in Markdown, as reStructuredText has them."""
    inside = False
    for number, line in enumerate(list(lines)):
        text = line.lstrip()
        if text.startswith("```"):
            language = text.removeprefix("```")
            lines[number] = "" if inside else f"\n{line[: -len(text)]}.. code-block:: {language}\n"
            inside = not inside
        elif inside:
            lines[number] = f"   {line}"
    lines[:] = "\n".join(lines).split("\n")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    # GitHub draws these diagrams. The site would need a megabyte of script for two of them.
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", read)
    # Before napoleon.
    app.connect("autodoc-process-docstring", fences, priority=400)
