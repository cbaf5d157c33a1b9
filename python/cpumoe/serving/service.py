"""What the paths of one server share."""

from __future__ import annotations

from dataclasses import dataclass

from cpumoe.serving.body import BodyReader
from cpumoe.serving.errors import ApiError
from cpumoe.serving.settings import Settings
from cpumoe.serving.worker import Worker


@dataclass(frozen=True)
class Service:
    """A served model.

    Attributes:
        name: what clients call the model.
        context_length: tokens of prompt and answer together.
        created: when it came into service, in seconds since 1970.
        settings: the operator's.
        worker: runs the model.
        bodies: reads requests.
    """

    name: str
    context_length: int
    created: int
    settings: Settings
    worker: Worker
    bodies: BodyReader

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model than the one that is served.

        Raises:
            ApiError: names both.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
