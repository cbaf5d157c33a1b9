"""`cpumoe sglang`: the command line of SGLang's server, for a model and a machine."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from checkpoint_tools import edit_tensors, write_small
from cli_tools import refuse, run
from safetensors.torch import load_file
from sglang_command_tools import GIB, MODEL, dry_run, options, problems

from cpumoe.cli.sglang_host import FORK, UPSTREAM
from cpumoe.cli.sglang_machine import Gpu, Machine
from cpumoe.integrations.sglang import pythonpath

pytestmark = pytest.mark.usefixtures("quick_commands", "no_downloads", "use_host", "use_machine")


def test_the_command_fits_the_model_and_the_machine():
    assert options(MODEL) == {
        "--model-path": MODEL,
        "--kt-weight-path": MODEL,
        "--kt-method": "MXFP4",
        # (0.8 * 34.36 - 7.16 - 2.15) GB / (43 layers * 13.37 MB)
        "--kt-num-gpu-experts": "31",
        "--kt-cpuinfer": "96",
        "--kt-threadpool-count": "2",
        "--disable-shared-experts-fusion": "",
        "--mem-fraction-static": "0.8",
    }


def test_the_environment_leads_both_hosts_to_the_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    _, variables, _ = dry_run(MODEL)
    folders = f"{pythonpath()}{os.pathsep}/elsewhere"
    assert variables == {"CPUMOE_SGLANG": "1", "PYTHONPATH": folders}


def test_memory_and_nodes_are_explained():
    said = dry_run(MODEL)[2]
    assert "GPU: 80 % of 34.4 GB for 7.16 GB of weights besides experts, 2.15 GB of KV" in said
    assert "17.8 GB for 31 of 256 experts in each layer" in said
    assert "CPU: 129 GB for 225 of 256 experts in each of 43 layers, 96 threads" in said
    assert "NUMA nodes: experts and threads are divided among 0, 1" in said


@pytest.mark.parametrize("words", [("0",), ("[0]",), ("0", "0")], ids=str)
def test_named_nodes_have_all_threads(words, use_host):
    named = (MODEL, "--kt-numa-nodes", *words)
    found, variables, said = dry_run(*named)
    assert "--kt-numa-nodes" not in found  # SGLang does not know it
    assert variables["CPUMOE_NODES"] == "[0]"
    assert "NUMA nodes: experts and threads are on node 0" in said
    assert "left out" not in said
    assert found[found.index("--kt-cpuinfer") + 1] == "48"
    use_host(FORK)
    found, variables, said = dry_run(*named)
    assert found[found.index("--kt-numa-nodes") + 1 :][: len(words)] == list(words)
    assert found[found.index("--kt-threadpool-count") + 1] == "1"
    assert "CPUMOE_NODES" not in variables


def test_several_nodes_may_be_named():
    found, variables, said = dry_run(MODEL, "--kt-numa", "1,0")
    assert variables["CPUMOE_NODES"] == "[0,1]"
    assert found[found.index("--kt-cpuinfer") + 1] == "96"
    assert "divided among 0, 1" in said


def test_named_nodes_must_exist():
    said = problems(MODEL, "--kt-numa-nodes", "0", "7")
    assert "CPUs and memory this process may use, [0, 1]; got [7]" in said


@pytest.mark.parametrize(
    ("arguments", "experts"),
    [
        (("--gpu-memory", 48), 55),
        (("--kv-cache", 8), 20),
        (("--mem-fraction-static", "0.9"), 37),
        (("--mem-fraction", "0.9"), 37),
        (("--speculative-algorithm", "EAGLE"), 25),
        (("--gpu-memory", 400), 256),
    ],
)
def test_the_number_of_gpu_experts_follows_the_memory(arguments, experts):
    assert options(MODEL, *arguments)["--kt-num-gpu-experts"] == str(experts)


PAGE = Path(__file__).parents[2] / "docs" / "sglang.md"
ROW = re.compile(r"\| ([\w-]+) \| (\d+) GiB \| (\d+) of \d+ \| (\S+ GB) \| \d+ GB \|")
ROWS = ROW.findall(PAGE.read_text("utf-8"))


def test_the_page_has_a_table_of_machines():
    assert ROWS


@pytest.mark.parametrize(("model", "gpu", "experts", "memory"), ROWS)
def test_the_page_says_what_a_machine_needs(model, gpu, experts, memory):
    arguments = (model, "--gpu-memory", gpu)
    assert options(*arguments)["--kt-num-gpu-experts"] == experts
    assert f"CPU: {memory} for" in dry_run(*arguments)[2]


def test_the_page_shows_the_command():
    shown = re.search(r"python -m sglang[^`]*", PAGE.read_text("utf-8")).group()
    assert shlex.split(shown.replace("\\\n", ""))[3:] == dry_run(MODEL)[0]


def test_several_gpus_share_the_weights(use_machine):
    use_machine(Machine(96, (0, 1), 256 * GIB, (Gpu("a GPU", 32 * GIB),) * 3))
    found = options(MODEL)
    assert found["--tensor-parallel-size"] == "2"
    assert found["--kt-num-gpu-experts"] == "75"
    assert options(MODEL, "--tp-size", 1)["--kt-num-gpu-experts"] == "31"


def test_sizes_come_from_the_checkpoint(v4, use_machine):
    document = json.loads(run("inspect", v4, "--json").stdout)
    layers, experts = len(document["layers"]), document["num_experts"]
    expert = document["bytes"]["expert"]
    tensors = load_file(v4 / "model.safetensors")
    dense = sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)
    draft = {f"mtp.0.{n[9:]}": t.clone() for n, t in tensors.items() if n.startswith("layers.0.")}
    edit_tensors(v4, draft)
    drafts = sum(tensor.nbytes for tensor in draft.values())
    slack = expert // 2

    def chosen(memory, *arguments):
        use_machine(Machine(1, (), 0, (Gpu("a GPU", memory),)))
        exact = ("--kv-cache", 0, "--mem-fraction-static", 1)
        return options(v4, *exact, *arguments)["--kt-num-gpu-experts"]

    assert chosen(dense + 2 * layers * expert + slack) == "2"
    assert chosen(dense + experts * layers * expert + slack) == str(experts)
    assert chosen(dense + layers * expert + slack) == "1"
    speculative = ("--speculative-algorithm", "EAGLE")
    assert chosen(dense + drafts + layers * expert + slack, *speculative) == "1"


def test_experts_may_come_from_another_folder(v4, tmp_path):
    dense = write_small(tmp_path / "dense", "kimi-k2")
    found = options(dense, "--kt-weight-path", v4)
    assert found["--model-path"] == str(dense)
    assert found["--kt-weight-path"] == str(v4)
    assert found["--kt-method"] == "MXFP4"
    assert options(dense)["--kt-method"] == "RAWINT4"


def test_a_downloaded_model_is_found_by_its_name(v4, tmp_path):
    commit = "0" * 40
    folder = tmp_path / "hub" / "models--deepseek-ai--DeepSeek-V4-Flash"
    (folder / "snapshots").mkdir(parents=True)
    v4.rename(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert options("v4-flash")["--model-path"] == str(folder / "snapshots" / commit)


def test_without_a_gpu_all_experts_are_on_the_cpu(use_machine):
    use_machine(Machine(4, (), 256 * GIB, ()))
    found = options(MODEL, "--device", "cpu")
    assert found["--kt-num-gpu-experts"] == "0"
    assert "--mem-fraction-static" not in found
    assert "no GPU" not in dry_run(MODEL, "--device", "cpu")[2]


def test_everything_that_is_missing_is_named(use_machine, use_host):
    use_host(None)
    use_machine(Machine(8, (), 96 * GIB, ()))
    said = problems(MODEL)
    assert "sglang: not installed in this Python's environment; pip install sglang==0.5.23" in said
    assert "no GPU: nvidia-smi finds none" in said
    assert "experts need 147 GB; the system has 103 GB free" in said
    assert f"no such folder; hf download deepseek-ai/{MODEL} --local-dir {MODEL}" in said


def test_a_gpu_that_is_too_small_is_refused(use_machine):
    use_machine(Machine(8, (), 256 * GIB, (Gpu("a GPU", 8 * GIB),)))
    said = problems(MODEL)
    assert "the GPU's memory is too small: 80 % of 8.59 GB for 7.16 GB of weights" in said
    assert "--tensor-parallel-size 4 needs 4 GPUs; this machine has 1" in problems(MODEL, "--tp", 4)
    assert "warning: the GPU's memory is too small" in dry_run(MODEL, "--kt-num-gpu", 2)[2]


def test_more_experts_than_the_gpu_has_memory_for_are_a_warning():
    said = dry_run(MODEL, "--kt-num-gpu-experts", 200)[2]
    assert "GPU: 80 % of 34.4 GB" in said
    assert (
        "warning: the GPU needs 115 GB for 200 of 256 experts in each layer, but has 18.2 GB for "
        "experts, which is enough for 31"
    ) in said
    assert "for 31 of 256 experts" in (said := dry_run(MODEL, "--kt-num-gpu-experts", 31)[2])
    assert "the GPU needs" not in said


def test_a_plan_for_another_machine_starts_nothing_without_a_gpu(v4, use_machine, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("a server was started"))
    use_machine(Machine(8, (), 256 * GIB, ()))
    memory = ("--gpu-memory", 32)
    for parallel in ((), ("--tp", 3)):
        result = run("sglang", v4, *memory, *parallel)
        assert result.exit_code == 2
        said = result.stderr
        assert "no GPU: nvidia-smi finds none; --dry-run with --gpu-memory" in said
        assert "this machine has" not in said
        assert "warning" not in dry_run(v4, *memory, *parallel)[2]
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    assert run("sglang", v4, *memory, "--device", "cpu").exit_code == 0
    assert calls


def test_what_cpumoe_does_not_compute_is_refused(v4):
    said = problems(v4, "--kt-method", "FP8")
    assert f"--kt-method: expected MXFP4, the format of the experts in {v4}, got 'FP8'" in said
    assert "got 'RAWINT4'; leave the option out" in problems(v4, "--kt-method", "RAWINT4")
    assert "--kt-method" in options(v4, "--kt-method", "mxfp4")
    assert "no LoRA adapters for experts" in problems(v4, "--kt-expert-lora-path", "x")


def test_an_incomplete_download_is_named(tmp_path):
    folder = write_small(tmp_path / "model", "kimi-k2", max_shard_bytes=20_000)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    assert "1 shard missing" in problems(folder)


def test_a_checkpoint_without_experts_is_refused(v4, tmp_path):
    dense = write_small(tmp_path / "model", "v4-flash")
    names = load_file(dense / "model.safetensors")
    edit_tensors(dense, dict.fromkeys((name for name in names if ".experts." in name), None))
    assert refuse("sglang", dense, "--dry-run") == (
        f"error: {dense}: expected a checkpoint that has routed experts, got layers without any; "
        "pass --kt-weight-path FOLDER, the checkpoint of the experts\n"
    )
    assert options(dense, "--kt-weight-path", v4)["--model-path"] == str(dense)


def test_an_untested_version_is_a_warning(use_host):
    use_host(UPSTREAM, "0.6.0")
    assert "warning: sglang 0.6.0: cpumoe was written for 0.5.23" in dry_run(MODEL)[2]


def test_wrong_models_are_refused(v4, tmp_path):
    said = refuse("sglang", "--port", 1, MODEL)
    assert "expected a model: cpumoe sglang MODEL" in said
    assert "MODEL comes before SGLang's options" in said
    assert "either MODEL or --model-path, got both" in refuse("sglang", v4, "--model", v4)
    assert "unknown model 'nonsense'" in refuse("sglang", "nonsense")
    assert "no such checkpoint folder" in refuse("sglang", "./nonsense")
    for name in ("DeepSeek-V3", "gpt-oss-120b"):
        message = refuse("sglang", name, "--dry-run")
        assert "expected a downloaded model, or one of DeepSeek-V4-Flash" in message
    fp16 = write_small(tmp_path / "fp16", "Mixtral-8x7B")
    weights = load_file(fp16 / "model.safetensors")
    edit_tensors(fp16, {name: tensor.half() for name, tensor in weights.items()})
    message = refuse("sglang", fp16, "--dry-run")
    assert "expected experts in mxfp4 or int4 or fp8 or bf16 or nvfp4, which are" in message
    assert "got fp16" in message
    assert "no config.json" in refuse("sglang", tmp_path, "--dry-run")


def test_what_was_not_tried_is_said(gpt_oss, tmp_path):
    assert "was not tried with models of the type gpt_oss" in dry_run(gpt_oss)[2]
    kimi = write_small(tmp_path / "kimi", "kimi-k2")
    assert "SGLang runs it if you pass --trust-remote-code" in dry_run(kimi)[2]


def test_the_process_becomes_the_server(v4, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setenv("KEPT", "1")
    result = run("sglang", v4, "--port", 3000)
    assert result.exit_code == 0, result.output
    ((path, words, environment),) = calls
    assert path == sys.executable
    assert words[1:3] == ["-m", "sglang.launch_server"]
    assert words[-2:] == ["--port", "3000"]
    assert environment["CPUMOE_SGLANG"] == environment["KEPT"] == "1"
    assert environment["PYTHONPATH"].startswith(str(pythonpath()))
