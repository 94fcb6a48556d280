"""The documentation site: `make docs` builds it into build/docs, with every warning an error."""

import re
from pathlib import Path
from textwrap import dedent

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import flash_attn_ext

ROOT = Path(__file__).resolve().parent.parent

project = "flash_attn_ext"
version = release = flash_attn_ext.__version__
project_copyright = "the flash_attn_ext authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "fixed_sidebar": True, "show_powered_by": False}
html_show_sourcelink = False
smartquotes = False  # strings are quoted as they are written

myst_heading_anchors = 3

default_role = "code"  # docstrings write code as Markdown does
add_module_names = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types of others: their documentation is not here, and the build asks no network.
nitpick_ignore_regex = [("py:.*", r"(torch|transformers|collections|typing|types|pathlib)\..*|Tensor|nn\..*|optional")]

# Pages whose text is a file that readers of the repository look for elsewhere.
_ELSEWHERE = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
_ELSEWHERE |= {"benchmarks": "benchmarks", "benchmarks/README.md": "benchmarks"}


def _stay_on_the_site(app: Sphinx, document: nodes.document) -> None:
    """Links of Markdown files to others of the repository: to their page, or, if they have none, only their text."""
    for link in [*document.findall(addnodes.pending_xref), *document.findall(addnodes.download_reference)]:
        if link.get("reftype") != "myst" or link.get("refdomain"):
            continue
        target = link["reftarget"].partition("#")[0]
        # Files that another page includes write their links as seen from their own folder, the root.
        found = [path for path in (ROOT / "docs" / target, ROOT / target) if target and path.exists()]
        if not found:
            continue  # left to Sphinx, which warns
        place = found[0].resolve().relative_to(ROOT).as_posix()
        page = _ELSEWHERE.get(place) or place.removeprefix("docs/").removesuffix(".md")
        if page in app.env.found_docs:
            where = {"refdomain": "doc", "reftype": "myst", "reftarget": page, "reftargetid": None}
            new = addnodes.pending_xref("", *link.children, refdoc=link["refdoc"], refexplicit=True, **where)
            link.replace_self(new)
        else:
            link.replace_self(link.children)


def _list_what_is_returned(
    app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]
) -> None:
    """Several named results under "Returns:" as a list: napoleon knows one, and takes its name for a type."""
    if "Returns:" not in lines:
        return
    first = lines.index("Returns:") + 1
    last = next((i for i in range(first, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    found = [":returns:"]
    for line in dedent("\n".join(lines[first:last])).splitlines():
        if named := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            found += ["", f"   * **{named[1]}** -- {named[2]}"]
        elif line.startswith(" "):
            found.append(f"     {line.strip()}")
        else:
            after_list = found[-1].startswith(("   * ", "     "))
            found += [*([""] if after_list else []), f"   {line}"]
    lines[first - 1 : last] = [*found, ""]


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", _stay_on_the_site, priority=400)  # before files to download are copied
    app.connect("autodoc-process-docstring", _list_what_is_returned, priority=400)  # before napoleon
