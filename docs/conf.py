"""The site: Sphinx reads docs/ and the package's docstrings. ``make docs`` builds build/docs/html."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import fogzo_kernels  # noqa: E402

project = "fogzo_kernels"
release = version = fogzo_kernels.__version__
html_title = f"{project} {release}"
html_theme = "furo"
html_copy_source = html_show_copyright = html_show_sphinx = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
highlight_language = "none"  # of indented lines: shell, formulas, output

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
#: Types in signatures that other libraries define: the build needs no network, so nothing links to them.
nitpick_ignore_regex = [(r"py:(class|obj|data)", r"(torch|collections|transformers|os)\..*")]
nitpick_ignore = [("py:class", "fogzo_kernels.train.step.Step")]  # whoever writes an optimizer reads its source

#: Where the repository's files are shown, https://.../blob/main/ say. Without it links lead into the checkout.
SOURCE_URL = os.environ.get("DOCS_SOURCE_URL", "")
myst_url_schemes = {"http": None, "https": None, "mailto": None, "source": "{{path}}"}


def link_to_sources(app: Sphinx, page: str, text: list[str]) -> None:
    """Let links out of docs/ lead to the repository's files, which are no part of the site."""
    folder, html = (ROOT / "docs" / page).parent, Path(app.outdir, page).parent
    base = SOURCE_URL or f"{os.path.relpath(ROOT, html)}/"

    def link(found: re.Match[str]) -> str:
        path = (folder / found[1]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]
        if not path.exists() or not path.is_relative_to(ROOT):
            raise SphinxError(f"docs/{page}: links must lead somewhere, got {found[1]}")
        return f"](source:{base}{path.relative_to(ROOT).as_posix()}"

    text[0] = re.sub(r"\]\((\.\./[^)#\s]+)", link, text[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_to_sources)
