"""Prints constraints for the lowest allowed version of each requirement.

python lowest.py build pyproject.toml    of the build system's requirements
python lowest.py wheel FILE.whl          of a wheel's dependencies and those of all its extras
"""

import re
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement


def build_requirements(project: Path) -> list[str]:
    """The requirements of the build system; read without tomllib, which Python 3.10 lacks."""
    (line,) = re.findall(r"^requires = \[(.+)\]$", project.read_text(), re.MULTILINE)
    return re.findall(r'"([^"]+)"', line)


def wheel_requirements(wheel: Path, *, of_extras: bool) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        texts = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return [text for text in texts if ("extra ==" in text) == of_extras]


def lowest(text: str) -> str:
    """``name==version`` for a requirement's lower bound, which it must have."""
    requirement = Requirement(text)
    bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"{text}: expected one lower bound, got {len(bounds)}")
    return f"{requirement.name}=={bounds[0]}"


def main(part: str, path: str) -> None:
    if part == "build":
        texts = build_requirements(Path(path))
    else:
        texts = wheel_requirements(Path(path), of_extras={"core": False, "extras": True}[part])
    print(*(lowest(text) for text in texts), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
