"""``cpumoe generate`` and ``cpumoe eval`` on tiny models."""

import json
import shutil

import pytest
import tiny_models
from checkpoint_tools import edit_config
from huggingface_hub import constants
from moe_tools import python
from typer.testing import CliRunner

from cpumoe.cli import app, generate
from cpumoe.cli.console import without_controls

GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_models.deepseek_v4(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("In the beginning was the word. " * 8)
    return str(path)


def run(*args, code=0, stdin=None):
    result = CliRunner().invoke(app, list(args), input=stdin)
    assert result.exit_code == code, result.output
    return result


def test_generate_streams_the_text_and_reports_speed_beside_it(model):
    result = run("generate", model, "-p", "Once", *GREEDY)
    document = json.loads(run("generate", model, "-p", "Once", *GREEDY, "--json").stdout)
    assert result.stdout == f"Once{document['text']}\n"
    for word in ("prefill 4 tokens", "decode 12 tokens", "tokens/s", "experts", "of the time"):
        assert word in result.stderr
    assert document["prompt"] == "Once"
    assert document["finish_reason"] == "length"
    assert document["completion_tokens"] == 12
    assert document["decode_tokens_per_second"] > 0


def test_the_default_number_of_tokens_is_shown():
    assert f"[default: {generate.DEFAULT_MAX_TOKENS}]" in run("generate", "--help").stdout


def test_generate_reads_the_prompt_from_a_pipe_or_file(model, tmp_path):
    expected = run("generate", model, "-p", "Once", *GREEDY).stdout
    assert run("generate", model, "--prompt-file", "-", *GREEDY, stdin="Once").stdout == expected
    (tmp_path / "prompt").write_text("Once")
    file = str(tmp_path / "prompt")
    assert run("generate", model, "--prompt-file", file, *GREEDY).stdout == expected


def test_a_pipe_that_is_no_utf8_is_named(model):
    said = run("generate", model, "--prompt-file", "-", stdin=b"caf\xe9", code=2).stderr
    assert said.startswith("error: --prompt-file: standard input: expected UTF-8 text: ")


def test_generate_answers_in_the_chat_format(model):
    result = run("generate", model, "-p", "Hi", "--chat", *GREEDY, "--json")
    assert json.loads(result.stdout)["prompt_tokens"] == 4  # <|user|>Hi<|assistant|>
    assert not run("generate", model, "-p", "Hi", "--chat", *GREEDY).stdout.startswith("Hi")


def test_generate_takes_a_chat_template_from_a_file(model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    arguments = ("--chat", "--chat-template", str(template), *GREEDY, "--json")
    assert json.loads(run("generate", model, "-p", "Hi", *arguments).stdout)["prompt_tokens"] == 3


def test_generate_keeps_reasoning_out_of_the_answer(model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}<think>{# </think> #}")
    arguments = ("-p", "Hi", "--chat", "--chat-template", str(template), *GREEDY)
    document = json.loads(run("generate", model, *arguments, "--json").stdout)
    assert document["reasoning"]
    assert (document["text"], document["tool_calls"]) == ("", [])
    result = run("generate", model, *arguments)
    assert result.stdout == "\n"
    assert without_controls(document["reasoning"]) in result.stderr
    assert "\nwarning: the model wrote reasoning, but no answer" in result.stderr


def test_generate_with_a_seed_repeats_itself(model):
    drawn = ("--temperature", "1", "--max-tokens", "12")
    outputs = {
        run("generate", model, "-p", "Once", "--seed", seed, *drawn).stdout for seed in ("3", "3")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --prompt TEXT or --prompt-file FILE"),
        (["-p", "a", "--prompt-file", "b"], "expected either"),
        (["-p", ""], "expected some text"),
        (["-p", "a", "--chat-template", "FILE"], "--chat-template needs --chat"),
        (["-p", "a", "--temperature", "-1"], "temperature: expected 0 to 100, got -1.0"),
        (["-p", "a", "--top-p", "0"], "top_p: expected above 0"),
        (["-p", "a", "--dtype", "float8"], "--dtype: expected one of bfloat16, float32, auto"),
        (["-p", "a", "--isa", "avx3"], "unknown"),
        (["-p", "a", "--precision", "int3"], "int3"),
        (["-p", "a" * 600], "fewer tokens than the context of 512, got 600"),
        (["--prompt-file", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_generate_explains_mistakes(model, arguments, message):
    result = run("generate", model, *arguments, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_names_a_missing_folder():
    result = run("generate", "/no/such/model", "-p", "a", code=2)
    assert "/no/such/model: no such checkpoint folder" in result.stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("generate",), "--prompt-file"),
        (("eval",), "--text"),
        (("generate", "-p", "a", "--chat"), "--chat-template"),
    ],
)
def test_files_that_are_no_utf8_are_named(model, tmp_path, command, option):
    path = tmp_path / "latin-1"
    path.write_bytes("café".encode("latin-1"))
    name, *arguments = command
    result = run(name, model, *arguments, option, str(path), code=2)
    assert f"{option}: {path}: expected UTF-8 text" in result.stderr


@pytest.mark.parametrize("package", ["transformers", "accelerate", "compressed-tensors"])
def test_a_missing_package_is_one_line_at_once(package):
    code = f"""
import sys
from importlib import metadata

found = metadata.version

def version(name):
    if name == {package!r}:
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version = version
sys.argv = ["cpumoe", "generate", "-p", "a"]
from cpumoe.cli import app
try:
    app()
finally:
    print("torch" in sys.modules)
"""
    result = python(code)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert f"needs the package {package}: pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_eval_compares_ways_to_compute_experts(model, text):
    result = run(
        *("eval", model, "--text", text, "--dtype", "float32", "--json"),
        *("--experts", "all", "--precision", "all", "--isa", "generic"),
    )
    auto, bf16, int8, host = json.loads(result.stdout)["results"]
    assert (auto["experts"], auto["isa"], auto["precision"]) == ("cpumoe", "generic", "auto")
    assert bf16["precision"] == "bf16"
    assert (int8["precision"], host["experts"], host["isa"]) == ("int8", "host", None)
    assert auto["perplexity"] == pytest.approx(host["perplexity"], rel=1e-5)
    assert auto["perplexity"] == bf16["perplexity"]  # generic multiplies fp32 as it is
    assert int8["perplexity"] != bf16["perplexity"]
    assert bf16["scored_tokens"] == int8["scored_tokens"] == host["scored_tokens"] == 247


def test_eval_refuses_to_record_what_it_cannot(model, text, tmp_path):
    for arguments, message in (
        (("--record", tmp_path / "no" / "counts.pt"), "expected a file in a folder that exists"),
        (("--record", tmp_path / "counts.pt", "--experts", "host"), "expected --experts cpumoe"),
    ):
        result = run("eval", model, "--text", text, *map(str, arguments), code=2)
        assert f"error: --record: {message}" in result.stderr


def test_dtype_auto_is_what_the_model_has(model, text):
    options = ("eval", model, "--text", text, "--isa", "generic", "--json")
    own, bf16 = (
        json.loads(run(*options, "--dtype", dtype).stdout)["results"][0]["perplexity"]
        for dtype in ("auto", "bfloat16")
    )
    assert own == bf16


@pytest.fixture
def hub_name(model, tmp_path, monkeypatch):
    """The name of the model on the hub, whose cache has it; the network is not used."""
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abcd")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "0123abcd").symlink_to(model)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "someone/tiny"


def test_dtype_auto_works_for_names_on_the_hub(hub_name, text):
    run("generate", hub_name, "-p", "a", "--max-tokens", "1", "--dtype", "auto")
    result = run("eval", hub_name, "--text", text, "--dtype", "auto", "--json")
    assert json.loads(result.stdout)["dtype"] == "bfloat16"


def test_eval_says_which_dtype_auto_was(model, text, tmp_path):
    options = ("--text", text, "--max-tokens", "9", "--dtype", "auto", "--json")
    assert json.loads(run("eval", model, *options).stdout)["dtype"] == "bfloat16"
    other = shutil.copytree(model, tmp_path / "fp32")
    edit_config(other, dtype="float32")
    assert json.loads(run("eval", str(other), *options).stdout)["dtype"] == "float32"


def test_eval_measures_dense_layers_too(model, text, monkeypatch):
    from cpumoe.integrations.transformers import dense

    monkeypatch.setattr(dense, "_LEAST_BYTES", 0)
    options = ("--text", text, "--max-tokens", "40", "--dtype", "float32", "--json")
    host, native, rounded = (
        json.loads(run("eval", model, *options, "--dense", each).stdout)["results"][0]["perplexity"]
        for each in ("host", "native", "mxfp4")
    )
    assert native == pytest.approx(host, rel=1e-5)
    assert rounded != pytest.approx(host, rel=1e-3)


def test_eval_prints_a_table(model, text):
    output = run("eval", model, "--text", text, "--max-tokens", "40").stdout
    assert "39 tokens" in output
    assert "perplexity" in output
    assert "vs." not in output


def test_eval_compares_with_the_host_or_the_first_row(model, text):
    options = ("eval", model, "--text", text, "--max-tokens", "40", "--isa", "generic")
    output = run(*options, "--precision", "bf16,int8").stdout
    bf16, int8 = (
        next(line for line in output.splitlines() if name in line.split())
        for name in ("bf16", "int8")
    )
    assert "vs. first row" in output
    assert "+0.000 %" in bf16
    assert "0.000 %" not in int8
    output = run(*options, "--precision", "int8", "--experts", "all").stdout
    (host,) = (line for line in output.splitlines() if "host" in line.split()[:1])
    assert "vs. host" in output
    assert "+0.000 %" in host
    assert output.count("0.000 %") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text FILE is required with MODEL"),
        (["--text", "/does/not/exist"], "--text: /does/not/exist: No such file or directory"),
        (["--text", "TEXT", "--experts", "gpu"], "--experts: expected cpumoe, host or all"),
        (["--text", "TEXT", "--window", "513"], "--window: expected at most the model's context"),
        (["--text", "TEXT", "--window", "8", "--stride", "9"], "stride"),
        (["--text", "TEXT", "--precision", "int3"], "--precision"),
        (
            ["--text", "TEXT", "--experts", "host", "--precision", "int8"],
            "cannot be combined with --experts host",
        ),
        (
            ["--text", "TEXT", "--experts", "host", "--isa", "generic"],
            "cannot be combined with --experts host",
        ),
    ],
)
def test_eval_explains_mistakes(model, text, arguments, message):
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    assert message in run("eval", model, *arguments, code=2).stderr
