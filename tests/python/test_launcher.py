"""What a launcher's variables say, and errors where they are wrong or no other rank comes."""

import inspect
import re
import socket

import pytest
from moe_tools import refused

from cpumoe._base import launcher, openmp
from cpumoe._base.launcher import check_launcher, own_rank, started_as_rank
from cpumoe.cli import host_threads
from cpumoe.distributed import RanksError, join, ranks

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
REMEDY = "a launcher such as torchrun sets this variable"


def test_a_launchers_variables_are_read():
    check_launcher(GOOD)
    assert started_as_rank(GOOD)
    assert own_rank(GOOD) == 1
    for alone in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""}, {"RANK": "3"}):
        assert not started_as_rank(alone)
        assert own_rank(alone) == 0
    assert started_as_rank({"WORLD_SIZE": "2"})  # so that the missing RANK is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "RANK: expected this process' number among the ranks, 0 to 1, got none"),
        ({"RANK": ""}, "RANK: expected this process' number among the ranks, 0 to 1, got ''"),
        ({"RANK": "2"}, "RANK: expected this process' number among the ranks, 0 to 1, got '2'"),
        ({"RANK": "-1"}, "RANK: expected this process' number among the ranks, 0 to 1, got '-1'"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: expected the number of ranks, at least 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected the number of ranks, at least 1, got '0'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: expected the address of rank 0, got none"),
        (
            {"MASTER_PORT": "99999"},
            "MASTER_PORT: expected a free port of rank 0's machine, 1 to 65535, got '99999'",
        ),
    ],
)
def test_wrong_variables_are_named(monkeypatch, tmp_path, changes, message):
    for name, value in {**GOOD, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with refused(ValueError, f"{message}; {REMEDY}"):
        check_launcher()
    with refused(RanksError, f"{message}; {REMEDY}"):
        join(tmp_path)


@pytest.mark.parametrize(
    ("rank", "missing"),
    [("0", "rank 0: expected all of 2 ranks at"), ("1", "rank 1: expected rank 0 at")],
)
def test_a_rank_that_never_comes_is_missed(monkeypatch, tmp_path, rank, missing):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {**GOOD, "RANK": rank, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_START_SECONDS", 1)
    message = (
        f"^{missing} localhost:{port} \\(MASTER_ADDR, MASTER_PORT\\) within 1 seconds, got: .+; "
        "start a process for each RANK from 0 to 1 with this address$"
    )
    with pytest.raises(RanksError, match=message):
        join(tmp_path)


def test_help_shows_no_variables_of_the_process():
    functions = (
        *(own_rank, started_as_rank, check_launcher),
        *(openmp.bound_waiting, host_threads.choose_threads),
    )
    for function in functions:
        assert inspect.signature(function).parameters["environment"].default is None
    for module in (launcher, openmp, host_threads):
        source = inspect.getsource(module)
        assert not re.search(r"= os\.environ\b[,)]", source)
