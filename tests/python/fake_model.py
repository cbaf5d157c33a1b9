"""A scriptable model, and the command line with it in place of a real one."""

import contextlib
import dataclasses
import sys
import threading
import time

from cpumoe.text.generation import Generation, Piece, Prompt, TokenLogprob
from cpumoe.text.stop_strings import StopStrings


class FakeModel:
    """Counts: the text is " 1 2 3 …" up to its end; a token is a word, or a prompt's character.

    Attributes:
        end: where the text ends by itself.
        delay: seconds per generated token.
        fails_at: the token at which it breaks.
        prompts: all that it was asked to continue.
        samplings: how.
        chats: conversations as it was asked to encode them, with tools and template arguments.
        reply: pieces that it generates instead of counting.
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
        self.chats = []
        self.reply = None
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
        self.chats.append((list(messages), list(tools), dict(template_arguments or {})))
        return self.encode("\n".join(f"{m['role']}: {m['content']}" for m in messages))

    def generate(self, prompt, sampling, *, on_piece=None, cancelled=None):
        with self._alone():
            if "impossible" in (sampling.json_schema or ""):
                raise ValueError("json_schema: this one is impossible")
            self.prompts.append(self.decode(prompt.tokens))
            self.samplings.append(sampling)
            self.started.set()
            return self._count(prompt.tokens, sampling, on_piece or (lambda _: None), cancelled)

    def _count(self, prompt, sampling, on_piece, cancelled):
        room = self.context_length - len(prompt)
        limit = room if sampling.max_new_tokens is None else sampling.max_new_tokens
        if not 0 < len(prompt) <= self.context_length - (limit > 0):
            raise ValueError(f"prompt: expected fewer than {self.context_length} tokens")
        cut = StopStrings(sampling.stop)
        pieces, reason, token = [], "length", 0

        def add(piece, tokens=1):
            pieces.append(dataclasses.replace(piece, tokens=tokens))
            if piece:
                on_piece(pieces[-1])

        while token < limit:
            token += 1
            time.sleep(self.delay)
            if token == self.fails_at:
                raise RuntimeError("a secret of the implementation")
            piece = self._piece(token, sampling)
            if piece is None:
                reason = "stop"
                break
            add(dataclasses.replace(piece, text=cut.feed(piece.text)))
            if cut.found:
                reason = "stop"
                break
            if cancelled and cancelled():
                self.cancellations += 1
                reason = "cancelled"
                break
        add(Piece(cut.flush()), tokens=0)
        logprobs = tuple(token for piece in pieces for token in piece.logprobs)
        return Generation(
            "".join(piece.text for piece in pieces),
            reason,
            len(prompt),
            token,
            0.0,
            0.0,
            0.0,
            reasoning="".join(piece.reasoning for piece in pieces),
            tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
            logprobs=None if sampling.logprobs is None else logprobs,
            prompt_logprobs=_prompt_logprobs(prompt, sampling.prompt_logprobs),
        )

    def _piece(self, token, sampling):
        """Returns the text of a token; None: it is the end token."""
        end = self.end if self.reply is None else len(self.reply)
        if token > max(end, sampling.min_tokens) and not sampling.ignore_eos:
            return None
        piece = Piece(f" {token}") if self.reply is None else self.reply[token - 1]
        if sampling.logprobs is None:
            return piece
        return dataclasses.replace(
            piece, logprobs=(token_logprob(token, piece.text, sampling.logprobs),)
        )


def token_logprob(token, text, alternatives):
    """A made-up log probability: the higher a token's number, the less probable it is."""
    others = [TokenLogprob(n, f"<{n}>", b"<%d>" % n, -n / 10) for n in range(alternatives)]
    return TokenLogprob(token, text, text.encode(), -token / 10, tuple(others))


def _prompt_logprobs(prompt, alternatives):
    if alternatives is None:
        return None
    first, *rest = (token_logprob(token, chr(token), alternatives) for token in prompt)
    return (dataclasses.replace(first, logprob=None, top=()), *rest)


def use_fake_model(**options):
    """Makes commands use a `FakeModel` instead of loading a model."""
    from cpumoe.cli import chat, serve

    model = FakeModel(**options)
    for command in (chat, serve):
        command.load_text_model = lambda *_, **__: model


def main():
    """``cpumoe`` with a fake model, as a process: python fake_model.py DELAY END ARGUMENTS."""
    from cpumoe import cli

    use_fake_model(delay=float(sys.argv[1]), end=int(sys.argv[2]))
    sys.argv[:3] = ["cpumoe"]
    cli.main()


if __name__ == "__main__":
    main()
