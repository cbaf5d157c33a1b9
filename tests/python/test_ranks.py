"""Commands in several processes: the text of one process, and clear ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import warm_process
from checkpoint_tools import write_small
from moe_tools import EVERYTHING, IN_FULL_RUNS
from ports import unused_port

import cpumoe
from cpumoe import embedded
from cpumoe.distributed.placement import check_frequencies
from cpumoe.integrations.sglang.recording import read_counts

SCRIPT = (Path(__file__).parent / "ranks_script.py").read_text("utf-8")
PROMPT = ("-p", "In the beginning", "--max-tokens", "24", "--temperature", "0", "--threads", "1")
# A rank that has ended, or that differs, must end the others within so many seconds.
SOON = 10
RANK_1 = f"rank 1 ({os.uname().nodename})"
VERSION = f"{cpumoe.__version__}, build {cpumoe._core.build_id()[:12]}"


class Times:
    """What ranks_script.py notes."""

    def __init__(self, folder):
        self._folder = folder

    def since(self, what):
        """Seconds since the last rank did something."""
        noted = [float(each.read_text()) for each in self._folder.glob(f"{what}-*")]
        return time.monotonic() - max(noted)


@pytest.fixture
def times(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("times")
    monkeypatch.setenv("TIMES", str(folder))
    return Times(folder)


def run_ranks(world, *arguments, faults=None, models=None, environment=None):
    """Runs a command in `world` ranks, as a launcher would, and returns what each has done."""
    port = unused_port()
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        **(environment or {}),
    }

    def one(rank):
        command, *rest = arguments
        model = [] if models is None else [str(models[rank])]
        return warm_process.run(
            SCRIPT,
            (faults or {}).get(rank, "none"),
            command,
            *model,
            *rest,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def alone(*arguments):
    """What one process prints."""
    done = warm_process.run(SCRIPT, "none", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(done, message):
    """Checks that the ranks have ended with one message."""
    said = [each.stderr for each in done if each.stderr]
    assert said == [f"error: {message}\n"]
    assert all(each.returncode != 0 for each in done)
    assert not any(each.stdout for each in done[1:])


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=IN_FULL_RUNS)])
def test_the_text_is_that_of_one_process(world, tmp_path):
    file = tmp_path / "packed"
    done = run_ranks(
        world, "generate", *PROMPT, faults={1: "packed"}, environment={"PACKED_FILE": str(file)}
    )
    assert [each.returncode for each in done] == [0] * world, done[0].stderr
    assert done[0].stdout == alone("generate", *PROMPT)
    assert not any(each.stdout + each.stderr for each in done[1:])
    # The second rank has its share of each layer's experts, and no more.
    with cpumoe.open_checkpoint(embedded.model_path()) as reader:
        number = reader.layers()[0]
        whole = cpumoe.Experts.from_checkpoint(reader, number, progress=False).nbytes
        own = 2 * reader.num_experts // world - reader.num_experts // world
        assert int(file.read_text()) == len(reader.layers()) * whole * own // reader.num_experts


@IN_FULL_RUNS
@pytest.mark.parametrize("world", [2, 3])
def test_plain_sums(world):
    done = run_ranks(world, "generate", *PROMPT, "--sums", "plain")
    assert [each.returncode for each in done] == [0] * world, done[0].stderr
    assert len(done[0].stdout) > 20


@IN_FULL_RUNS
def test_evaluation_has_the_result_of_one_process():
    arguments = ("eval", "--max-tokens", "200", "--threads", "1", "--precision", "all", "--json")
    done = run_ranks(2, *arguments)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    ours, expected = json.loads(done[0].stdout), json.loads(alone(*arguments))
    for result, other in zip(ours["results"], expected["results"], strict=True):
        assert result["perplexity"] == other["perplexity"]


def test_a_rank_that_is_killed_is_named(times):
    done = run_ranks(2, "generate", *PROMPT, faults={1: "killed"})
    assert times.since("killed") < SOON
    failed(done, f"{RANK_1} has ended or cannot be reached")


@IN_FULL_RUNS
def test_the_end_of_rank_0_is_reported_by_the_next(times):
    done = run_ranks(3, "generate", *PROMPT, faults={0: "killed-0"})
    assert times.since("killed") < SOON
    failed(done, f"rank 0 ({os.uname().nodename}) has ended or cannot be reached")


_OPTIONS = "start all ranks with the same options"
# What differs in rank 1, and what is said of it.
DIFFERENCES = {
    "old": f"cpumoe: expected {VERSION}, as rank 0 has, got 0.0.9, build 0123456789ab; install one "
    "build of cpumoe on all machines",
    "--sums plain": f"sums: expected fixed, as rank 0 has, got plain; {_OPTIONS}",
    "--precision int8": f"precision: expected auto, as rank 0 has, got int8; {_OPTIONS}",
    "--isa generic": f"isa: expected None, as rank 0 has, got generic; {_OPTIONS}",
    "--dtype float32": f"dtype: expected bfloat16, as rank 0 has, got float32; {_OPTIONS}",
    "--placement no.pt": "no.pt: No such file or directory",
}


@pytest.mark.parametrize(
    "fault",
    [each if each in ("old", "--sums plain") else pytest.param(each, marks=IN_FULL_RUNS)
     for each in DIFFERENCES],
)  # fmt: skip
def test_what_differs_is_refused(fault, times):
    done = run_ranks(2, "generate", *PROMPT, faults={1: fault})
    assert times.since("joins") < SOON
    failed(done, f"{RANK_1}: {DIFFERENCES[fault]}")


def test_another_checkpoint_is_refused(tmp_path, times):
    models = [write_small(tmp_path / str(seed), "v4-flash", seed=seed) for seed in (0, 1)]
    done = run_ranks(2, "generate", *PROMPT, models=models)
    assert times.since("joins") < SOON
    (message,) = [each.stderr for each in done if each.stderr]
    assert message.startswith(f"error: {RANK_1}: checkpoint: expected ")
    assert message.endswith("; give all ranks copies of one checkpoint\n")
    assert all(each.returncode != 0 for each in done)


@IN_FULL_RUNS
def test_a_checkpoint_that_is_not_there():
    done = run_ranks(2, "generate", *PROMPT, models=[embedded.model_path(), "path/to/nothing"])
    (message,) = [each.stderr for each in done if each.stderr]
    assert f"{RANK_1}: path/to/nothing" in message


def counts_of_layers(layers):
    """Counts of the embedded model's experts: of the first ones most, and of some layers."""
    with cpumoe.open_checkpoint(embedded.model_path()) as reader:
        counts = torch.zeros((reader.config.num_hidden_layers, reader.num_experts), dtype=int)
        counts[layers] = torch.arange(reader.num_experts, 0, -1) ** 2
        return counts


