"""Draws docs/speed.svg: cpumoe beside other engines, as bars.

``python tools/speed_picture.py`` reads the table of a page of docs/measurements/ and writes the
picture again. Numbers, names of engines and dates come from the table's file alone. The drawing is
plain SVG text, so that the same file comes out everywhere, and readers with a dark page get light
letters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parents[1] / "docs"
MEASUREMENTS = DOCS / "measurements" / "2026-11-25-granite-rapids.json"
PICTURE = DOCS / "speed.svg"

# Rows of the table, with the names that the picture gives them; the first is cpumoe.
ENGINES = {
    "cpumoe amx, bf16": "cpumoe",
    "SGLang CPU kernel, MXFP4 (AMX)": "SGLang's CPU kernel",
    "kt-kernel AMXFP4_KGroup (better thread count)": "kt-kernel",
    "torch `_grouped_mm`, bf16 weights": "PyTorch, bf16 weights",
}
PANELS = {1: "1 token at a time", 64: "64 tokens at a time", 1024: "1,024 tokens at a time"}

WIDTH, NAMES, PANEL, GAP = 860, 172, 212, 16
TOP, BAR, ROW = 92, 22, 32
_LONGEST = 150  # leaves room for a bar's number

STYLE = """
  text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .note { font-size: 12px; fill: #59636e; }
  .own { font-weight: 600; }
  .bar { fill: #9aa4af; }
  .bar.own { fill: #0072b2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .bar { fill: #6e7681; }
    .bar.own { fill: #56b4e9; }
  }
"""


def draw(measurements: dict[str, Any]) -> str:
    """Returns the picture of a table of measurements, as SVG."""
    rows = {row["engine"]: row["tokens_per_second"] for row in measurements["rows"]}
    speeds = {name: rows[engine] for engine, name in ENGINES.items()}
    bottom = TOP + ROW * len(speeds)
    parts = [
        _text(0, 20, "Tokens per second of one mixture-of-experts layer (more is better)", "title"),
        *(
            _text(NAMES - 10, _middle(line), name, _own(line), anchor="end")
            for line, name in enumerate(speeds)
        ),
    ]
    for index, (tokens, title) in enumerate(PANELS.items()):
        column = measurements["tokens"].index(tokens)
        left = NAMES + index * (PANEL + GAP)
        parts.append(_text(left, TOP - 18, title, "own"))
        parts += _bars(left, [speed[column] for speed in speeds.values()])
    machine, threads = (
        measurements["machine"].partition(":")[0],
        measurements["method"].partition(";")[0],
    )
    where = f"{machine}, {threads}. {measurements['dates']}."
    parts += [
        _text(0, bottom + 24, f"{_capital(measurements['layer'])}.", "note"),
        _text(0, bottom + 42, where, "note"),
    ]
    height = bottom + 52
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>{escape(_summary(speeds, measurements['tokens']))}</title>\n"
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bars(left: int, speeds: list[int]) -> list[str]:
    scale = _LONGEST / max(speeds)
    parts = []
    for line, speed in enumerate(speeds):
        length = round(speed * scale, 1)
        kind = f"bar {_own(line)}".strip()
        parts.append(
            f'<rect class="{kind}" x="{left}" y="{TOP + ROW * line}" width="{length}" '
            f'height="{BAR}" rx="2"/>'
        )
        parts.append(_text(round(left + length + 6, 1), _middle(line), f"{speed:,}", _own(line)))
    return parts


def _summary(speeds: dict[str, list[int]], tokens: list[int]) -> str:
    """What a reader hears who does not see the picture."""
    panels = []
    for count, title in PANELS.items():
        column = tokens.index(count)
        numbers = ", ".join(f"{name} {speed[column]:,}" for name, speed in speeds.items())
        panels.append(f"{title}: {numbers}")
    return f"Tokens per second. {'; '.join(panels)}."


def _text(x: float, y: float, content: str, kind: str = "", *, anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    if anchor != "start":
        attributes += f' text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}"{attributes}>{escape(content)}</text>'


def _middle(line: int) -> int:
    """Returns the base line of text beside a bar."""
    return TOP + ROW * line + BAR - 6


def _own(line: int) -> str:
    return "own" if line == 0 else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> None:
    """Writes the picture."""
    PICTURE.write_text(draw(json.loads(MEASUREMENTS.read_text())))
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
