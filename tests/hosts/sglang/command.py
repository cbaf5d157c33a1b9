"""Checks `cpumoe sglang` with an installed SGLang or sglang-kt.

python command.py options        its parser accepts the printed commands
python command.py serve FOLDER   the command starts a server; FOLDER as engine.py writes it
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import engine
from cases import run

START_SECONDS = 600


def options_are_accepted():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    command = [sys.executable, "-m", "cpumoe", "sglang", "DeepSeek-V4-Flash", "--dry-run"]
    # An option of sglang-kt, which the command leaves out for SGLang.
    given = ["--gpu-memory", "32", "--kt-gpu-prefill-token-threshold", "4096"]
    printed = subprocess.check_output([*command, *given], text=True).replace("\\\n", " ").split()
    arguments = parser.parse_args(printed[printed.index("sglang.launch_server") + 1 :])
    assert arguments.kt_method == "MXFP4"
    assert arguments.kt_num_gpu_experts == 31


def server_gives_the_engines_tokens(folder):
    prompt = engine.PROMPTS[0]
    sampling = {"temperature": 0, "max_new_tokens": engine.NEW_TOKENS, "ignore_eos": True}
    with server(folder) as url:
        answer = ask(f"{url}/generate", {"input_ids": prompt, "sampling_params": sampling})
    native = [sys.executable, engine.__file__, "generate", str(folder), "native"]
    printed = subprocess.check_output(native, text=True)
    assert answer["output_ids"] == json.loads(printed.splitlines()[-1])[0]


@contextlib.contextmanager
def server(folder):
    """Starts a server with half of the experts in cpumoe, and gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    words = ["sglang", str(folder / "model"), "--kt-weight-path", str(folder / "experts")]
    words += ["--kt-num-gpu-experts", str(engine.EXPERTS // 2), "--device", "cpu"]
    words += ["--dtype", "float32", "--attention-backend", "torch_native", "--disable-cuda-graph"]
    words += ["--skip-tokenizer-init", "--disable-radix-cache", "--mem-fraction-static", "0.1"]
    words += ["--max-total-tokens", "2048", "--skip-server-warmup", "--port", str(port)]
    # The command itself must lead the server's processes to cpumoe.
    env = {name: value for name, value in os.environ.items() if name != "CPUMOE_SGLANG"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cpumoe", *words],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process)
            yield url
        except BaseException:
            log.seek(0)
            print(log.read()[-8000:])
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        layers = f"{engine.EXPERTS // 2} of {engine.EXPERTS} experts on the CPU"
        assert log.read().count(layers) == engine.LAYERS


def wait_for(url, process):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with contextlib.suppress(OSError):
            return ask(f"{url}/model_info")
        time.sleep(0.5)
    raise AssertionError(f"no server after {START_SECONDS} s")


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


if __name__ == "__main__":
    if sys.argv[1] == "options":
        cases = {"command: options are accepted": options_are_accepted}
    else:
        target = Path(sys.argv[2])
        cases = {
            "command: server gives the engine's tokens": lambda: server_gives_the_engines_tokens(
                target
            )
        }
    sys.exit(run(cases))
