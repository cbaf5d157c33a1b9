"""The number of PyTorch's threads, and how long they spin."""

import json
import os

import pytest
import torch
from cli_tools import succeed
from moe_tools import output_of, output_with_torch
from torch import nn

from cpumoe import _core
from cpumoe._base import openmp
from cpumoe.cli import host_threads

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, *COUNTS)}
    return {**kept, **changes}


@pytest.fixture
def seven_threads(monkeypatch):
    """Gives PyTorch a number of threads that no test expects, and restores it afterwards."""
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


def test_waiting_is_bounded_before_openmp_is_loaded():
    settings = {}
    openmp.bound_waiting(settings)
    assert settings == {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", SETTINGS)
def test_waiting_that_the_user_has_decided_stays(name):
    settings = {name: "7"}
    openmp.bound_waiting(settings)
    assert settings == {name: "7"}


@pytest.mark.parametrize(
    ("given", "waiting"),
    [
        ({}, {"variable": "GOMP_SPINCOUNT", "value": "10000", "set_by": "cpumoe"}),
        (
            {"GOMP_SPINCOUNT": "123"},
            {"variable": "GOMP_SPINCOUNT", "value": "123", "set_by": "environment"},
        ),
        (
            {"OMP_WAIT_POLICY": "passive"},
            {"variable": "OMP_WAIT_POLICY", "value": "passive", "set_by": "environment"},
        ),
    ],
)
def test_info_shows_the_waiting_in_force(given, waiting):
    code = (
        "import json, sys; from cpumoe.cli import app, main, host_threads; "
        "app.registered_commands.clear(); "
        "app.command('show')(lambda: print(json.dumps(host_threads.describe()))); "
        "app.command('other')(lambda: None); sys.argv = ['cpumoe', 'show']; main()"
    )
    # Without a setting, it matters that cpumoe sets one before PyTorch is imported.
    run = output_with_torch if given else output_of
    shown = json.loads(run(code, env=environment(**given)))
    if shown["openmp"] != "GNU OpenMP":
        pytest.skip(f"this PyTorch uses {shown['openmp']}")
    assert shown["waiting"] == waiting
    assert shown["threads"] == _core.topology().default_threads
    assert shown["threads_variable"] is None


def test_a_small_model_decodes_on_one_thread_of_pytorchs(seven_threads):
    succeed("generate", "-p", "In", "--max-tokens", 1, "--json")
    assert torch.get_num_threads() == 1


def test_a_large_model_gets_the_threads_that_the_process_may_use(seven_threads, monkeypatch):
    monkeypatch.setattr(host_threads, "_SMALL_BYTES", -1)
    succeed("generate", "-p", "In", "--max-tokens", 1, "--json")
    assert torch.get_num_threads() == _core.topology().default_threads
    succeed("generate", "-p", "In", "--max-tokens", 1, "--threads", 1, "--json")
    assert torch.get_num_threads() == 1


def test_a_number_of_threads_that_the_user_has_decided_stays(seven_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    succeed("generate", "-p", "In", "--max-tokens", 1, "--json")
    assert torch.get_num_threads() == 7


def test_small_is_a_matter_of_dense_bytes():
    assert host_threads.is_small(nn.Linear(1024, 1024, dtype=torch.bfloat16))
    with torch.device("meta"):
        assert not host_threads.is_small(nn.Linear(8192, 8192, dtype=torch.bfloat16))


def test_an_embedding_counts_if_a_head_shares_its_weights():
    embedding = nn.Embedding(100, 8)
    model = nn.Sequential(embedding, nn.Linear(8, 8, bias=False))
    assert host_threads.read_bytes(model) == 256
    model.append(nn.Linear(8, 100, bias=False))
    assert host_threads.read_bytes(model) == 256 + 3200
    model[2].weight = embedding.weight
    assert host_threads.read_bytes(model) == 256 + 3200


def test_a_small_model_reads_prompts_on_all_threads(seven_threads):
    seen = []

    class Model(nn.Module):
        def forward(self, input_ids, **_):
            seen.append(torch.get_num_threads())

    model = Model()
    host_threads.choose_threads(3, model, {})
    for tokens in (1, 500, 2):
        model(input_ids=torch.zeros(1, tokens))
    model(torch.zeros(1, 500))
    assert seen == [1, 3, 1, 3]
    host_threads.choose_threads(None, Model(), {"OMP_NUM_THREADS": "7"})
    assert torch.get_num_threads() == 3
