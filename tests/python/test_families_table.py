"""docs/families.md is generated: ``python tests/python/test_families_table.py`` refreshes it.

For each family of transformers, a tiny random model computes logits and 16 greedy tokens: with
transformers' eager experts, with experts that cpumoe reads from the saved checkpoint, with cpumoe's
dense layers besides, and with ``set_experts_implementation("cpumoe")``. ``CPUMOE_TEST_FAMILIES=1``
compares the whole page.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import families
from transformers import __version__ as transformers_version
from transformers.utils import logging

from cpumoe.checkpoint import open_checkpoint
from cpumoe.integrations.transformers import CpuExperts, ExpertsOptions, dense, from_pretrained
from cpumoe.integrations.transformers.activation import module_activation

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# One of each kind: per-expert and stacked tensors, biases, no gate, two lists of experts, a norm.
QUICK = ["gemma4", "gpt_oss", "granitemoe", "kimi_linear", "mixtral", "nemotron_h", "qwen3_moe"]
QUICK += ["ernie4_5_vl_moe", "muse_spark"]
TESTED = families.families() if os.environ.get("CPUMOE_TEST_FAMILIES") else QUICK
PROMPT = torch.arange(3, 27)[None]
NEW_TOKENS = 16
TOLERANCE = 1e-5
WORKS = "works"
MINOR = ".".join(transformers_version.split(".")[:2])
HEAD = f"""\
# Families of transformers

<!-- Generated: python tests/python/test_families_table.py -->

This table has every family of transformers {MINOR} whose experts other programs may compute. A tiny
random model of each family was saved as the family publishes its checkpoints, in bf16. The model
computed fp32 logits, and {NEW_TOKENS} tokens by always taking the most probable one.

- "from the checkpoint": cpumoe's `from_pretrained` reads the experts from the files.
- "and dense layers": so does `from_pretrained` with `ExpertsOptions(dense="native")`. The numbers
  say how many of the tiny model's dense layers cpumoe computes, as if they had the least size.
  "0 of" means that transformers' generation loop refuses the tiny model, which has linear attention
  alone. The published model has other layers as well.
- "in memory": `set_experts_implementation("cpumoe")` packs the experts of a model that transformers
  has loaded.
- "works": the logits differ from those of transformers' eager experts by at most 1e-5 (relative),
  and the tokens are equal.

Larger models that include a vision or audio tower were tested by their language part. Formats of
published checkpoints other than bf16 are [another matter](transformers.md#which-models-work).

| family | activation | from the checkpoint | and dense layers | in memory |
|---|---|---|---|---|
"""


def row(family: str) -> str:
    """The family's row of the table."""
    reference = families.tiny_model(family)
    reference.set_experts_implementation("eager")
    expected = computed(reference)
    with tempfile.TemporaryDirectory() as folder:
        families.tiny_model(family).bfloat16().save_pretrained(folder)
        stored = outcome(lambda: computed(loaded(folder, type(reference))), expected, folder)
        layers = stored if stored != WORKS else dense_outcome(folder, type(reference), expected)
    reference.set_experts_implementation("cpumoe")
    in_memory = outcome(lambda: computed(reference), expected)
    return f"| `{family}` | {activation(reference)} | {stored} | {layers} | {in_memory} |\n"


def dense_outcome(folder: str, model_class: Any, expected: tuple[torch.Tensor, list[int]]) -> str:
    """What the model computes with cpumoe's dense layers, and how many these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_LEAST_BYTES", 0)  # the model is tiny
        model = loaded(folder, model_class, dense="native")
    done = model.hf_quantizer.dense_layers
    count = f"{len(done.ours)} of {len(done.ours) + len(done.hosts)}"
    return f"{outcome(lambda: computed(model), expected)} ({count})"


def loaded(folder: str, model_class: Any, **options: Any) -> Any:
    model = from_pretrained(
        folder,
        model_class=model_class,
        dtype=torch.float32,
        options=ExpertsOptions(progress=False, **options),
    )
    assert any(isinstance(module, CpuExperts) for module in model.modules())
    return model


@torch.no_grad()
def computed(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and the most probable tokens that follow it one by one."""
    logits = families.logits(model, PROMPT)
    assert logits.isfinite().all()
    tokens = PROMPT
    for _ in range(NEW_TOKENS):
        following = families.logits(model, tokens)[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, following), 1)
    return logits, tokens[0, PROMPT.shape[1] :].tolist()


def outcome(compute: Any, expected: tuple[torch.Tensor, list[int]], folder: str = "") -> str:
    try:
        logits, tokens = compute()
    except ValueError as error:  # the error that cpumoe raises for what it does not support
        reason = str(error).removeprefix(f"{folder}: ").removeprefix("bf16 experts: ")
        return f"no: {reason.partition('; ')[0].partition('. Supported')[0]}"
    difference = ((logits - expected[0]).norm() / expected[0].norm()).item()
    if difference <= TOLERANCE and tokens == expected[1]:
        return WORKS
    return f"wrong: logits differ by {difference:.1e}, tokens are {tokens}"


def activation(model: Any) -> str:
    _, module = next(families.experts_modules(model))
    if not module.has_gate:
        return f"{model.config.mlp_hidden_act}(up)"
    try:
        glu = module_activation(module)
    except ValueError:
        return f"`{type(module.act_fn).__name__}`"
    gate = f"{glu.function}(gate)"
    if glu.alpha != 1:
        gate = f"gate · sigmoid({glu.alpha:g} gate)"
    up = f"(up + {glu.up_offset:g})" if glu.up_offset else "up"
    limit = "" if glu.limit is None else f", limit {glu.limit:g}"
    if glu.gate_cap is not None:
        limit = f", soft caps {glu.gate_cap:g} and {glu.up_cap:g}"
    return f"{gate} · {up}{limit}"


def page_rows() -> dict[str, str]:
    rows = [line for line in PAGE.read_text().splitlines(keepends=True) if line.startswith("| `")]
    return {re.match(r"\| `(\w+)`", line)[1]: line for line in rows}


of_the_pages_version = pytest.mark.skipif(
    f"transformers {MINOR} " not in PAGE.read_text(), reason="the page is of another transformers"
)


@of_the_pages_version
def test_the_page_has_every_family():
    assert PAGE.read_text() == HEAD + "".join(page_rows().values())
    assert list(page_rows()) == families.families(), "run python test_families_table.py"


@of_the_pages_version
@pytest.mark.parametrize("family", TESTED)
def test_the_page_says_what_the_family_does(family):
    assert row(family) == page_rows()[family], "run python test_families_table.py if this is right"


@of_the_pages_version
@pytest.mark.parametrize("family", TESTED)
def test_the_reader_alone_knows_the_activation_of_a_family_that_works(tmp_path, family):
    if page_rows()[family].count(f"| {WORKS}") == 3:
        model = families.tiny_model(family)
        model.bfloat16().save_pretrained(tmp_path)
        _, module = next(families.experts_modules(model))
        reader = open_checkpoint(tmp_path)
        # Where each expert's output passes a norm, a reader alone has no activation.
        expected = module_activation(module) if reader.output_norm is None else None
        assert reader.activation == expected


def test_the_page_has_no_wrong_results():
    assert "wrong:" not in PAGE.read_text()


if __name__ == "__main__":
    logging.disable_progress_bar()
    rows = []
    for name in families.families():
        rows.append(row(name))
        print(rows[-1], end="", flush=True)
    PAGE.write_text(HEAD + "".join(rows))
