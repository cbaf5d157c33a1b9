"""Every program of examples/ runs, without arguments and with a checkpoint of one's own."""

import ast
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from tiny_models import byte_tokenizer, gpt_oss

from cpumoe import WEIGHT_FORMATS

FOLDER = Path(__file__).parents[2] / "examples"
# The exact output of each program.
OUTPUT = {
    "bar_chart": r"wrote bar_chart\.svg: .*generic.*\n",
    "layer_from_tensors": r"Experts\(mxfp4, .*\)\nrelative error .*: \d\.\de-0[67]\n",
    "layer_of_a_checkpoint": r"layer 3 of 4 layers .*\noutput: \[4, 256\], .*\nexpert 0 has .*\n",
    "openai_client": r"cpumoe-tiny continues: In the beginning.+\n(?s:.+)\n",
    "overlap_with_submit": r"Experts\(.*\): 16 tokens, .*\n.* the same bits\n",
    "own_moe_module": r"MixtureOfExperts\((?s:.*)\[2, 7, 256\] -> \[2, 7, 256\]\n",
    "transformers_model": r"DeepseekV4ForCausalLM: 4 layers .*\nIn the beginning (?s:.+)\n",
    "validate_checkpoint": r"(\w+ +largest error: \d+% of its bound\n)+",
}
OF_A_CHECKPOINT = (
    "layer_of_a_checkpoint",
    "overlap_with_submit",
    "own_moe_module",
    "validate_checkpoint",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a program as the interpreter would; returns what it printed to standard output."""

    def run_program(name, *arguments):
        path = FOLDER / f"{name}.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with warnings.catch_warnings():
            # A user must not copy a name that is deprecated.
            warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
            warnings.filterwarnings("error", category=FutureWarning, module="__main__")
            code = None
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                code = end.code
        assert not code
        return capfd.readouterr().out

    return run_program


@pytest.mark.parametrize("name", sorted(OUTPUT))
def test_example_runs_without_arguments(name, run):
    assert re.fullmatch(OUTPUT[name], run(name))


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_example_takes_a_checkpoint(name, run, kimi):
    assert re.search(r"int4|of its bound|\[2, 7, 64\]", run(name, kimi))


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
def test_layer_from_tensors_takes_a_format(fmt, run):
    expected = rf"Experts\({fmt}, .*\)\nrelative error .*: \d\.\de-0[67]\n"
    assert re.fullmatch(expected, run("layer_from_tensors", fmt))


def test_transformers_example_takes_a_checkpoint(run, tmp_path):
    folder = tmp_path / "gpt-oss"
    gpt_oss(folder)
    byte_tokenizer(folder)
    assert run("transformers_model", folder).startswith("GptOssForCausalLM: 3 layers of experts")


def test_bar_chart_takes_a_file_of_bench(run, tmp_path):
    row = '{"isa": "generic", "tokens": 1, "tokens_per_second": 7}'
    document = f'{{"machine": {{"cpu": "one", "threads": 2}}, "rows": [{row}]}}'
    (tmp_path / "bench.json").write_text(document)
    assert run("bar_chart", "bench.json") == "wrote bar_chart.svg: generic\n"
    assert "<svg" in (tmp_path / "bar_chart.svg").read_text()
    other = row.replace('"tokens"', '"format": "int4", "tokens"')
    document = document.replace(row, f"{other}, {other.replace('int4', 'fp8')}")
    (tmp_path / "formats.json").write_text(document)
    said = run("bar_chart", "formats.json")
    assert said == "wrote bar_chart.svg: generic int4, generic fp8\n"


def test_every_example_is_run_described_and_short():
    files = sorted(FOLDER.glob("*.py"))
    assert [file.stem for file in files] == sorted(OUTPUT)
    table = (FOLDER / "README.md").read_text("utf-8")
    for file in files:
        text = file.read_text("utf-8")
        docstring = ast.get_docstring(ast.parse(text))
        assert f"    python {file.name}" in docstring, f"{file.name}: how is it run?"
        assert f"[{file.name}]({file.name})" in table, f"{file.name}: no row in the table"
        assert len(text.splitlines()) <= 60, file.name
