"""Check the internal links of a site: each leads to a file in the folder, and to an id where it names one."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Reads the ids of a page, and its links."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")


def broken(site: Path) -> list[str]:
    """Returns a line for each link inside the site that leads nowhere."""
    pages = {file.resolve(): Page(file) for file in sorted(site.rglob("*.html"))}
    if not pages:
        raise SystemExit(f"{site} must hold a site, got no page")
    found = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if parts.scheme or parts.netloc or not target.is_relative_to(site.resolve()):
                continue  # to the web, or to the repository's files
            if not target.is_file():
                found.append(f"{file.name}: {link} leads to no file")
            elif target in pages and unquote(parts.fragment) not in pages[target].ids | {""}:
                found.append(f"{file.name}: {link} leads to no id")
    return found


if __name__ == "__main__":
    lines = broken(Path(sys.argv[1]))
    sys.exit("\n".join(lines) if lines else 0)
