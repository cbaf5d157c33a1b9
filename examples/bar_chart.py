"""Draws a bar chart of this machine's speed: tokens per second of each kernel variant.

The numbers come from `cpumoe bench --json`. Give a file that it wrote earlier, or let the program
measure a small layer now, which takes some seconds. Needs the extra `plot`.

    python bar_chart.py [bench.json]                # writes bar_chart.svg
"""

import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

if len(sys.argv) > 1:
    document = json.loads(Path(sys.argv[1]).read_text())
else:
    bench = "bench --model v4-flash --experts 8 --isa all --tokens 1,16 --seconds 0.05 --rounds 2"
    command = [sys.executable, "-m", "cpumoe", *bench.split(), "--json", "-"]
    document = json.loads(subprocess.check_output(command))

rows, machine = document["rows"], document["machine"]
several = len({row.get("format") for row in rows}) > 1  # with `bench --format all`


def variant_of(row):
    """Returns the name of a row's bar."""
    return f"{row['isa']} {row['format']}" if several else row["isa"]


variants = list(dict.fromkeys(map(variant_of, rows)))
counts = sorted({row["tokens"] for row in rows})
speeds = {(variant_of(row), row["tokens"]): row["tokens_per_second"] for row in rows}

figure = Figure(figsize=(8, 4), layout="constrained")
axes = figure.add_subplot(title=f"{machine['cpu']}, {machine['threads']} threads")
height = 0.8 / len(counts)
for index, tokens in enumerate(counts):
    places = [place + index * height for place in range(len(variants))]
    bars = axes.barh(places, [speeds[v, tokens] for v in variants], height, label=f"{tokens}")
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
axes.set_yticks([place + 0.4 - height / 2 for place in range(len(variants))], variants)
axes.set_xlabel("tokens per second")
axes.legend(title="tokens per call")
figure.savefig("bar_chart.svg")
print("wrote bar_chart.svg:", ", ".join(variants))
