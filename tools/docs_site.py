"""MkDocs' hook: the site has the repository's pages, under the repository's paths.

Links between pages then work on the site as they do in the repository. A link to a source file
leads to a page that shows the file, and a link to a folder leads to the folder's page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
# The repository's pages, and what they show or link.
_CONTENT = ("*.md", "docs/**/*", "examples/*.md")
# Files that get a page which shows them, and the language in which it does.
_SOURCES = {".py": "python", ".h": "c", ".sh": "sh", "": "text", ".txt": "text", ".json": "json"}
_LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replaces stars in the navigation by the pages that they stand for."""
    config.nav = _expanded(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's pages in the place of those in docs/, and adds what they link."""
    pages = sorted({path for glob in _CONTENT for path in _ROOT.glob(glob) if path.is_file()})
    uris = [path.relative_to(_ROOT).as_posix() for path in pages]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    own = [
        File(uri, str(_ROOT), config.site_dir, use_directory_urls=config.use_directory_urls)
        for uri in uris
    ]
    linked = {target for uri in uris if uri.endswith(".md") for target in _linked_sources(uri)}
    shown = [
        File.generated(config, f"{uri}.md", content=_show(uri), inclusion=InclusionLevel.NOT_IN_NAV)
        for uri in sorted(linked - set(uris))
    ]
    return Files([*theme, *own, *shown])


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Has links to folders and source files lead to their pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def site_target(link: re.Match[str]) -> str:
        path = _ROOT / folder / link[0]
        if path.is_dir():
            return posixpath.join(link[0], _page_of(path))
        return f"{link[0]}.md" if _is_source(path) else link[0]

    return _LINK.sub(site_target, markdown)


def _expanded(item: Any) -> Any:
    if isinstance(item, list):
        return [page for entry in item for page in _pages(entry)]
    if isinstance(item, dict):
        return {title: _expanded(content) for title, content in item.items()}
    return item


def _pages(entry: Any) -> list[Any]:
    if isinstance(entry, str) and "*" in entry:
        return sorted(path.relative_to(_ROOT).as_posix() for path in _ROOT.glob(entry))
    return [_expanded(entry)]


def _linked_sources(uri: str) -> Iterator[str]:
    """Yields the source files that a page links."""
    for link in _LINK.findall((_ROOT / uri).read_text("utf-8")):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(uri), link))
        if _is_source(_ROOT / target):
            yield target


def _is_source(path: Path) -> bool:
    return path.is_file() and path.suffix in _SOURCES


def _page_of(folder: Path) -> str:
    """Returns the name of a folder's page: its README, or the last page that it has."""
    names = sorted(path.name for path in folder.glob("*.md"))
    return "README.md" if "README.md" in names or not names else names[-1]


def _show(uri: str) -> str:
    path = _ROOT / uri
    fence = "````"
    text = path.read_text("utf-8").rstrip("\n")
    return f"# {uri}\n\n{fence}{_SOURCES[path.suffix]}\n{text}\n{fence}\n"
