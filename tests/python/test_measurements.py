"""docs/measurements/: the tools make pages and picture from the checked-in numbers."""

import importlib.util
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_tools import quicken, succeed, use_small_model
from checkpoint_tools import write_small
from cli_tools import make_quick, run
from node_tools import made_up_nodes

from cpumoe.cli import bench_compare
from cpumoe.measure import benchmark

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_picture_shows_the_measurements():
    tool = load_tool("speed_picture")
    drawn = tool.draw(json.loads(tool.MEASUREMENTS.read_text()))
    assert tool.PICTURE.read_text() == drawn, "run python tools/speed_picture.py"
    ElementTree.fromstring(drawn)


def test_pages_are_made_of_their_json():
    tool = load_tool("measurements_page")
    made = tool.pages()
    assert sorted(made) == sorted(path.name for path in tool.FOLDER.glob("*.md"))
    for name, content in made.items():
        assert (tool.FOLDER / name).read_text("utf-8") == content, (
            "run python tools/measurements_page.py"
        )


def test_pages_of_todays_bench(tmp_path, monkeypatch):
    make_quick(monkeypatch.setattr)
    monkeypatch.setattr(benchmark, "_LIMIT_SECONDS", 0)
    file = tmp_path / "today.json"
    layer = ("--model", write_small(tmp_path / "v4", "v4-flash"))
    result = run("bench", *layer, "--seconds", 0, "--rounds", 1, "--tokens", 3, "--json", file)
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    tool = load_tool("measurements_page")
    with pytest.raises(SystemExit, match=r'today\.json: add "about"'):
        tool.pages(tmp_path)
    about = {"title": "A toy", "dates": "2026", "machine": "small", "command": "cpumoe bench"}
    document["about"] = {**about, "notes": ["Not a real layer."]}
    file.write_text(json.dumps(document))
    page = tool.pages(tmp_path)["today.md"]
    assert page.startswith("# A toy\n")
    assert f"| {document['rows'][0]['isa']} | {document['rows'][0]['precision']} | 3 | " in page
    assert page.endswith("## Notes\n\nNot a real layer.\n")
    bench_compare.read(file)  # one key more does not make it another document


@pytest.mark.filterwarnings("ignore:Runtime. . threads requested:RuntimeWarning")
def test_pages_of_several_choices_of_nodes(tmp_path, monkeypatch):
    quicken(monkeypatch)
    use_small_model(monkeypatch)
    made_up_nodes(monkeypatch, tmp_path / "machine", [1, 1])
    file = tmp_path / "nodes.json"
    choices = ("--nodes", "[0]", "--nodes", "auto", "--nodes", "1")
    succeed(*choices, "--experts", 4, "--tokens", 3, "--json", file)
    document = json.loads(file.read_text())
    document["about"] = {"title": "t", "dates": "2026", "machine": "m", "command": "c"}
    page = load_tool("measurements_page").page("nodes", document)
    assert "| precision | nodes | tokens | " in page
    assert "| bound | local | vs [0] |" in page
    assert all(f" | {nodes} | 3 | " in page for nodes in ("[0]", "0,1", "1"))


def test_pages_of_several_formats(tmp_path, monkeypatch):
    quicken(monkeypatch)
    use_small_model(monkeypatch)
    file = tmp_path / "formats.json"
    succeed("--format", "int4,mxfp4", "--experts", 7, "--tokens", 3, "--json", file)
    document = json.loads(file.read_text())
    document["about"] = {"title": "t", "dates": "2026", "machine": "m", "command": "c"}
    page = load_tool("measurements_page").page("formats", document)
    assert "7 experts, top 6, int4, mxfp4, routing balanced" in page
    assert "| precision | format | tokens | " in page
    assert "| bound | vs int4 |" in page
    assert "| int4 | 3 | " in page
    assert " | 1.00 |\n" in page
