"""cpumoe's results depend on no setting of the process; see settings_script.py."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import settings_script
import tiny_models

import cpumoe

FAMILIES = ("deepseek_v4", "gpt_oss")
PACKAGE = Path(cpumoe.__file__).parent
# Functions whose new tensors are on the default device, and those in the default dtype.
FLOATING = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "zeros"}
MAKERS = FLOATING | {"arange", "as_tensor", "randint", "randperm", "tensor"}
# These compute powers of two in the default dtype.
THROUGH_THE_DEFAULT_DTYPE = {"ldexp"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        (root / family).mkdir()
        tiny_models.FAMILIES[family].write(root / family)
    script = Path(settings_script.__file__)
    done = subprocess.run(
        [sys.executable, script, root], capture_output=True, text=True, timeout=300, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["setting"]: line for line in found}


@pytest.mark.parametrize("setting", settings_script.SETTINGS)
def test_importing_and_computing_depends_on_no_setting(lines, setting):
    line = lines[setting]
    assert "error" not in line, line["error"]
    computed, expected = line["computed"], dict(lines["nothing"]["computed"])
    if setting == "autocast, three threads":  # transformers' sums depend on both
        expected |= {family: computed[family] for family in FAMILIES}
    assert computed == expected
    assert "not finite" not in computed.values()


def calls_of_torch(tree):
    """Name and keywords of each call of `torch.something`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                yield node.func.attr, {word.arg for word in node.keywords}, node.lineno


def dependent_calls(text):
    """Lines of calls whose result depends on the default dtype or device."""
    for name, keywords, line in calls_of_torch(ast.parse(text)):
        needed = {"device"} if name in MAKERS else set()
        needed |= {"dtype"} if name in FLOATING else set()
        if name in THROUGH_THE_DEFAULT_DTYPE or needed - keywords:
            yield line


def test_new_tensors_say_their_dtype_and_device():
    found = {
        path.relative_to(PACKAGE).as_posix(): list(dependent_calls(path.read_text("utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_tensors_that_do_not_say_are_caught():
    text = (
        "torch.zeros(2, dtype=torch.int8)\ntorch.zeros(2, device='cpu')\ntorch.tensor([1])\n"
        "torch.ldexp(x, e)\ntorch.zeros_like(x)\ntorch.randn(2, dtype=d, device='cpu')\n"
    )
    assert list(dependent_calls(text)) == [1, 2, 3, 4]
