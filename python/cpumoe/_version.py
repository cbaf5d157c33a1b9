"""The version of the package."""

from __future__ import annotations


def package_version() -> str:
    """Returns the installed version, or "unknown" when run from a source tree."""
    # Imported here because it takes longer than the rest of the command line.
    from importlib import metadata

    try:
        return metadata.version("cpumoe")
    except metadata.PackageNotFoundError:
        return "unknown"