@pytest.fixture
def counts_file(tmp_path):
    def write(counts):
        torch.save({"logical_count": counts}, tmp_path / "counts.pt")
        return tmp_path / "counts.pt"

    return write


def test_counts_place_the_experts(counts_file):
    file = counts_file(counts_of_layers(slice(None)))
    done = run_ranks(2, "generate", *PROMPT, "--placement", str(file))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    assert done[0].stdout == alone("generate", *PROMPT)


@IN_FULL_RUNS
def test_other_counts_are_refused(counts_file, times):
    whole = counts_of_layers(slice(None))
    layers, experts = whole.shape
    for counts, message in (
        (whole[:-1], f"expected counts of {layers} layers with {experts} experts, as the "
         f"checkpoint has, got [{layers - 1}, {experts}]; record them with this model"),
        (counts_of_layers(slice(1, None)), "layer 0: expected counts of its experts, got zeros; "
         "record them with all layers of this model"),
    ):  # fmt: skip
        file = counts_file(counts)
        done = run_ranks(2, "generate", *PROMPT, faults={1: f"--placement {file}"})
        assert times.since("joins") < SOON
        failed(done, f"{RANK_1}: {file}: {message}")
    done = run_ranks(2, "generate", *PROMPT, faults={0: f"--placement {counts_file(whole)}"})
    (message,) = [each.stderr for each in done if each.stderr]
    assert message.startswith(f"error: {RANK_1}: placement: expected by counts ")
    assert message.endswith(f", as rank 0 has, got successive experts; {_OPTIONS}\n")


def test_counts_are_recorded(tmp_path):
    """Those of one process are those of two ranks, and place experts."""
    file, other = tmp_path / "one.pt", tmp_path / "two.pt"
    arguments = ("eval", "--max-tokens", "200", "--threads", "1", "--record")
    alone(*arguments, str(file))
    counts = read_counts(file)
    with cpumoe.open_checkpoint(embedded.model_path()) as reader:
        assert counts.shape == (reader.config.num_hidden_layers, reader.num_experts)
        assert (counts.sum(dim=1) == 200 * reader.top_k).all()
        check_frequencies(counts, reader)
    if EVERYTHING:
        done = run_ranks(2, *arguments, str(other))
        assert [each.returncode for each in done] == [0, 0], done[0].stderr
        assert torch.equal(read_counts(other), counts)


@IN_FULL_RUNS
def test_a_rank_without_memory_says_so():
    done = run_ranks(2, "generate", *PROMPT, faults={1: "no-memory"})
    failed(done, f"rank 1 ({os.uname().nodename}): not enough memory for the experts")


@IN_FULL_RUNS
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun(world):
    """The launcher itself, whose own log lines are on standard error."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*launcher, "-m", "cpumoe", "generate", *PROMPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone("generate", *PROMPT)


@IN_FULL_RUNS
@pytest.mark.parametrize("fault", [*DIFFERENCES, "killed"])
def test_torchrun_ends_soon(fault, times):
    """The launcher itself, with a fault in rank 1. It also ends the other ranks."""
    script = Path(__file__).parent / "ranks_script.py"
    own = " ".join(map(shlex.quote, (sys.executable, str(script))))
    command = f'exec {own} "$([ $RANK = 1 ] && echo {shlex.quote(fault)} || echo none)" "$@"'
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launched = subprocess.Popen(
        [*launcher, "--no-python", "bash", "-c", command, "rank", "generate", *PROMPT],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    said = []
    for line in launched.stderr:
        if line.startswith("error: "):
            said.append(line)
            assert times.since("killed" if fault == "killed" else "joins") < SOON
    assert launched.wait(60) != 0
    message = " has ended or cannot be reached"
    if fault != "killed":
        message = f": {DIFFERENCES[fault]}"
    assert said == [f"error: {RANK_1}{message}\n"]


@IN_FULL_RUNS
def test_a_server_ends_its_ranks():
    """A signal to another rank than 0 changes nothing, because rank 0 may have to finish."""
    ports = unused_port(), unused_port()
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "cpumoe", "serve", "--port", str(ports[0]), "--threads", "1"],
            env={**shared, "MASTER_PORT": str(ports[1]), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].stdout.readline().startswith("serving ")
        ranks[1].send_signal(signal.SIGINT)
        body = json.dumps({"prompt": "In the beginning", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{ports[0]}/v1/completions",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        ranks[0].send_signal(signal.SIGTERM)
        assert [each.wait(60) for each in ranks] == [0, 0]
        assert ranks[1].stdout.read() == ""
    finally:
        for each in ranks:
            each.kill()
            each.stdout.close()
