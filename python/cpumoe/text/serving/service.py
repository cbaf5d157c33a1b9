"""The common objects of a server's paths."""

from __future__ import annotations

from dataclasses import dataclass

from cpumoe.text.serving.body import BodyReader
from cpumoe.text.serving.errors import ApiError
from cpumoe.text.serving.settings import Settings
from cpumoe.text.serving.worker import Worker


@dataclass(frozen=True)
class Service:
    """A served model.

    Attributes:
        name: the model's name for clients.
        context_length: the most tokens of prompt and answer together.
        created: start of the service, in seconds since 1970.
        settings: the operator's settings.
        worker: runs the model.
        bodies: reads the bodies of requests.
    """

    name: str
    context_length: int
    created: int
    settings: Settings
    worker: Worker
    bodies: BodyReader

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model than the served one.

        Raises:
            ApiError: `name` is another model; the message names both.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
