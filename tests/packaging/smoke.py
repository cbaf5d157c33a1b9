"""Uses an installed cpumoe as a newcomer would.

    python smoke.py core      what needs no extra
    python smoke.py extras    all of that, and what the extras bring

Run it away from cpumoe's sources. It needs no pytest.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import cpumoe

TINY = ("--layers", "1", "--experts", "4", "--hidden", "64", "--intermediate", "32")
QUICK = ("--experts", "2", "--tokens", "1", "--seconds", "0.01", "--rounds", "1")
PROMPT = "In the beginning"


def command(*arguments: str, stdin: str = "") -> str:
    """What a cpumoe command prints; the command must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "cpumoe", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
    )
    assert done.returncode == 0, f"cpumoe {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_version() -> None:
    assert cpumoe.__version__ == metadata.version("cpumoe")
    assert command("--version") == f"cpumoe {cpumoe.__version__}\n"
    info = json.loads(command("info", "--json"))
    assert info["versions"]["cpumoe"] == cpumoe.__version__
    assert info["build_id"].startswith(f"{cpumoe.__version__}+")
    assert [row["name"] for row in info["isa"]["variants"] if row["in_use"]] == ["generic"]


def check_layer() -> None:
    """A layer whose weights are all 1: y is known without a reference."""
    ones = torch.full((2, 32, 16), 0x22, dtype=torch.uint8), torch.full((2, 32, 1), 127).byte()
    experts = cpumoe.Experts.from_tensors(gate=ones, up=ones, down=ones, format="mxfp4")
    x = torch.ones(3, 32)
    y = experts(x, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    expected = 32 * torch.nn.functional.silu(torch.tensor(32.0)) * 32
    torch.testing.assert_close(y, expected.expand(3, 32), rtol=1e-5, atol=0)


def check_sglang() -> None:
    """SGLang finds the plugin, and the wheel has no package that shadows kt-kernel's."""
    (plugin,) = metadata.entry_points(group="sglang.srt.plugins", name="cpumoe")
    plugin.load()()  # does nothing, because nobody asks for it
    files = metadata.files("cpumoe")
    assert files
    assert "kt_kernel" not in {Path(file).parts[0] for file in files}
    assert any(Path(file).parts[-3:-1] == ("pythonpath", "kt_kernel") for file in files)


def check_commands(folder: str) -> None:
    model = str(Path(folder) / "tiny")
    command("synth", model, "--model", "v4-flash", *TINY)
    assert json.loads(command("inspect", model, "--json"))["supported"]
    command("validate", model)
    command("bench", *QUICK)


def check_model() -> None:
    from cpumoe import embedded
    from cpumoe.integrations.transformers import from_pretrained

    model = from_pretrained(embedded.model_path())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert PROMPT in command("generate", "-p", PROMPT, "--max-tokens", "8")


def check_server() -> None:
    """Asks for text and for JSON, through the chat client and the metrics' page."""
    from urllib.request import Request, urlopen

    serve = [sys.executable, "-m", "cpumoe", "serve", "--port", "0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            match = re.search(r"^serving (\S+) at (\S+)", server.stdout.readline())
            assert match, "the server did not start"
            name, url = match.groups()
            assert command("chat", url, "--max-tokens", "8", stdin=PROMPT).strip()
            body = {"model": name, "max_tokens": 4, "response_format": {"type": "json_object"}}
            body["messages"] = [{"role": "user", "content": "Hello"}]
            headers = {"Content-Type": "application/json"}
            request = Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
            with urlopen(request, timeout=60) as answer:
                assert json.load(answer)["object"] == "chat.completion"
            with urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=60) as page:
                assert b"# TYPE" in page.read()
        finally:
            server.terminate()


def check_plot(folder: str) -> None:
    plot = Path(folder) / "plot.svg"
    command("bench", *QUICK, "--plot", str(plot))
    assert "<svg" in plot.read_text()


def main(part: str) -> None:
    check_version()
    check_layer()
    check_sglang()
    with tempfile.TemporaryDirectory() as folder:
        check_commands(folder)
        if part == "extras":
            check_plot(folder)
            check_model()
            check_server()
    print(f"cpumoe {cpumoe.__version__} from {Path(cpumoe.__file__).parent}: works")


if __name__ == "__main__":
    main(*sys.argv[1:])
