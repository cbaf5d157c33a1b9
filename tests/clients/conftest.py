"""The server's address, and a count of calls that passed."""

import os

import pytest


@pytest.fixture(scope="session")
def url():
    """Address of a running ``cpumoe serve``, without /v1."""
    return os.environ["CPUMOE_URL"]


@pytest.fixture(scope="session")
def model():
    return os.environ["CPUMOE_MODEL"]


@pytest.fixture
def conversation(request):
    """A unique conversation, so that no client answers it from a cache."""
    return [{"role": "user", "content": f"Tell me of the sea ({request.node.name})."}]


def pytest_terminal_summary(terminalreporter):
    counts = {
        outcome: len(terminalreporter.getreports(outcome)) for outcome in ("passed", "failed")
    }
    failed = counts["failed"] + len(terminalreporter.getreports("error"))
    terminalreporter.write_line(f"clients: {counts['passed']} calls passed, {failed} failed")
