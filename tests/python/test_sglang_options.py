"""Options of `cpumoe sglang`: those of SGLang, of sglang-kt and of `kt run`, and wrong ones."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from cli_tools import refuse
from sglang_command_tools import GIB, MODEL, dry_run, options

from cpumoe.cli import sglang_host
from cpumoe.cli.sglang_host import FORK, UPSTREAM
from cpumoe.cli.sglang_machine import Gpu, Machine

pytestmark = pytest.mark.usefixtures("quick_commands", "no_downloads", "use_host", "use_machine")

# The options of the command that kt-kernel's tutorial for this model gives, for eight GPUs, which
# get fewer experts here.
TUTORIAL = """
  --host 127.0.0.1 --port 30000 --model {model}
  --kt-weight-path {model} --kt-method MXFP4 --kt-num-gpu-experts 2
  --kt-cpuinfer 8 --kt-threadpool-count 2 --kt-gpu-prefill-token-threshold 4096
  --kt-enable-dynamic-expert-update --tensor-parallel-size 8 --attention-backend flashinfer
  --mem-fraction-static 0.80 --chunked-prefill-size 2048 --max-running-requests 4
  --max-total-tokens 32768 --watchdog-timeout 3000 --disable-shared-experts-fusion
  --cuda-graph-bs 1 2 4 --cuda-graph-max-bs 4 --trust-remote-code
  --speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1
  --speculative-num-draft-tokens 4 --speculative-moe-runner-backend auto
