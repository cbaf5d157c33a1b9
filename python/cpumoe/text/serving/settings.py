"""The operator's settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_QUEUE = 16
DEFAULT_MAX_REQUEST_BYTES = 8 << 20
DEFAULT_GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """A server's name and limits.

    Attributes:
        served_model_name: the model's name for clients; None: the checkpoint's name.
        api_key: the key that clients must send; None: clients need none.
        queue: the most requests that wait while one runs; further ones are refused.
        max_tokens: the most new tokens per request; None: as many as the context has room for.
        max_request_bytes: the most bytes of a request's body.

    Raises:
        ValueError: a value is out of its range.
    """

    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    queue: int = DEFAULT_QUEUE
    max_tokens: int | None = None
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ValueError("served model name: expected at least one character, got none")
        # A client without a key could present an empty one.
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api key: expected at least one character, got none")
        if self.queue < 0:
            raise ValueError(f"queue: expected 0 or more, got {self.queue}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max tokens: expected 1 or more, got {self.max_tokens}")
        if self.max_request_bytes < 1:
            raise ValueError(f"max request bytes: expected 1 or more, got {self.max_request_bytes}")
