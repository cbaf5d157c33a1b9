import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from checkpoint_tools import write_small
from safetensors.torch import load_file

from cpumoe.checkpoint import open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.formats.scale_choice import ScaleChoice
from cpumoe.measure.layer_weights import LayerWeights
from cpumoe.models import find_model
from cpumoe.models.synth import PATTERNS, random_matrix, write_checkpoint

MODELS = ("v4-flash", "gpt-oss-20b", "kimi-k2", "kimi-k2.5", "Mixtral-8x7B", "GLM-4.5-Air")


def dense(fmt, matrix):
    return fmt.dense(matrix)


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_normal_and_experts_differ(tmp_path, model):
    spec = find_model(model)
    write_small(tmp_path, model)
    reader = open_checkpoint(tmp_path)
    fmt = WEIGHT_FORMATS[reader.format]
    assert reader.format == spec.weight_format
    assert reader.activation == spec.activation
    assert reader.layers() == [spec.first_moe_layer, spec.first_moe_layer + 1]
    experts = [
        dense(fmt, matrix)
        for layer in reader.layers()
        for index in range(3)
        for matrix in (reader.expert(layer, index).gate, reader.expert(layer, index).up)
    ]
    for weights in experts:
        assert weights.std() == pytest.approx(0.02, rel=0.1)
        assert abs(weights.mean()) < 0.002
    distinct = {tuple(weights.flatten().tolist()) for weights in experts}
    assert len(distinct) == len(experts)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=lambda f: f.name)
def test_patterns(fmt, pattern):
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(fmt, 16, 128, pattern, generator)
    fmt.check_scales(matrix.scales, "scales")
    w = dense(fmt, matrix)
    assert w.shape == (16, 128)
    assert 0.001 < w.abs().mean() < 0.2
    if pattern == "uniform":
        assert len(w.unique()) == 1
    elif pattern == "alternating":
        assert (w[:, 0::2] > 0).all()
        assert (w[:, 1::2] < 0).all()
    elif pattern == "ramp":
        assert (w[0, 1:] >= w[0, :-1]).float().mean() > 0.9
        assert not torch.equal(w[0], w[1])
    elif fmt.values:
        assert len(torch.stack((matrix.codes & 15, matrix.codes >> 4)).unique()) == 16
    others = [dense(fmt, random_matrix(fmt, 16, 128, pattern, generator)) for _ in range(4)]
    assert not all(torch.equal(other, w) for other in others)


FP32, BF16, FP16, E8M0 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu
CHOICES = [
    ("kimi-k2", ScaleChoice(FP16), FP16, 32),
    ("kimi-k2", ScaleChoice(FP32, 64), FP32, 64),
    ("kimi-k2", ScaleChoice(by_row=True), BF16, "row"),
    ("DeepSeek-V3", ScaleChoice(BF16), BF16, 128),
    ("DeepSeek-V3", ScaleChoice(E8M0), E8M0, 128),
    ("MiniMax-M2", ScaleChoice(BF16, by_row=True), BF16, "row"),
]
OF_CHOICES = pytest.mark.parametrize(
    ("model", "choice", "dtype", "group"),
    CHOICES,
    ids=lambda value: str(getattr(value, "dtype", value)),
)


