"""docs/troubleshooting.md quotes messages that the code still has."""

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = "message"
VARIABLE = "…"  # what stands for a name or a number

CODE_SPAN = re.compile(r"`([^`]+)`")
# Adjacent literals are one, as for the compiler.
LITERALS = re.compile(r'"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*')
SEAM = re.compile(r'"\s*"')


def quoted_messages():
    """What stands in the tables' columns of messages."""
    column = None
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = cells.index(HEADING) if HEADING in cells else -1
        elif column >= 0 and not set(line) <= set("|-: "):
            (message,) = CODE_SPAN.findall(cells[column])
            yield message


@cache
def literals():
    """All string literals of python/, cpp/ and cmake/; an f-string's constant parts each."""
    found = []
    for path in (ROOT / "python").rglob("*.py"):
        constants = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if hasattr(n, "value"))
        found += [n.value for n in constants if isinstance(n.value, str)]
    sources = chain((ROOT / "cpp").rglob("*.h"), (ROOT / "cpp").rglob("*.cc"))
    for path in chain(sources, (ROOT / "cmake").rglob("*.cmake")):
        for match in LITERALS.findall(path.read_text("utf-8")):
            text = SEAM.sub("", match)[1:-1]
            # CMake's variables stand inside of literals.
            found += re.split(r"\$\{\w+\}", text.replace('\\"', '"'))
    return "\n".join(found)


def test_the_page_quotes_messages():
    assert len(list(quoted_messages())) > 80


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_occurs_in_the_code(message):
    parts = [part.strip() for part in message.split(VARIABLE)]
    parts = [part for part in parts if any(map(str.isalpha, part))]
    missing = [part for part in parts if part not in literals()]
    assert parts, "expected words that do not vary, got none"
    assert not missing, f"no message in the code has {missing}"
