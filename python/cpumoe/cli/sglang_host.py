"""The installed SGLang, and the command lines that it takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cpumoe.cli.errors import InputError

_Number = TypeVar("_Number", int, float)

UPSTREAM, FORK = "sglang", "sglang-kt"
# The versions that cpumoe is written for.
TESTED = {UPSTREAM: "0.5.23", FORK: "0.7.2"}

# Options that only sglang-kt has. Without them, the server computes as much, but slower.
_FORK_ONLY = (
    "--kt-numa-nodes",
    "--kt-gpu-prefill-token-threshold",
    "--kt-enable-dynamic-expert-update",
    "--kt-expert-placement-strategy",
    "--record-kt-gpu-expert-distribution",
)
# Options of the command `kt run`, and their names in both SGLangs.
NAMES_OF_KT = {
    "--gpu-experts": "--kt-num-gpu-experts",
    "--cpu-threads": "--kt-cpuinfer",
    "--weights-path": "--kt-weight-path",
    "--kt-gpu-prefill-threshold": "--kt-gpu-prefill-token-threshold",
}
# Options of sglang-kt, and their names in SGLang.
_NAMES_UPSTREAM = {
    "--cuda-graph-bs": "--cuda-graph-bs-decode",
    "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode",
}

# SGLang takes shortened options. Option -> its shortest form that is unique in both SGLangs.
_SHORTEST = {
    "--device": "--dev",
    "--disable-shared-experts-fusion": "--disable-s",
    "--kt-cpuinfer": "--kt-c",
    "--kt-expert-lora-path": "--kt-expert-l",
    "--kt-gpu-experts-ratio": "--kt-gpu-e",
    "--kt-method": "--kt-me",
    "--kt-num-gpu-experts": "--kt-num-",
    "--kt-numa-nodes": "--kt-numa",
    "--kt-threadpool-count": "--kt-t",
    "--kt-weight-path": "--kt-w",
    "--mem-fraction-static": "--mem",
    "--model-path": "--model-p",
    "--speculative-algorithm": "--speculative-al",
    "--tensor-parallel-size": "--te",
    "--tp-size": "--tp-",
}
# Names that SGLang has, or takes, although longer ones begin with them.
_SHORT_NAMES = ("--model", "--tp")


@dataclass(frozen=True)
class Host:
    """An installed SGLang.

    Attributes:
        name: "sglang" or "sglang-kt".
        version: its version.
    """

    name: str
    version: str


def installed_host() -> Host | None:
    """Returns the SGLang of this environment; None: there is none."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    # Both distributions have the package `sglang`. Only SGLang itself has plugins.
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    name = UPSTREAM if any((f / "srt" / "plugins").is_dir() for f in folders) else FORK
    try:
        return Host(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Host(name, "unknown")


class Options:
    """Options of SGLang's command line, as the user gave them.

    Args:
        words: the words of the command line. Names of `kt run` become those of SGLang, and
            shortened names that the plan needs become whole.

    Raises:
        InputError: the first word is no option, or a shortened name may stand for several.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Splits the words into options, each with its values."""
        self._groups: list[list[str]] = []
        for word in words:
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                name = NAMES_OF_KT.get(name) or _whole(name)
                self._groups.append([name, value] if equals else [name])
            elif self._groups:
                self._groups[-1].append(word)
            else:
                raise InputError(f"expected an option of SGLang, got {word!r}")

    def words(self) -> list[str]:
        """Returns the command line."""
        return [word for group in self._groups for word in group]

    def has(self, *names: str) -> bool:
        """Whether the user gave an option, which may have several names."""
        return any(group[0] in names for group in self._groups)

    def text(self, *names: str) -> str | None:
        """Returns an option's value; None: it was not given.

        Raises:
            InputError: the option has no value.
        """
        values = [group for group in self._groups if group[0] in names]
        if not values:
            return None
        if len(values[-1]) != 2:
            raise InputError(f"{values[-1][0]}: expected one value, got {len(values[-1]) - 1}")
        return values[-1][1]

    def integer(self, *names: str, least: int = 0, most: int | None = None) -> int | None:
        """Returns an option's value from `least` to `most`; None: it was not given.

        Raises:
            InputError: the value is no such integer.
        """
        end = "on" if most is None else f"to {most}"
        limit = math.inf if most is None else most
        return self._number(names, int, least, limit, f"an integer from {least} {end}")

    def integers(self, *names: str) -> list[int] | None:
        """Returns an option's values from 0 on, in words or separated by commas; None: not given.

        Raises:
            InputError: there is no value, or one is no such integer.
        """
        given = [group for group in self._groups if group[0] in names]
        if not given:
            return None
        words = " ".join(given[-1][1:]).replace(",", " ").strip("[] ").split()
        if not words or not all(word.isascii() and word.isdecimal() for word in words):
            raise InputError(
                f"{names[0]}: expected integers from 0 on, got {' '.join(given[-1][1:])!r}"
            )
        return [int(word) for word in words]

    def share(self, *names: str) -> float | None:
        """Returns an option's value from 0 to 1; None: it was not given.

        Raises:
            InputError: the value is no such number.
        """
        return self._number(names, float, 0, 1, "a number from 0 to 1")

    def take(self, *names: str) -> list[str]:
        """Removes options, and returns them as text."""
        taken = [" ".join(group) for group in self._groups if group[0] in names]
        self._groups = [group for group in self._groups if group[0] not in names]
        return taken

    def fit(self, host: Host) -> list[str]:
        """Leaves out, or renames, what the host does not have, and returns what was done."""
        if host.name != UPSTREAM:
            return []
        done = [
            f"left out {text}: only sglang-kt has this option" for text in self.take(*_FORK_ONLY)
        ]
        for group in self._groups:
            name = _NAMES_UPSTREAM.get(group[0])
            if name is not None:
                done.append(f"{group[0]} became {name}, as SGLang calls this option")
                group[0] = name
        return done

    def _number(
        self,
        names: tuple[str, ...],
        kind: Callable[[str], _Number],
        least: int,
        most: float,
        expected: str,
    ) -> _Number | None:
        text = self.text(*names)
        if text is None:
            return None
        value: _Number | None
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # nor NaN
            raise InputError(f"{names[0]}: expected {expected}, got {text!r}")
        return value


def _whole(name: str) -> str:
    """The option that a shortened name stands for, if the plan needs this option."""
    options = [option for option in _SHORTEST if option.startswith(name)]
    if not options or name in _SHORT_NAMES:
        return name
    if len(options) == 1 and name.startswith(_SHORTEST[options[0]]):
        return options[0]
    raise InputError(
        f"{name}: expected the whole name of an option, got the start of {', '.join(options)}"
    )
