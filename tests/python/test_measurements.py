"""docs/: the picture is what its tool makes of the checked-in measurements."""

import importlib.util
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

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
