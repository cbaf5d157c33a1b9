"""A scriptable model, and the command line with it in place of a real one."""

import contextlib
import sys
import threading
import time

from cpumoe.generation import Generation, Piece, Prompt
from cpumoe.stop_strings import StopStrings


class FakeModel:
    """Counts: the text is " 1 2 3 …" up to its end; a token is a word, or a prompt's character.

    Attributes:
        end: where the text ends by itself.
        delay: seconds per generated token.
        fails_at: the token at which it breaks.
        prompts: all that it was asked to continue.
        samplings: how.
        cancellations: generations that were cut off.
    """

    name = "fake"
    context_length = 1000

    def __init__(self, end=5, delay=0.0):
        self.end = end
        self.delay = delay
        self.fails_at = None
        self.prompts = []
        self.samplings = []
        self.cancellations = 0
        self.started = threading.Event()
        self._busy = threading.Lock()

    @contextlib.contextmanager
    def _alone(self):
        assert self._busy.acquire(blocking=False), "the model is called by two threads at once"
        try:
            yield
        finally:
            self._busy.release()

    def encode(self, text, *, add_special_tokens=True):
        with self._alone():
            return Prompt(tuple(map(ord, text)))

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def encode_chat(self, messages, *, tools=(), template_arguments=None):
        if messages[-1]["role"] == "assistant":
            raise ValueError("the assistant spoke last")
        return self.encode("\n".join(f"{m['role']}: {m['content']}" for m in messages))

    def generate(self, prompt, sampling, *, on_piece=None, cancelled=None):
        with self._alone():
            self.prompts.append(self.decode(prompt.tokens))
            self.samplings.append(sampling)
            self.started.set()
            return self._count(prompt.tokens, sampling, on_piece or (lambda _: None), cancelled)

    def _count(self, prompt, sampling, on_piece, cancelled):
        if not 0 < len(prompt) < self.context_length:
            raise ValueError(f"prompt: expected fewer than {self.context_length} tokens")
        cut = StopStrings(sampling.stop)
        text, reason, token = "", "length", 0

        def add(piece):
            nonlocal text
            text += piece
            if piece:
                on_piece(Piece(piece))

        limit = sampling.max_new_tokens
        limit = self.context_length - len(prompt) if limit is None else limit
        while token < limit:
            token += 1
            time.sleep(self.delay)
            if token == self.fails_at:
                raise RuntimeError("a secret of the implementation")
            if token > self.end:
                reason = "stop"
                break
            add(cut.feed(f" {token}"))
            if cut.found:
                reason = "stop"
                break
            if cancelled and cancelled():
                self.cancellations += 1
                reason = "cancelled"
                break
        add(cut.flush())
        return Generation(text, reason, len(prompt), token, 0.0, 0.0, 0.0)


def main():
    """``cpumoe`` with a fake model, as a process: python fake_model.py DELAY END ARGUMENTS."""
    from cpumoe import cli
    from cpumoe.cli import chat, serve

    model = FakeModel(delay=float(sys.argv[1]), end=int(sys.argv[2]))
    for command in (chat, serve):
        command.load_text_model = lambda *_, **__: model
    sys.argv[:3] = ["cpumoe"]
    cli.main()


if __name__ == "__main__":
    main()
