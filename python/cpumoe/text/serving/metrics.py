"""Metrics of requests, for Prometheus.

Metrics have the names of vLLM's and SGLang's, after this server's prefix.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from cpumoe.text.generation import Generation
from cpumoe.text.serving.errors import ApiError
from cpumoe.text.serving.worker import Observer, Worker

_PREFIX = "cpumoe:"
_WAIT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_ANSWER_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)

_QUEUE_TIME = "request_queue_time_seconds"
_FIRST_TOKEN = "time_to_first_token_seconds"
_TOKEN_TIME = "time_per_output_token_seconds"
_LATENCY = "e2e_request_latency_seconds"
_HISTOGRAMS = (
    (_QUEUE_TIME, "Time in the queue.", _WAIT_SECONDS),
    (_FIRST_TOKEN, "Time from queueing a text to its first token.", _WAIT_SECONDS),
    (_TOKEN_TIME, "Mean time of a text's tokens after the first.", _TOKEN_SECONDS),
    (_LATENCY, "Time from queueing a text to its end.", _ANSWER_SECONDS),
)


def has_metrics() -> bool:
    """Whether the Prometheus client library is installed."""
    return importlib.util.find_spec("prometheus_client") is not None


class Metrics(Observer):
    """Counts in its own registry, with the Prometheus client library."""

    def __init__(self, worker: Worker, model_name: str) -> None:
        """Prepares the metrics of a server.

        Args:
            worker: the worker whose queue is reported.
            model_name: label of all metrics, as in vLLM.
        """
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            ProcessCollector,
        )

        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def make(kind: Any, name: str, help: str, *labels: str, **options: Any) -> Any:
            metric = kind(
                _PREFIX + name, help, ["model_name", *labels], registry=self._registry, **options
            )
            return metric if labels else metric.labels(model_name)

        make(Gauge, "num_requests_running", "Texts that are being generated.").set_function(
            lambda: worker.running
        )
        make(Gauge, "num_requests_waiting", "Texts that wait for their turn.").set_function(
            lambda: worker.waiting
        )
        self._prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = make(Counter, "generation_tokens", "Tokens generated.")
        self._successes = make(
            Counter, "request_success", "Texts that were finished.", "finished_reason"
        )
        self._errors = make(Counter, "request_errors", "Errors that clients got.", "code")
        self._histograms = {
            name: make(Histogram, name, help, buckets=buckets)
            for name, help, buckets in _HISTOGRAMS
        }
        self._model_name = model_name

    def ended(self, result: object, waited_seconds: float, total_seconds: float) -> None:
        """Counts a text; see the base class."""
        if not isinstance(result, Generation):
            return
        self._prompt_tokens.inc(result.prompt_tokens)
        self._generation_tokens.inc(result.completion_tokens)
        self._successes.labels(self._model_name, result.finish_reason).inc()
        self._histograms[_QUEUE_TIME].observe(waited_seconds)
        self._histograms[_LATENCY].observe(total_seconds)
        if result.completion_tokens > 0:
            self._histograms[_FIRST_TOKEN].observe(total_seconds - result.decode_seconds)
        if result.completion_tokens > 1:
            seconds = result.decode_seconds / (result.completion_tokens - 1)
            self._histograms[_TOKEN_TIME].observe(seconds)

    def failed(self, error: ApiError) -> None:
        """Counts an error; see the base class."""
        self._errors.labels(self._model_name, error.code or "invalid_request").inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Returns all metrics and their media type, one of those that `accept` admits."""
        from prometheus_client.exposition import choose_encoder

        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type
