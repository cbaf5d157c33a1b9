"""The allowed versions of transformers. tests/transformers_versions.sh tests them."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from cpumoe.integrations.transformers import _require

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def installed(monkeypatch):
    """Sets the version that transformers says it has."""
    real = metadata.version

    def pretend(version):
        monkeypatch.setattr(
            metadata, "version", lambda name: version if name == "transformers" else real(name)
        )

    return pretend


def test_the_extras_bounds_are_those_that_are_checked():
    lowest, above = re.search(r'"transformers>=5\.(\d+),<5\.(\d+)"', PYPROJECT.read_text()).groups()
    assert range(int(lowest), int(above)) == _require.MINORS


@pytest.mark.parametrize("version", ["5.23.0", "5.23.7", "5.24.0", "5.24.1.dev0", "5.24rc1"])
def test_tried_versions_are_allowed(installed, version):
    installed(version)
    _require.require_transformers()


@pytest.mark.parametrize("version", ["4.57.6", "5.22.2", "5.25.0", "5.25rc1", "6.23.0", "main"])
def test_other_versions_are_refused_by_name(installed, version):
    installed(version)
    message = rf"^running models needs transformers 5\.23 to 5\.24, got {version}: pip install"
    with pytest.raises(ImportError, match=message):
        _require.require_transformers()