@pytest.mark.parametrize("pattern", PATTERNS)
@OF_CHOICES
def test_scales_have_the_chosen_type_and_group(tmp_path, model, choice, dtype, group, pattern):
    write_small(
        tmp_path, model, layers=1, hidden=192, intermediate=256, scales=choice, pattern=pattern
    )
    with open_checkpoint(tmp_path) as reader:
        layer = reader.layers()[0]
        fmt = WEIGHT_FORMATS[reader.format]
        expert = reader.expert(layer, 2)
        assert reader.scale_dtypes(layer, range(3)) == {dtype}
        made = LayerWeights.from_pattern(reader, layer, pattern, limit=1).experts[0]
    for matrix, alike in ((expert.up, made.up), (expert.down, made.down)):
        assert matrix.group_size == (matrix.shape[-1] if group == "row" else group)
        assert alike.scale_grid == matrix.scale_grid
        assert alike.scales.dtype == matrix.scales.dtype == dtype
        weights = dense(fmt, matrix)
        assert 0.001 < weights.abs().mean() < 0.2
        if pattern == "normal":
            assert weights.std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("model", "choice", "message"),
    [
        ("kimi-k2", ScaleChoice(E8M0), "int4: scales: expected bfloat16 or float16 or float32"),
        ("kimi-k2", ScaleChoice(None, 48), "int4: weights that share a scale: expected"),
        ("DeepSeek-V3", ScaleChoice(FP16), "fp8: scales: expected float32 or bfloat16 or"),
        ("DeepSeek-V3", ScaleChoice(None, 64), "fp8: scales belong to blocks of 128 x 128 weights"),
        ("v4-flash", ScaleChoice(BF16), "mxfp4: scales: expected float8_e8m0fnu or uint8, got"),
        ("v4-flash", ScaleChoice(by_row=True), "mxfp4: weights that share a scale: expected 32,"),
        ("v4-flash", ScaleChoice(E8M0), "DeepSeek-V4-Flash: its checkpoint layout has one type"),
        ("Mixtral-8x7B", ScaleChoice(BF16), "bf16: scales: expected none, got bfloat16"),
    ],
)
def test_other_choices_of_scales_are_refused(tmp_path, model, choice, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_small(tmp_path, model, scales=choice)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_writes_the_same_bytes(tmp_path, model):
    write_small(tmp_path / "a", model, pattern="random")
    write_small(tmp_path / "b", model, pattern="random")
    write_small(tmp_path / "c", model, pattern="random", seed=1)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_deepseek_v4_router_tensors(tmp_path):
    write_small(tmp_path, "v4-flash", layers=4)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in range(4):
        prefix = f"layers.{layer}.ffn.gate"
        assert stored[f"{prefix}.weight"].shape == (3, 64)
        assert stored[f"{prefix}.weight"].dtype == torch.bfloat16
        if layer == 3:
            assert f"{prefix}.tid2eid" not in stored
            assert stored[f"{prefix}.bias"].dtype == torch.float32
            continue
        table = stored[f"{prefix}.tid2eid"]
        assert table.shape == (129280, 2)
        assert table.dtype == torch.int64
        assert table.min() == 0
        assert table.max() == 2
        assert (table[:, 0] != table[:, 1]).all()
    assert f"{prefix}.bias" in stored


@pytest.mark.parametrize(
    "model", ["v4-flash", "gpt-oss-20b", "kimi-k2", "Mixtral-8x7B", "GLM-4.5-Air", "Qwen3-30B-A3B"]
)
def test_transformers_reads_the_config(tmp_path, model):
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    write_small(tmp_path, model)
    if model == "kimi-k2":  # remote code; its classes are DeepSeek-V3's
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"kimi_k2"', '"deepseek_v3"'))
    config = auto.AutoConfig.from_pretrained(tmp_path)
    assert config.hidden_size == 64
    assert config.num_local_experts == 3
    assert config.num_experts_per_tok == 2


def test_shards_are_bounded_and_indexed(tmp_path):
    seen = []
    write_small(
        tmp_path, "kimi-k2", max_shard_bytes=20_000, progress=lambda *done: seen.append(done)
    )
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(
            tensors
        )
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[0] == index["metadata"]["total_size"]
    reader = open_checkpoint(tmp_path)
    for layer in reader.layers():
        for expert in range(3):
            reader.expert(layer, expert)


def test_default_sizes_are_the_models(tmp_path):
    spec = find_model("gpt-oss-20b")
    write_checkpoint(tmp_path, spec, layers=1, experts=1, pattern="random")
    reader = open_checkpoint(tmp_path)
    assert reader.top_k == 1
    assert reader.hidden_size == reader.intermediate_size == 2880
    assert reader.expert(0, 0).nbytes == spec.expert_bytes - 2 * 3 * 2880


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 33}, "mxfp4: hidden_size must be a multiple of 2, because a byte has 2 codes"),
        ({"intermediate": 33}, "mxfp4: intermediate_size must be a multiple of 2, because a byte"),
        ({"layers": 0}, "layers: must be positive, got 0"),
        ({"experts": -1}, "experts: must be positive, got -1"),
        ({"top_k": 4}, r"top_k: must be at most experts \(3\), got 4"),
        ({"pattern": "stripes"}, "pattern: expected one of normal, .*, got 'stripes'"),
    ],
)
def test_sizes_that_cannot_be_written(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        write_small(tmp_path / "out", "v4-flash", **sizes)
    assert not (tmp_path / "out").exists()


def test_models_without_a_layout_are_refused(tmp_path):
    spec = dataclasses.replace(find_model("v4-flash"), layout="other")
    message = (
        "DeepSeek-V4-Flash: its mxfp4 checkpoint layout cannot be written yet; .* deepseek_v4, gpt"
    )
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path, spec)


