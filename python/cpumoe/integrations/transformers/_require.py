"""The one place that says which transformers this integration is made for."""

import re
from importlib import metadata

# Internals of the host are used (quantizers, experts modules), which change between minor versions:
# each of these has been tried. pyproject.toml has the same bounds.
MAJOR = 5
MINORS = range(23, 25)
_PACKAGES = ("transformers", "accelerate", "compressed-tensors")
_INSTALL = 'pip install "cpumoe[transformers]"'


def require_transformers() -> None:
    """Checks that the extra's packages are there, before a deep import fails on one.

    Raises:
        ImportError: one is missing, or transformers is another version; its name is the package's.
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
    """Returns major and minor number of a version as PEP 440 has it: ``(5, 24)`` of 5.24rc1."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