"""


def test_given_options_take_precedence_and_unknown_ones_pass_through():
    given = ("--kt-cpuinfer", 8, "--tp=1", "--kt-num-gpu-experts=3", "--some-new-option", "1", "-1")
    found = options(MODEL, *given)
    assert found["--kt-cpuinfer"] == "8"
    assert "layers, 8 threads" in dry_run(MODEL, *given)[2]
    assert found["--kt-num-gpu-experts"] == "3"
    assert found["--some-new-option"] == "1 -1"
    assert found["--tp"] == "1"
    assert "--tensor-parallel-size" not in found


def test_shortened_options_become_whole():
    short = ("--kt-num-gpu", 5, "--kt-cpu=8", "--mem-frac", "0.9", "--tensor-par", 1, "--kt-meth")
    found = options(MODEL, *short, "MXFP4")
    assert found["--kt-num-gpu-experts"] == "5"
    assert found["--kt-cpuinfer"] == "8"
    assert found["--mem-fraction-static"] == "0.9"
    assert found["--tensor-parallel-size"] == "1"
    assert found["--kt-method"] == "MXFP4"


def test_the_option_names_of_kt_run_are_known(v4, use_host):
    use_host(FORK)
    given = ("--gpu-experts", 2, "--cpu-threads", 4, "--weights-path", v4)
    found = options(MODEL, *given, "--kt-gpu-prefill-threshold=400")
    assert found["--kt-num-gpu-experts"] == "2"
    assert found["--kt-cpuinfer"] == "4"
    assert found["--kt-weight-path"] == str(v4)
    assert found["--kt-gpu-prefill-token-threshold"] == "400"


def test_a_ratio_of_experts_becomes_a_number_for_upstream(use_host):
    assert options(MODEL, "--kt-gpu-experts-ratio", "0.1")["--kt-num-gpu-experts"] == "25"
    use_host(FORK)
    found = options(MODEL, "--kt-gpu-experts-ratio", "0.1")
    assert found["--kt-gpu-experts-ratio"] == "0.1"
    assert "--kt-num-gpu-experts" not in found


def test_a_ratio_of_experts_takes_precedence_over_a_number(use_host):
    both = ("--kt-gpu-experts-ratio", "0.1", "--kt-num-gpu-experts", 5)
    assert options(MODEL, *both)["--kt-num-gpu-experts"] == "25"
    use_host(FORK)
    found = options(MODEL, *both)
    assert (found["--kt-gpu-experts-ratio"], found["--kt-num-gpu-experts"]) == ("0.1", "5")


def test_the_tutorials_command_works_flag_for_flag_with_the_fork(v4, use_host, use_machine):
    use_host(FORK)
    use_machine(Machine(96, (0, 1), 256 * GIB, (Gpu("a GPU", 32 * GIB),) * 8))
    words = TUTORIAL.format(model=v4).split()
    given, _, said = dry_run(*words)
    assert given == words
    assert "warning" not in said


def test_upstream_gets_the_tutorials_command_without_the_forks_options(v4):
    words = TUTORIAL.format(model=v4).split()
    given, _, said = dry_run(*words)
    dropped = ["--kt-gpu-prefill-token-threshold", "4096", "--kt-enable-dynamic-expert-update"]
    kept = [word for word in words if word not in dropped]
    assert given == [f"{word}-decode" if "-graph-" in word else word for word in kept]
    assert "left out --kt-gpu-prefill-token-threshold 4096: only sglang-kt has" in said
    assert "--cuda-graph-bs became --cuda-graph-bs-decode" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kt-num-gpu-experts", 257), "expected at most 256 experts per layer, got 257"),
        (("--kt-num-gpu-experts", 10**400), "expected at most 256 experts per layer, got 1000"),
        (("--kt-gpu-experts-ratio", 2), "--kt-gpu-experts-ratio: expected a number from 0 to 1"),
        (("--kt-gpu-experts-ratio", "inf"), "expected a number from 0 to 1, got 'inf'"),
        (("--kt-num-gpu-experts", "many"), "expected an integer from 0 on, got 'many'"),
        (("--mem-fraction-static", "-1"), "expected a number from 0 to 1, got '-1'"),
        (("--mem-fraction-static", "1.5"), "--mem-fraction-static: expected a number from 0 to 1"),
        (("--mem-fraction-static", "1e300"), "expected a number from 0 to 1, got '1e300'"),
        (("--mem-fraction-static", "nan"), "expected a number from 0 to 1, got 'nan'"),
        (("--kt-cpuinfer", "-3"), "--kt-cpuinfer: expected an integer from 1 on, got '-3'"),
        (("--kt-threadpool-count", 0), "--kt-threadpool-count: expected an integer from 1 on"),
        (("--kt-numa-nodes",), "--kt-numa-nodes: expected integers from 0 on, got ''"),
        (("--kt-numa-nodes", "0,a"), "--kt-numa-nodes: expected integers from 0 on, got '0,a'"),
        (("--tensor-parallel-size", 0), "expected an integer from 1 to 1024, got '0'"),
        (("--tp", 10**400), "expected an integer from 1 to 1024, got '1000"),
        (("--tp", 1, 2), "--tp: expected one value, got 2"),
        (("--gpu-memory", 0), "--gpu-memory: expected more than 0 and at most 65536 GiB, got 0"),
        (("--gpu-memory", "1e300"), "and at most 65536 GiB, got 1e+300"),
        (("--gpu-memory", "inf"), "and at most 65536 GiB, got inf"),
        (("--kv-cache", "nan"), "--kv-cache: expected 0 to 65536 GiB, got nan"),
        (("--kv-cache", "1e300"), "--kv-cache: expected 0 to 65536 GiB, got 1e+300"),
        (("--kt-num", 1), "--kt-num: expected the whole name of an option"),
        (("--tp", 0), "--tensor-parallel-size: expected an integer from 1"),
        (("word",), "expected an option of SGLang, got 'word'"),
    ],
)
def test_wrong_values_are_refused(arguments, message, use_machine):
    assert message in refuse("sglang", MODEL, *arguments)
    use_machine(Machine(8, (), 96 * GIB, ()))
    assert message in refuse("sglang", MODEL, *arguments, "--dry-run")


# A Python with SGLang, whose parser is asked: this one, or another that the variable names.
SGLANG_PYTHON = os.environ.get("CPUMOE_TEST_SGLANG_PYTHON") or (
    sys.executable if find_spec("sglang") else None
)
PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(allow_abbrev=False)
ServerArgs.add_cli_args(parser)
names = [name for action in parser._actions for name in action.option_strings]
parsed = [parser.parse_known_args(words) for words in json.load(sys.stdin)]
answers = [(vars(values), unknown) for values, unknown in parsed]
print("\\n" + json.dumps([names, answers], default=str))
"""


@pytest.mark.skipif(SGLANG_PYTHON is None, reason="SGLang is not installed")
def test_sglangs_own_parser_accepts_the_command(v4, use_host):
    tutorial = TUTORIAL.format(model=v4).split()
    commands = []
    for host in (UPSTREAM, FORK):
        use_host(host)
        commands += [dry_run(MODEL)[0], dry_run(*tutorial)[0]]
    answer = subprocess.run(
        [SGLANG_PYTHON, "-c", PARSE],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    names, answers = json.loads(answer.stdout.splitlines()[-1])
    is_fork = "--kt-gpu-prefill-token-threshold" in names
    (parsed, odd), (full, odd_too) = answers[2:] if is_fork else answers[:2]
    assert odd == odd_too == []
    assert parsed["model_path"] == parsed["kt_weight_path"] == MODEL
    assert parsed["kt_method"] == full["kt_method"] == "MXFP4"
    assert (parsed["kt_num_gpu_experts"], parsed["kt_cpuinfer"]) == (31, 96)
    assert parsed["disable_shared_experts_fusion"]
    assert full["speculative_algorithm"] == "EAGLE"
    assert full.get("kt_gpu_prefill_token_threshold") == (4096 if is_fork else None)
    ours = {"--dry-run", "--gpu-memory", "--kv-cache", "--traceback", *sglang_host.NAMES_OF_KT}
    assert not ours & set(names)
