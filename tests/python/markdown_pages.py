"""What tests ask of Markdown pages: fenced blocks, links, and the anchors that links may name."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
_NOT_WRITTEN = ("build", "dist")
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)
_HTML_TARGET = re.compile(r"""\b(?:href|src)=["']([^"']*)["']""")
_HTML_ANCHOR = re.compile(r"""\b(?:id|name)=["']([^"']*)["']""")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the first word after the fence; may be empty.
        line: number of its first line in the page.
        text: its lines.
        reason: why it is not run, None if it is run.
    """

    language: str
    line: int
    text: str
    reason: str | None


@dataclass
class Page:
    """What a page has; `links` are pairs of line number and target."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    links: list[tuple[int, str]] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    stray_reasons: list[int] = field(default_factory=list)

    @property
    def name(self):
        return self.path.relative_to(ROOT).as_posix() if ROOT in self.path.parents else ""


def repository_pages():
    """All Markdown pages that people wrote."""
    pages = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in _NOT_WRITTEN]
        pages += [Path(folder) / file for file in files if file.endswith(".md")]
    return sorted(pages)


def read_page(path):
    """Parses a page as GitHub does."""
    page, slugs = Page(path), Counter()
    reason = None
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            language = token.info.split()[0] if token.info.strip() else ""
            page.blocks.append(Block(language, line + 1, token.content, reason))
        elif token.type == "heading_open":
            page.anchors.add(_slug(following, slugs))
        elif token.type == "inline":
            page.links += [(line, target) for target in _targets(token)]
        comment = _NOT_RUN.search(token.content) if token.type == "html_block" else None
        reason = comment[1] if comment else None
        if token.type == "html_block":
            page.links += [(line, target) for target in _HTML_TARGET.findall(token.content)]
            page.anchors.update(_HTML_ANCHOR.findall(token.content))
            if comment and (following is None or following.type != "fence"):
                page.stray_reasons.append(line)
    return page


def _targets(inline):
    for token in inline.children:
        target = token.attrGet("href") or token.attrGet("src")
        if target is not None:
            yield target
        elif token.type == "html_inline":
            yield from _HTML_TARGET.findall(token.content)


def _slug(inline, seen):
    """The anchor that GitHub gives a heading; a repeated one gets a number."""
    shown = ("text", "code_inline")
    text = "".join(child.content for child in inline.children if child.type in shown)
    slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
    count = seen[slug]
    seen[slug] += 1
    return f"{slug}-{count}" if count else slug
