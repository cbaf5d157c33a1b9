"""Log probabilities of tokens, by the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpumoe.integrations.transformers.vocabulary import Vocabulary
from cpumoe.text.generation import TokenLogprob


class LogprobRecorder:
    """A logits processor that remembers the logits by which the next token is chosen.

    It is the first processor, so its probabilities are the model's. Temperature, penalties and all
    that narrows the choice follow.
    """

    def __init__(self, vocabulary: Vocabulary, count: int) -> None:
        """Records log probabilities, with `count` most probable alternatives for each token."""
        self._vocabulary = vocabulary
        self._count = count
        self._logits: torch.Tensor | None = None

    def __call__(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Takes logits ``[1, vocabulary]``, and returns them unchanged."""
        self._logits = logits
        return logits

    def take(self, token: int) -> TokenLogprob:
        """Returns the log probability of the token that was chosen by the last logits."""
        assert self._logits is not None
        rows = logprob_rows(self._vocabulary, self._logits, [token], self._count)
        self._logits = None
        return rows[0]


def logprob_rows(
    vocabulary: Vocabulary, logits: torch.Tensor, tokens: Sequence[int], count: int
) -> list[TokenLogprob]:
    """Returns the log probability of each token.

    Args:
        vocabulary: the tokens of the model.
        logits: ``[rows, vocabulary]``, of any floating point dtype.
        tokens: the token of each row.
        count: number of alternatives for each token.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device="cpu")[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    return [
        token_logprob(
            vocabulary,
            token,
            logprob,
            tuple(
                token_logprob(vocabulary, other, value)
                for other, value in zip(others, best, strict=True)
            ),
        )
        for token, logprob, others, best in zip(
            tokens, chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]


def token_logprob(
    vocabulary: Vocabulary,
    token: int,
    logprob: float | None,
    top: tuple[TokenLogprob, ...] = (),
) -> TokenLogprob:
    """Returns a token with its log probability."""
    raw = vocabulary.token_bytes(token)
    return TokenLogprob(token, raw.decode("utf-8", "replace"), raw, logprob, top)