def test_a_folder_in_use_is_kept_unless_told(tmp_path):
    write_small(tmp_path, "gpt-oss-20b", max_shard_bytes=1000)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match="expected an empty folder; name another one, or pass --overwrite"
    ):
        write_small(tmp_path, "gpt-oss-20b")
    write_small(tmp_path, "gpt-oss-20b", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    with pytest.raises(FileExistsError, match="expected a folder to write to, got a file"):
        write_small(tmp_path / "notes.txt", "gpt-oss-20b")


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000, total=10**12))
    with pytest.raises(OSError, match=r"needs 0.0 GB; 0.0 GB are free; write fewer layers or ex"):
        write_small(tmp_path, "kimi-k2")


def test_more_than_the_disk_holds_is_refused_at_once(tmp_path):
    with pytest.raises(OSError, match=r"new/folder: the checkpoint needs .* GB; .* GB are free"):
        write_small(tmp_path / "new" / "folder", "kimi-k2", experts=10**9, hidden=4096)
    assert not (tmp_path / "new").exists()


def test_overwriting_counts_the_space_that_it_frees_and_deletes_nothing_too_early(
    tmp_path, monkeypatch
):
    write_small(tmp_path, "kimi-k2")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000, total=10**12))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="write fewer layers or experts"):
        write_small(tmp_path, "kimi-k2", overwrite=True, experts=16)
    assert sorted(tmp_path.iterdir()) == before
    write_small(tmp_path, "kimi-k2", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_half_written_is_deleted(tmp_path, error):
    def stop(done, total):
        if done > total / 2:
            raise error

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(error):
        write_small(tmp_path, "kimi-k2", max_shard_bytes=20_000, overwrite=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failing_last_step_deletes_all(tmp_path, monkeypatch):
    monkeypatch.setattr("cpumoe.models.synth._layer_pieces", lambda *_: iter(()))
    with pytest.raises(ValueError, match="expected all declared bytes, got fewer"):
        write_small(tmp_path, "kimi-k2", max_shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_spares_what_the_index_does_not_list(tmp_path):
    write_small(tmp_path, "gpt-oss-20b", max_shard_bytes=1000)
    before = sorted(tmp_path.iterdir())
    other = tmp_path / "adapter.safetensors"
    other.write_bytes(b"mine")
    with pytest.raises(
        FileExistsError, match=r"does not list adapter.safetensors \(1 such files\)"
    ):
        write_small(tmp_path, "gpt-oss-20b", overwrite=True)
    assert sorted(tmp_path.iterdir()) == sorted([other, *before])


@pytest.mark.parametrize("index", ["[", "[]", '{"weight_map": {"a": ["b"]}}'])
def test_overwriting_a_folder_with_a_damaged_index(tmp_path, index):
    write_small(tmp_path, "gpt-oss-20b")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    write_small(tmp_path, "gpt-oss-20b", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_overwriting_deletes_no_other_file_that_the_index_names(tmp_path):
    out = tmp_path / "out"
    write_small(out, "gpt-oss-20b")
    victims = (tmp_path / "victim.safetensors", out / "notes.txt")
    for victim in victims:
        victim.write_text("mine")
    files = {"a": "../victim.safetensors", "b": "notes.txt"}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    write_small(out, "gpt-oss-20b", overwrite=True)
    assert all(victim.exists() for victim in victims)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_deletes_nothing(v4, seed):
    before = sorted(v4.iterdir())
    message = re.escape(f"seed: expected 0 to 2**63 - 1, got {seed}")
    with pytest.raises(ValueError, match=message):
        write_small(v4, "v4-flash", overwrite=True, seed=seed)
    assert sorted(v4.iterdir()) == before
    write_small(v4, "v4-flash", overwrite=True, seed=2**63 - 1)
