"""The direction of imports in Python.

_base <- formats <- numerics <- checkpoint <- {_engine, models}
_engine <- product <- measure
{_base, numerics} <- text <- serving
product <- distributed
{product, text, distributed} <- integrations
all of them <- cli

The product is the modules at the top of the package.
"""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / "python"

HOSTS = {"transformers", "vllm", "sglang"}
SERVERS = {"fastapi", "starlette", "uvicorn", "pydantic", "httpx2", "openai"}
_CORE = {"_core", "_base", "formats", "numerics", "checkpoint"}
_PRODUCT = {*_CORE, "_engine", "product"}
# What each room may import, besides itself: rooms, and packages that not every room may import.
# The extension module is a room of its own, `_core`.
MAY_IMPORT = {
    "_core": set(),
    "_base": set(),
    "formats": {"_base"},
    "numerics": {"_base", "formats"},
    "checkpoint": {"_base", "formats", "numerics"},
    "_engine": _CORE,
    "models": _CORE - {"_core"},
    "embedded": set(),
    "product": _PRODUCT,
    "measure": {*_PRODUCT, "models"},
    "text": {"_base", "numerics"},
    "serving": {"_base", "text", *SERVERS - {"openai"}},
    "distributed": _PRODUCT,
    "integrations": {*_PRODUCT, "distributed", "embedded", "text", *HOSTS},
    "entry": {*_PRODUCT, "models", "text"},
    "cli": {*_PRODUCT, "models", "embedded", "measure", "text", "serving", "integrations"}
    | {"distributed"}
    | {"typer", *HOSTS, *SERVERS},
}
RESTRICTED = {"typer", *HOSTS, *SERVERS}
# Modules at the top of the package that only pass on what other rooms have.
ENTRIES = {"__init__", "generation"}


def package_sources():
    """Dotted name of each module -> its text."""
    modules = {}
    for path in sorted(PYTHON.rglob("*.py")):
        parts = path.relative_to(PYTHON).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = (path.read_text("utf-8"), path.stem == "__init__")
    return modules


def room_of(module: str) -> str:
    """The room of a module of cpumoe, or the name of another package if it is restricted."""
    parts = module.split(".")
    if parts[0] != "cpumoe":
        return parts[0]
    if len(parts) == 1:
        return "entry"
    if parts[1:3] == ["text", "serving"]:
        return "serving"
    if parts[1] == "__main__":
        return "cli"
    if parts[1] in ENTRIES:
        return "entry"
    return parts[1] if parts[1] in MAY_IMPORT else "product"


def imports(name: str, text: str, is_package: bool, lazy: bool = True) -> Iterator[str]:
    """Full names of the modules and members that a module imports.

    Without `lazy`, only those that importing the module itself imports.
    """
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in _statements(ast.parse(text), lazy):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(chain(base, [node.module] if node.module else []))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    if lazy:
        yield from ast.walk(tree)
        return
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _statements(node, lazy)


def import_violations(modules):
    found = []
    for name, (text, is_package) in modules.items():
        room = room_of(name)
        for target in imports(name, text, is_package):
            other = room_of(target)
            restricted = target.startswith("cpumoe") or other in RESTRICTED
            if target in ("cpumoe", "cpumoe.__version__") or other == room or not restricted:
                continue
            if other not in MAY_IMPORT[room]:
                found.append(f"{name} ({room}) imports {target}")
    return found


def test_rooms():
    modules = package_sources()
    assert "cpumoe.experts" in modules
    assert {room_of(name) for name in modules} == MAY_IMPORT.keys() - {"_core"}
    assert import_violations(modules) == []


@pytest.mark.parametrize(
    "line",
    [
        "import cpumoe.cli",
        "from cpumoe.cli import main",
        "from cpumoe import cli",
        "from . import cli",
        "from .cli.app import main",
        "def f():\n    import transformers.models",
        "def f():\n    from fastapi import FastAPI",
    ],
)
def test_violations_of_the_product_are_caught(line):
    assert len(import_violations({"cpumoe.experts": (line, False)})) == 1


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("cpumoe.cli.app", "import typer\nfrom cpumoe import Experts", True),
        ("cpumoe.integrations.vllm", "import vllm", True),
        ("cpumoe.integrations.vllm", "from ..cli import app", False),
        ("cpumoe.text.serving.app", "import fastapi\nfrom cpumoe.text import generation", True),
        ("cpumoe.text.serving.app", "def f():\n    from transformers import x", False),
        ("cpumoe.text.generation", "from cpumoe.text.serving import app", False),
        ("cpumoe.formats.fp3", "from cpumoe._engine import packing", False),
        ("cpumoe.numerics.bounds", "from cpumoe import _core", False),
        ("cpumoe._engine.packing", "from cpumoe.runtime import Runtime", False),
    ],
)
def test_rules(module, line, allowed):
    assert (import_violations({module: (line, False)}) == []) == allowed


def import_graph(modules):
    """Each module -> the modules that it imports, inside of functions too.

    Packages on the way are left out. A package that hands names on, such as `cpumoe`, imports them
    when they are used; that is no cycle.
    """
    graph = {}
    for name, (text, is_package) in modules.items():
        targets = set()
        for target in imports(name, text, is_package, lazy=not is_package):
            if room_of(target) == "_core":
                continue
            known = target if target in modules else target.rpartition(".")[0]
            if known in modules and known != name:
                targets.add(known)
        graph[name] = targets
    return graph


def cycle(graph):
    """Modules that import each other in a ring, or nothing."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        found = next((ring for target in sorted(graph[name]) if (ring := visit(target))), [])
        path.pop()
        done.add(name)
        return found

    return next((ring for name in sorted(graph) if (ring := visit(name))), [])


def test_no_import_cycle():
    assert cycle(import_graph(package_sources())) == []


def test_a_cycle_is_caught():
    modules = {
        "cpumoe.a": ("from cpumoe.b import f", False),
        "cpumoe.b": ("from cpumoe import c", False),
        "cpumoe.c": ("class C:\n    import cpumoe.a", False),
        "cpumoe.d": ("def f():\n    import cpumoe.e", False),
        "cpumoe.e": ("import cpumoe.c", False),
    }
    assert cycle(import_graph(modules | {"cpumoe": ("", True)})) == [
        "cpumoe.a",
        "cpumoe.b",
        "cpumoe.c",
    ]


def test_addresses_come_from_the_gate_only():
    asking = [
        name
        for name, (text, _) in package_sources().items()
        if re.search(r"data_ptr\(", text)
        and room_of(name) not in ("integrations", "cli", "serving")
    ]
    assert asking == ["cpumoe._base.tensors"]
