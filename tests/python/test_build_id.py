"""One version for everything that is built, and variant libraries of another build are refused."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from cli_tools import read
from moe_tools import output_with_torch

import cpumoe
from cpumoe import _core

ROOT = Path(__file__).parents[2]
BEST = cpumoe.supported_isas()[-1]
STALE_ID = "0.0.9+0123456789abcdef"

# Runs commands of the package in the folder that the first argument names. Finders of an editable
# installation, which are objects, would find the sources instead.
SCRIPT = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if isinstance(finder, type)]
sys.path.insert(0, sys.argv[1])
from typer.testing import CliRunner
from cpumoe import _core
from cpumoe.cli import app

def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr

quick = ("--experts", "2", "--tokens", "1", "--seconds", "0.01", "--rounds", "1")
report = {"info": run("info"), "json": run("info", "--json"), "bench": run("bench", *quick)}
try:
    _core.open_variant("generic", "test")
    report["generic"] = "opened"
except _core.VariantError as error:
    report["generic"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture
def stale_package(tmp_path):
    """A package whose best variant has another build id; everything else is the installed one."""
    package = tmp_path / "cpumoe"
    package.mkdir()
    library = f"cpumoe_{BEST}.so"
    for folder in {Path(cpumoe.__file__).parent, Path(_core.__file__).parent}:
        for entry in folder.iterdir():
            if entry.name != library:
                (package / entry.name).symlink_to(entry)
    content = (Path(_core.__file__).parent / library).read_bytes()
    stale_id = STALE_ID.encode().ljust(len(_core.build_id()), b"\0")
    stale = content.replace(_core.build_id().encode(), stale_id)
    assert stale != content
    (package / library).write_bytes(stale)
    return package


def test_library_of_another_build_is_refused_by_name(stale_package, monkeypatch):
    monkeypatch.delenv("CPUMOE_ISA", raising=False)
    report = json.loads(output_with_torch(SCRIPT, str(stale_package.parent)))
    error = (
        f"{stale_package}/cpumoe_{BEST}.so has build id {STALE_ID}, expected {_core.build_id()}: "
        "it is from another build of cpumoe; reinstall cpumoe"
    )
    for code, _, stderr in (report["info"], report["json"], report["bench"]):
        assert (code, stderr) == (2, f"error: {error}\n")
    assert "unusable" in report["info"][1]
    document = json.loads(report["json"][1])
    variants = {row["name"]: row for row in document["isa"]["variants"]}
    assert (document["isa"]["in_use"], document["read_bandwidth"]) == (None, None)
    assert variants[BEST]["problem"] == error
    assert report["bench"][1] == ""
    assert report["generic"] == (error if BEST == "generic" else "opened")


def test_the_version_has_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert cpumoe.__version__ == version
    try:
        installed = metadata.version("cpumoe")
    except metadata.PackageNotFoundError:
        installed = version
    assert installed == version
    others = [*(ROOT / "cmake").iterdir(), *(ROOT / "cpp").rglob("*.*"), ROOT / "CMakeLists.txt"]
    others += (ROOT / "python").rglob("*.py*")
    texts = {path: path.read_text() for path in others if path.suffix not in (".so", ".pyc")}
    assert [str(path) for path, text in texts.items() if f'"{version}"' in text] == []


def test_build_id_is_the_version_and_a_hash():
    pattern = re.escape(cpumoe.__version__) + r"\+[0-9a-f]{16}"
    assert re.fullmatch(pattern, _core.build_id())


@pytest.mark.usefixtures("quick_commands")
def test_info_tells_the_build_id():
    assert read("info")["build_id"] == _core.build_id()
