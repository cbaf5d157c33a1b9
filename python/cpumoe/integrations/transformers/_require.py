"""Checks for a version of transformers that this integration supports."""

import re
from importlib import metadata

from cpumoe.integrations.host_versions import TRANSFORMERS_MAJOR as MAJOR
from cpumoe.integrations.host_versions import TRANSFORMERS_MINORS as MINORS

_PACKAGES = ("transformers", "accelerate", "compressed-tensors")
_INSTALL = 'pip install "cpumoe[transformers]"'


def require_transformers() -> None:
    """Checks that the extra's packages are installed, before a nested import fails.

    Raises:
        ImportError: a package is missing, or the version of transformers is not supported. The
            attribute ``name`` has the package.
    """
    try:
        version = {package: metadata.version(package) for package in _PACKAGES}["transformers"]
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"running models needs the package {error.name}: {_INSTALL}", name=error.name
        ) from None
    if _version_pair(version) not in [(MAJOR, minor) for minor in MINORS]:
        raise ImportError(
            f"running models needs transformers {MAJOR}.{MINORS[0]} to {MAJOR}.{MINORS[-1]}, "
            f"got {version}: {_INSTALL}",
            name="transformers",
        )


def _version_pair(version: str) -> tuple[int, int]:
    """Returns major and minor number of a PEP 440 version: ``(5, 24)`` for 5.24rc1."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
