"""Measures the peak memory of a piece of code. Tests put this before their scripts."""

import threading


def anonymous_bytes():
    """Anonymous memory. Mapped pages of files do not count, because the system can drop them."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


class PeakMemory:
    """Samples the anonymous memory while it is open."""

    def __enter__(self):
        self.before = self.bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    def _watch(self):
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes())
