"""The one place that says which transformers this integration is made for."""

from importlib import metadata

# Internals of the host are used (quantizers, experts modules), which change between minor versions.
_OLDEST = (5, 23)
_NEWEST = (5, 24)
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
    parts = tuple(int(part) for part in version.split(".")[:2])
    if not _OLDEST <= parts < _NEWEST:
        wanted = ".".join(map(str, _OLDEST))
        raise ImportError(
            f"running models needs transformers {wanted}.x, got {version}: {_INSTALL}",
            name="transformers",
        )
