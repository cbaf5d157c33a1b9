"""Versions of hosts that cpumoe knows. No host is imported."""

# Internals of these hosts are used, which change between minor versions. Each minor version was
# tried. pyproject.toml has equal bounds for transformers.
TRANSFORMERS_MAJOR = 5
TRANSFORMERS_MINORS = range(23, 25)
