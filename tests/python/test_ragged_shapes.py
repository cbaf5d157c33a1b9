"""Matrices whose rows end within a group or block of scales, a word of codes or a tile."""

import dataclasses

import pytest
import torch
from checkpoint_tools import edit_config
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools import inputs, layer, refused

import cpumoe
from cpumoe import Experts, Linear, QuantizedMatrix
from cpumoe.checkpoint import CheckpointError, open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.formats.quantized_matrix import group_of
from cpumoe.models import find_model
from cpumoe.models.synth import PATTERNS, random_matrix, write_checkpoint

FORMATS = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=lambda fmt: fmt.name)
INT4 = WEIGHT_FORMATS["int4"]


@pytest.mark.parametrize(
    ("k", "scales", "group"),
    [
        (96, 3, 32),
        (96, 1, 96),
        (10, 1, 10),
        (100, 4, 32),
        (100, 2, 64),
        (320, 2, 160),
        (300, 2, 256),
        (200, 2, 128),
        (200, 5, None),
        (96, 0, None),
        (96, 4, None),
    ],
)
def test_scales_of_a_row_tell_the_group(k, scales, group):
    assert group_of(k, scales, 32) == group
    assert INT4.has_groups(k, group or 50) == (group is not None)


@settings(deadline=None, max_examples=60)
@given(
    fmt=st.sampled_from(list(WEIGHT_FORMATS.values())),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    times=st.sampled_from((1, 2, 4)),
)
def test_quantizing_is_that_of_rows_with_zeros_behind_them(fmt, n, k, times):
    k += not fmt.takes_k(k)
    group = times * fmt.group_size if fmt.groups_vary else None
    weights = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    matrix = fmt.quantized(weights, group)
    assert matrix.shape == (n, k)
    wide = torch.nn.functional.pad(weights, (0, -k % 512))
    expected = fmt.quantized(wide, group)
    dense = fmt.dense(expected)[:, :k]
    assert torch.equal(fmt.dense(matrix), dense)
    assert torch.equal(fmt.dense(matrix, torch.float64), fmt.dense(expected, torch.float64)[:, :k])
    if matrix.scales is not None:
        assert matrix.scales.shape[-1] == -(-k // (group or fmt.group_size))


@settings(deadline=None, max_examples=60)
@given(
    isa=st.sampled_from(cpumoe.supported_isas()),
    fmt=st.sampled_from(list(WEIGHT_FORMATS.values())),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    tokens=st.sampled_from((1, 3, 20)),
)
def test_a_dense_layer_of_any_shape(isa, fmt, n, k, tokens):
    k += not fmt.takes_k(k)
    generator = torch.Generator().manual_seed(n * k)
    matrix = fmt.quantized(torch.randn(n, k, generator=generator))
    linear = Linear.from_tensors(matrix, format=fmt.name, isa=isa)
    x = torch.randn(tokens, k, generator=generator)
    dense = fmt.dense(matrix, torch.float64)
    sizes = x.double().abs() @ dense.T.abs()
    assert ((linear(x).double() - x.double() @ dense.T).abs() <= 4e-6 * sizes).all()
    exported = linear.export()
    assert torch.equal(exported.codes.view(torch.uint8), matrix.codes.view(torch.uint8))
    assert matrix.scales is None or torch.equal(exported.scales, matrix.scales)


@FORMATS
def test_a_nan_stays_in_its_row(fmt):
    """Zeros behind a row's end are multiplied with zeros, whatever the row holds."""
    k = 20 if fmt.code_bits < 8 else 19
    linear = Linear.from_tensors(fmt.quantized(torch.randn(17, k)), format=fmt.name)
    x = torch.randn(3, k)
    clean = linear(x)
    assert clean.isfinite().all()
    for poison in (torch.nan, torch.inf):
        poisoned = x.clone()
        poisoned[1, k - 1] = poison
        assert torch.equal(linear(poisoned)[::2], clean[::2])
        assert not linear(poisoned)[1].isfinite().any()


@pytest.mark.parametrize("group", [64, 128])
def test_int4_groups_that_do_not_divide_the_row(group):
    weights = layer("int4", hidden=300, intermediate=100)
    stacks = {
        name: QuantizedMatrix(*INT4.quantize(INT4.dense(getattr(weights, name)), group))
        for name in ("gate", "up", "down")
    }
    grouped = dataclasses.replace(weights, **stacks)
    # A scale for each 32 weights of the same value.
    each = {
        name: QuantizedMatrix(
            m.codes,
            m.scales.repeat_interleave(group // 32, -1)[..., : -(-m.shape[-1] // 32)].contiguous(),
        )
        for name, m in stacks.items()
    }
    args = inputs(weights, tokens=5)
    experts = grouped.pack()
    assert torch.equal(experts(*args), dataclasses.replace(weights, **each).pack()(*args))
    assert torch.equal(experts.export(1).up.scales, grouped.up.scales[1])


@FORMATS
def test_slices_of_features_may_end_with_the_last(fmt):
    weights = layer(fmt.name, hidden=40, intermediate=302, experts=2)
    experts = weights.pack()
    start = 128 if fmt.blocks else 288
    whole = experts.export(1)
    cut = range(start, 302)

    shapes = {"gate": (len(cut), 40), "up": (len(cut), 40), "down": (40, len(cut))}
    buffers = {name: fmt.quantized(torch.ones(*shape)) for name, shape in shapes.items()}
    experts.export_into(1, **buffers, intermediate=cut)
    for name in ("gate", "up"):
        rows = fmt.dense(getattr(whole, name))[start:]
        assert torch.equal(fmt.dense(buffers[name]), rows)
    assert torch.equal(fmt.dense(buffers["down"]), fmt.dense(whole.down)[:, start:])
    with refused(
        ValueError,
        "intermediate: expected whole groups of 32 features within 0..302, got range(0, 300)",
    ):
        experts.export_into(1, **buffers, intermediate=range(300))


@pytest.mark.parametrize("pattern", PATTERNS)
@FORMATS
def test_made_up_weights_have_any_shape(fmt, pattern):
    matrix = random_matrix(fmt, 37, 22, pattern, torch.Generator().manual_seed(1))
    assert matrix.shape == (37, 22)
    assert fmt.dense(matrix).isfinite().all()


SYNTHESIZED = [
    "DeepSeek-V4-Flash",
    "DeepSeek-V4-Flash-Base",
    "Kimi-K2-Thinking",
    "DeepSeek-V3",
    "DeepSeek-R1-NVFP4",
    "Qwen3-30B-A3B",
    "Qwen3-30B-A3B-NVFP4",
]


@pytest.mark.parametrize("name", SYNTHESIZED)
def test_checkpoints_of_any_shape(tmp_path, name):
    folder = write_checkpoint(
        tmp_path / "made",
        find_model(name),
        layers=1,
        experts=2,
        hidden=52,
        intermediate=36,
        pattern="random",
    )
    with open_checkpoint(folder) as reader:
        number = reader.layers()[0]
        expert = reader.expert(number, 1)
        assert (expert.up.shape, expert.down.shape) == ((36, 52), (52, 36))
        experts = Experts.from_checkpoint(folder, layer=number)
        exported = experts.export(1)
        for part in ("gate", "up", "down"):
            ours, stored = getattr(exported, part), getattr(expert, part)
            assert torch.equal(ours.codes.view(torch.uint8), stored.codes.view(torch.uint8))
            assert stored.scales is None or torch.equal(ours.scales, stored.scales)


def test_words_of_codes_end_with_zeros_as_the_library_writes_them(tmp_path):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    folder = write_checkpoint(
        tmp_path / "made",
        find_model("Kimi-K2-Thinking"),
        layers=1,
        experts=1,
        hidden=52,
        intermediate=36,
    )
    with open_checkpoint(folder) as reader:
        number = reader.layers()[0]
        codes = reader.expert(number, 0).down.codes
        name = next(n for n in reader.folder.names() if n.endswith("down_proj.weight_packed"))
        packed = reader.folder.tensor(name, (torch.int32,), (52, 5))
        values = helpers.unpack_from_int32(packed, 4, torch.Size((52, 36)))
        assert torch.equal(helpers.pack_to_int32(values, 4), packed)
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        assert torch.equal(nibbles.to(torch.int8) - 8, values)


def test_gpt_oss_stores_whole_groups(tmp_path):
    sizes = {"layers": 1, "experts": 1, "hidden": 64}
    message = "must be a multiple of 32, because gpt-oss stores whole groups, got 40"
    with pytest.raises(ValueError, match=f"^gpt-oss-20b: intermediate_size {message}$"):
        write_checkpoint(tmp_path / "bad", find_model("gpt-oss-20b"), intermediate=40, **sizes)
    folder = write_checkpoint(
        tmp_path / "made", find_model("gpt-oss-20b"), intermediate=64, **sizes
    )
    edit_config(folder, intermediate_size=40)
    with pytest.raises(
        CheckpointError, match=r"intermediate_size: expected a multiple of 32, because gpt-oss st"
    ):
        open_checkpoint(folder)
