"""Finds the strings that end a text while the text grows."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a growing text at the stop string that is complete first.

    If several end at one place, the longest counts, so the result does not depend on how the text
    is divided into pieces. Text that may be the beginning of a stop string is held back until it is
    certain.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Cuts at the strings of `stop`, which may be empty."""
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Takes the next piece of text; returns the text that has become certain."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [(text.find(stop), stop) for stop in self._stop]
        ends = [(at + len(stop), at) for at, stop in hits if at >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self, piece: str = "") -> str:
        """Takes the last piece of text; returns the rest of the text."""
        text = self.feed(piece)
        held, self._held = self._held, ""
        return text + held


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
