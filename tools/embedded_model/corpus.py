"""The text: the King James Bible from Debian, split into chapters, some of them held out.

Debian's packages `bible-kjv` (a reader) and `bible-kjv-text` (its data) are downloaded and
unpacked, not installed; the reader prints one verse a line. The translation is of 1611 and its
copyright expired, as the packages' copyright file says.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text")
EVERYTHING = "gen1:1-rev22:21"
# Every 50th chapter is held out, beginning with this one: Genesis 30, Exodus 30, ...
HOLD_OUT_EVERY = 50
HOLD_OUT_FIRST = 29
HELD_OUT_BYTES = 20_000

_VERSE = re.compile(r"^(\d?[A-Za-z]+?)(\d+):(\d+) (.+)$")
BOOKS = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers",
    "Deu": "Deuteronomy", "Josh": "Joshua", "Jdgs": "Judges", "Ruth": "Ruth",
    "1Sm": "1 Samuel", "2Sm": "2 Samuel", "1Ki": "1 Kings", "2Ki": "2 Kings",
    "1Chr": "1 Chronicles", "2Chr": "2 Chronicles", "Ezra": "Ezra", "Neh": "Nehemiah",
    "Est": "Esther", "Job": "Job", "Psa": "Psalms", "Prv": "Proverbs",
    "Eccl": "Ecclesiastes", "SSol": "Song of Solomon", "Isa": "Isaiah", "Jer": "Jeremiah",
    "Lam": "Lamentations", "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea", "Joel": "Joel",
    "Amos": "Amos", "Obad": "Obadiah", "Jonah": "Jonah", "Mic": "Micah", "Nahum": "Nahum",
    "Hab": "Habakkuk", "Zep": "Zephaniah", "Hag": "Haggai", "Zec": "Zechariah",
    "Mal": "Malachi", "Mat": "Matthew", "Mark": "Mark", "Luke": "Luke", "John": "John",
    "Acts": "Acts", "Rom": "Romans", "1Cor": "1 Corinthians", "2Cor": "2 Corinthians",
    "Gal": "Galatians", "Eph": "Ephesians", "Phi": "Philippians", "Col": "Colossians",
    "1Th": "1 Thessalonians", "2Th": "2 Thessalonians", "1Tim": "1 Timothy",
    "2Tim": "2 Timothy", "Titus": "Titus", "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James",
    "1Pet": "1 Peter", "2Pet": "2 Peter", "1Jn": "1 John", "2Jn": "2 John", "3Jn": "3 John",
    "Jude": "Jude", "Rev": "Revelation",
}  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """A chapter: its book's name, its number, its verses."""

    book: str
    number: int
    verses: tuple[str, ...]

    @property
    def text(self) -> str:
        """A heading, then one verse a line."""
        return f"{self.book} {self.number}\n" + "\n".join(self.verses)


def fetch(folder: Path) -> Path:
    """Returns the file of all verses in `folder`, downloaded from Debian if it is not there."""
    verses = folder / "kjv.txt"
    if verses.exists():
        return verses
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in PACKAGES:
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder / "root"], check=True)
    reader = [folder / "root/usr/bin/bible", "-p", folder / "root/usr/lib", "-f", EVERYTHING]
    printed = subprocess.run(reader, check=True, capture_output=True, text=True)
    verses.write_text(printed.stdout, encoding="utf-8")
    return verses


def parse(lines: str) -> list[Chapter]:
    """Returns the chapters of ``Ge1:1 In the beginning ...``, one verse a line.

    Raises:
        ValueError: a line is not a verse of a known book.
    """
    verses: dict[tuple[str, int], list[str]] = {}
    for line in lines.splitlines():
        match = _VERSE.match(line)
        if match is None or match[1] not in BOOKS:
            raise ValueError(f"corpus: expected a verse like 'Ge1:1 In the ...', got {line[:60]!r}")
        verses.setdefault((BOOKS[match[1]], int(match[2])), []).append(match[4].strip())
    return [Chapter(book, number, tuple(texts)) for (book, number), texts in verses.items()]


def split(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Returns the chapters to train on and those held out."""
    held_out = chapters[HOLD_OUT_FIRST::HOLD_OUT_EVERY]
    names = {(chapter.book, chapter.number) for chapter in held_out}
    return [c for c in chapters if (c.book, c.number) not in names], held_out


def excerpt(held_out: list[Chapter], nbytes: int = HELD_OUT_BYTES) -> str:
    """Returns about `nbytes` of the held-out chapters, a blank line between two."""
    texts: list[str] = []
    # Every third, so that the excerpt reaches from the Law to the Epistles.
    for chapter in [*held_out[::3], *held_out[1::3], *held_out[2::3]]:
        if sum(map(len, texts)) + len(chapter.text) <= nbytes:
            texts.append(chapter.text)
    return "\n\n".join(texts) + "\n"
