"""Comments, docstrings and help texts name their subject: none begins with "Of" or "The same"."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("asv_benchmarks", "cmake", "cpp", "examples", "python", "tests", "tools")
SUFFIXES = {".cc", ".cmake", ".h", ".in", ".py", ".sh"}
COMMENT = re.compile(r"\s*(#|//)")
CLIPPED = re.compile(r'\s*(?:#|//+|/\*+|"""|(?:help=)?")\s*(?:Of|The same)\b')


def clipped_beginnings(text):
    """Returns the numbers of lines that begin a comment or a string with a clipped phrase."""
    numbers = []
    before = None
    for number, line in enumerate(text.splitlines(), 1):
        comment = COMMENT.match(line)
        begins = comment is None or before is None or comment[1] != before[1]
        if begins and CLIPPED.match(line):
            numbers.append(number)
        before = comment
    return numbers


def test_no_comment_begins_with_a_clipped_phrase():
    files = [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and path != Path(__file__)
    ]
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number in clipped_beginnings(path.read_text("utf-8"))
    ]
    assert found == []


def test_clipped_phrases_are_found_at_beginnings_only():
    text = """
    # Of one call.
    # A code
    # Of one call.
    x = 1  # Of one call.
    // The same.
    /* The same. */
        help="Of one call.",
    """
    assert clipped_beginnings(text) == [2, 6, 7, 8]
    assert clipped_beginnings('"' * 3 + "The same of two." + '"' * 3) == [1]
    assert clipped_beginnings("# Offsets\n\n# The samples") == []
