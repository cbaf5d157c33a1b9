"""The output of a process, line by line, with a limit for each wait."""

from __future__ import annotations

import queue
import subprocess
import threading


def lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """Returns a queue that a thread fills with a process's lines; None is their end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines
