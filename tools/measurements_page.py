"""Writes the pages of docs/measurements/ from the JSON files that are there.

``python tools/measurements_page.py`` writes a page NAME.md for each NAME.json, and the index
README.md. There are two kinds of files:

- what ``cpumoe bench --json NAME.json`` wrote, with one key added by hand:
  ``"about": {"title", "dates", "machine", "command", "notes"}``;
- numbers that were entered by hand, because they compare cpumoe with other programs or come from a
  machine that is gone: ``{"title", "dates", "machine", "layer", "method", "versions", "commands",
  "runs", "tokens", "rows": [{"engine", "run", "tokens_per_second", "error"}], "tables": [{"title",
  "text", "columns", "rows"}], "picture": {"file", "title", "text"}, "notes"}``. All but "title",
  "dates" and "machine" may be missing.

A page depends on its file alone.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "measurements"
INDEX = "README.md"
_WIDTH = 120
_BY_HAND = (
    "The numbers of this page were entered by hand into JSON, from what the programs printed."
)
_BY_BENCH = (
    "The numbers of this page are those that `cpumoe bench` wrote. "
    "[performance.md](../performance.md#how-to-read-the-table-of-cpumoe-bench) explains the "
    "columns."
)
_INTRODUCTION = (
    "Each page has the numbers of one machine at one time. Do not compare numbers of "
    "different pages. They come from different machines and versions, and other programs ran "
    "beside some of them. "
    "[performance.md](../performance.md) explains what the numbers depend on. "
    "`python tools/measurements_page.py` makes these pages from the JSON files in this folder."
)
# What the facts of a file entered by hand are called on its page.
_FACTS = {
    "dates": "Measured",
    "machine": "Machine",
    "layer": "Layer",
    "method": "Method",
    "versions": "Versions",
}


def pages(folder: Path = FOLDER) -> dict[str, str]:
    """Returns the content of each page of a folder, by file name."""
    documents = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
    made = {f"{name}.md": page(name, document) for name, document in documents.items()}
    return {INDEX: _index(documents)} | made


def page(name: str, document: dict[str, Any]) -> str:
    """Returns the page of one file.

    Args:
        name: the file's name without its suffix.
        document: its content.

    Raises:
        SystemExit: a file of ``cpumoe bench`` without the key "about".
    """
    if "settings" not in document:
        return _join(_entered(document))
    if "about" not in document:
        raise SystemExit(f'{name}.json: add "about": {{"title", "dates", "machine", "command"}}')
    return _join(_benched(document))


def _entered(document: dict[str, Any]) -> Iterable[str]:
    """The parts of a page whose numbers were entered by hand."""
    yield f"# {document['title']}"
    yield _BY_HAND
    yield _table(("", ""), [(_FACTS[key], document[key]) for key in _FACTS if key in document])
    if "commands" in document:
        yield "What was run:"
        yield _list(document["commands"])
    if "runs" in document:
        yield "The column *run* of the table below says in which run a row was measured:"
        yield _list(f"**{run}**: {what}" for run, what in document["runs"].items())
    if "rows" in document:
        yield "## Tokens per second"
        yield from _speeds(document)
    for table in document.get("tables", ()):
        yield f"## {table['title']}"
        if "text" in table:
            yield _wrap(table["text"])
        yield _table(table["columns"], table["rows"])
    if "picture" in document:
        picture = document["picture"]
        yield f"## {picture['title']}"
        yield _wrap(picture["text"])
        yield f"![{picture['title']}]({picture['file']})"
    yield from _notes(document)


def _speeds(document: dict[str, Any]) -> Iterable[str]:
    """The table of engines; its numbers have a column for each number of tokens."""
    with_runs = "runs" in document
    rows = [
        (
            row["engine"],
            *([row["run"]] if with_runs else []),
            *(f"{speed:,}" for speed in row["tokens_per_second"]),
            row.get("error", ""),
        )
        for row in document["rows"]
    ]
    tokens = [f"{count:,}" for count in document["tokens"]]
    yield ("Columns are tokens per call. *Error* is the output's relative error in the 2-norm.")
    yield _table(("engine", *(["run"] if with_runs else []), *tokens, "error"), rows)


def _benched(document: dict[str, Any]) -> Iterable[str]:
    """The parts of a page whose numbers ``cpumoe bench`` wrote."""
    about, machine, settings = document["about"], document["machine"], document["settings"]
    rounds = document["rows"][0]["rounds"]
    several = "," in settings["format"]  # rows of one format need not name it
    compared = document["rows"][0].get("nodes_speed") is not None
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield f"# {about['title']}"
    yield _wrap(_BY_BENCH)
    yield _table(
        ("", ""),
        [
            ("Measured", about["dates"]),
            ("Machine", about["machine"]),
            ("CPU's own name", machine["cpu"]),
            ("Layer", _layer(settings)),
            (
                "Method",
                f"{machine['threads']} threads; {rounds} rounds in which rows take turns; "
                f"{settings['seconds']:g} s of calls for each row",
            ),
            ("Versions", versions),
            ("Command", f"`{about['command']}`"),
        ],
    )
    if not machine["steady"]:
        yield (
            "**The machine's limits changed during the run.** Other programs may have been busy."
        )
    yield "## Limits of the machine"
    yield _table(("limit", "best", "least"), _limits(machine))
    yield "## Speed"
    yield _table(
        (
            "ISA",
            "precision",
            *(["format"] if several else []),
            *(["nodes"] if compared else []),
            "tokens",
            "ms",
            "tokens/s",
            "spread",
            "GB/s",
            "GFLOP/s",
            "memory",
            "peak",
            "bound",
            *([f"vs {document['rows'][0]['format']}"] if several else []),
            *(["local", f"vs {_nodes(document['rows'][0])}"] if compared else []),
        ),
        (_cells(row, several, compared) for row in document["rows"]),
    )
    yield from _notes(about)


def _layer(settings: dict[str, Any]) -> str:
    invariant = ", batch-invariant" if settings["batch_invariant"] else ""
    chosen = (f"{name} {settings[name]}, " for name in ("scales", "group") if settings.get(name))
    return (
        f"{settings['model']}: hidden {settings['hidden_size']}, intermediate "
        f"{settings['intermediate_size']}, {settings['experts']} experts, top "
        f"{settings['top_k']}, {settings['format'].replace(',', ', ')}, {''.join(chosen)}routing "
        f"{settings['routing']}{invariant}"
    )


def _limits(machine: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    read = machine["read_bandwidth"]
    best, least = (_number(read[key] / 1e9) for key in ("bytes_per_second", "least"))
    yield "memory reads", f"{best} GB/s", f"{least} GB/s"
    for peak in machine["dot_peaks"]:
        best, least = (_number(2e-9 * peak[key]) for key in ("macs_per_second", "least"))
        kind = ", ".join(peak[key] for key in ("isa", "format", "precision") if key in peak)
        name = f"multiply-adds in registers, {kind}"
        yield name, f"{best} GFLOP/s", f"{least} GFLOP/s"


def _cells(row: dict[str, Any], several: bool, compared: bool) -> tuple[str, ...]:
    peak, local = row["share_of_dot_peak"], row.get("local_share")
    return (
        row["isa"],
        row["precision"],
        *([row["format"]] if several else []),
        *([_nodes(row)] if compared else []),
        f"{row['tokens']:,}",
        _number(1e3 * row["seconds"]),
        _number(row["tokens_per_second"]),
        _percent(row["spread"]),
        _number(row["bytes_per_second"] / 1e9),
        _number(row["flops_per_second"] / 1e9),
        _percent(row["share_of_read_bandwidth"]),
        "unknown" if peak is None else _percent(peak),
        row["bound"],
        *([f"{row['speed_ratio']:.2f}"] if several else []),
        *(["" if local is None else _percent(local)] if compared else []),
        *([f"{row['nodes_speed']:.2f}"] if compared else []),
    )


def _nodes(row: dict[str, Any]) -> str:
    """NUMA nodes as ``cpumoe bench --nodes`` takes them."""
    nodes = row["nodes"]
    if nodes is None:
        return "1"
    return ",".join(map(str, nodes)) if len(nodes) > 1 else f"[{nodes[0]}]"


def _notes(about: dict[str, Any]) -> Iterable[str]:
    if about.get("notes"):
        yield "## Notes"
        yield from map(_wrap, about["notes"])


def _index(documents: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, document in reversed(documents.items()):
        about = document.get("about", document)
        source = "`cpumoe bench`" if "settings" in document else "entered by hand into the JSON"
        rows.append((about["dates"], f"[{about['title']}]({name}.md)", source))
    columns = ("measured", "page", "where its numbers come from")
    return _join(["# Measurements", _wrap(_INTRODUCTION), _table(columns, rows)])


def _number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(items: Iterable[str]) -> str:
    return "\n".join(_wrap(item, first="- ") for item in items)


def _wrap(text: str, first: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes all pages."""
    for name, content in pages().items():
        (FOLDER / name).write_text(content, "utf-8")
        print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
