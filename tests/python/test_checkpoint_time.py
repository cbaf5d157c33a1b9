"""The time to read a checkpoint's files grows in proportion to the files."""

import gc
import json
import time
from contextlib import suppress

import pytest
from checkpoint_tools import edit_config, write_small
from test_compressed_tensors import edit_quantization

from cpumoe.checkpoint import CheckpointError, open_checkpoint, patterns
from cpumoe.cli.inspect_model import collect

MODULE = "model.layers.2.mlp.experts.0.gate_proj"
# An expert's tensors in a layer. The names before them differ between the readers.
TENSORS = {
    "v4-flash": "layers.{layer}.ffn.experts.0.w{n}.weight",
    "kimi-k2": "model.layers.{layer}.mlp.experts.{n}.gate_proj.weight_packed",
    "gpt-oss-20b": "model.layers.{layer}.mlp.experts.gate_up_proj_blocks{n}",
}


def seconds(function, *arguments):
    """CPU time of a call. Garbage collection is off, because its time is not in proportion."""
    gc.disable()
    try:
        start = time.process_time()
        function(*arguments)
        return time.process_time() - start
    finally:
        gc.enable()


def with_layers(folder, model, count, **config):
    """A checkpoint of so many layers whose shard is missing."""
    names = [TENSORS[model].format(layer=layer, n=n) for layer in range(count) for n in range(4)]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_config(folder, num_hidden_layers=count, **config)


@pytest.mark.parametrize("model", TENSORS)
@pytest.mark.parametrize("method", ["its own", "awq"])
def test_the_time_is_in_proportion_to_the_layers(tmp_path, model, method):
    write_small(tmp_path, model)
    config = {"quantization_config": {"quant_method": method}} if method == "awq" else {}
    times = []
    for count in (1000, 4000):
        with_layers(tmp_path, model, count, **config)
        reader = open_checkpoint(tmp_path)
        assert len(reader.layers()) == count
        times.append(min(seconds(reader.tensor_names) for _ in range(3)))
    assert times[1] < 10 * times[0]  # quadratic: 16


def test_inspecting_many_layers_ends(v4):
    with_layers(v4, "v4-flash", 10_000)
    assert seconds(collect, str(v4)) < 10


def test_a_long_name_is_refused(v4):
    name = "layers.1." * 60_000 + "experts."
    index = {"metadata": {}, "weight_map": {name: "model-1.safetensors"}}
    (v4 / "model.safetensors").unlink()
    (v4 / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_config(v4, quantization_config=None)
    message = "expected tensor names of at most 1000 characters, got 540008: layers"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(v4)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(.*)*X",
        r"(?:.*.){30}X",
        r"(?:(?:(?:.{0,4}){0,4}){0,4})X",
        r"^(([a-z._0-9])+.)+[A-Z]([a-z])+$",
        r"(?=(.*)*X)",
        r"((\w+\.?)+)+!",
        r"(.+)+\1{3}X",
    ],
)
def test_patterns_that_explode_do_not(kimi, pattern, monkeypatch):
    assert patterns._SECONDS <= 2
    monkeypatch.setattr(patterns, "_SECONDS", 0.1)
    edit_quantization(kimi, ignore=[f"re:{pattern}"])

    def read():
        with suppress(CheckpointError):  # the time limit is exceeded
            assert open_checkpoint(kimi).unsupported == ()

    assert seconds(read) < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a" * 501, "has 501 characters, expected at most 500"),
        ("(a{65535}){65535}", "repeats 4294836225 times, expected at most 100"),
        ("(?:" * 40 + "a" + "){2}" * 40, "repeats 1099511627776 times, expected at most 100"),
        ("a{e<=3}", "has braces without a count"),
        ("(", "is no regular expression: missing"),
        (r"\p{L}", r"is no regular expression: bad escape"),
    ],
)
def test_patterns_that_would_be_costly_are_refused(kimi, pattern, message):
    for key in ("ignore", "targets"):
        target = [f"re:{pattern}"]
        if key == "targets":
            edit_quantization(kimi, config_groups={"g": {"targets": target}})
        else:
            edit_quantization(kimi, ignore=target)
        with pytest.raises(CheckpointError, match=rf"config.json: \S*{key}: 're:") as error:
            open_checkpoint(kimi)
        assert message in str(error.value)
        assert len(str(error.value)) < 600


def test_time_is_shared_by_all_patterns(kimi, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)
    edit_quantization(kimi, ignore=[f"re:.*X{i}" for i in range(10**4)])
    with pytest.raises(CheckpointError, match=r"take less than 0.05 s for all modules"):
        open_checkpoint(kimi)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r".*mlp\.experts", True),
        (r"model\.layers\.\d{1,2}\..*gate_proj$", True),
        (r"^(?!.*experts).*", False),
        (r"(?!.*shared_experts).*_proj", True),
        (r".*\.(?:up|down)_proj", False),
        (r"mlp", False),
        (r".*self_attn.*", False),
        (r".*\{", False),
    ],
)
def test_patterns_match_as_in_compressed_tensors(pattern, matches):
    modules = patterns.ModulePatterns()
    (target,) = modules.checked([f"re:{pattern}"], "ignore")
    assert modules.is_pattern(target)
    assert modules.matches(target, MODULE) is matches
