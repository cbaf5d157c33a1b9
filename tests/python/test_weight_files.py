"""Experts and dense weights come from the same files, whatever else lies in the folder."""

import json

import pytest
import tiny_models
import torch
from checkpoint_tools import edit_config, split_into_shards, write_small
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cpumoe
from cpumoe.checkpoint import CheckpointError, SafetensorsFolder, open_checkpoint
from cpumoe.cli.inspect_model import collect
from cpumoe.integrations.transformers import ExpertsOptions, disable, enable, from_pretrained
from cpumoe.integrations.transformers.loading import from_pretrained_by_host

TOKENS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def beside_an_index(folder, other):
    """transformers takes the single file."""
    split_into_shards(other, folder, 2)
    return {}


def beside_an_index_without_shards(folder, other):
    split_into_shards(other, folder, 2)
    for shard in SHARDS:
        (folder / shard).unlink()
    return {}


def named_by_the_config(folder, other):
    (folder / "model.safetensors").rename(folder / "ours.safetensors")
    (other / "model.safetensors").rename(folder / "model.safetensors")
    edit_config(folder, transformers_weights="ours.safetensors")
    return {}


def in_a_folder_named_by_the_config(folder, other):
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub/ours.safetensors")
    (other / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "sub/config.json").write_text("{}")
    edit_config(folder, transformers_weights="sub/ours.safetensors")
    return {}


def an_index_named_by_the_config(folder, other):
    split_into_shards(folder, folder, 2, "ours.safetensors.index.json")
    (other / "model.safetensors").replace(folder / "model.safetensors")
    edit_config(folder, transformers_weights="ours.safetensors.index.json")
    return {}


def a_variant(folder, other):
    (folder / "model.safetensors").rename(folder / "model.ours.safetensors")
    (other / "model.safetensors").rename(folder / "model.safetensors")
    return {"variant": "ours"}


def a_variant_in_shards(folder, other):
    split_into_shards(folder, folder, 2, "model.safetensors.index.ours.json")
    (other / "model.safetensors").replace(folder / "model.safetensors")
    return {"variant": "ours"}


def shards_in_a_folder(folder, other):
    """An index may name files in folders."""
    split_into_shards(folder, folder, 2)
    (folder / "sub").mkdir()
    for shard in SHARDS:
        (folder / shard).rename(folder / "sub" / shard)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"sub/{shard}" for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return {}


CASES = [
    beside_an_index,
    beside_an_index_without_shards,
    named_by_the_config,
    in_a_folder_named_by_the_config,
    an_index_named_by_the_config,
    a_variant,
    a_variant_in_shards,
    shards_in_a_folder,
]


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two checkpoints of a model that share no weight."""
    ours, other = (tmp_path_factory.mktemp(name) for name in ("ours", "other"))
    tiny_models.gpt_oss(ours)
    tensors = load_file(ours / "model.safetensors")
    flipped = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
    save_file(flipped, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_bytes((ours / "config.json").read_bytes())
    return ours, other


@pytest.fixture(params=CASES, ids=[case.__name__ for case in CASES])
def mixed(request, versions, tmp_path):
    """A folder with both checkpoints, and the arguments that select `ours`."""
    folder, other = (copied(source, tmp_path / source.name) for source in versions)
    return folder, request.param(folder, other)


def copied(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_experts_are_of_the_version_that_the_host_loads(mixed, versions):
    folder, arguments = mixed
    expected = logits(from_pretrained_by_host(folder, dtype=torch.float32, **arguments))
    assert (
        distance(logits(from_pretrained_by_host(versions[0], dtype=torch.float32)), expected) == 0
    )
    options = ExpertsOptions(isa="generic")
    ours = from_pretrained(folder, dtype=torch.float32, options=options, **arguments)
    assert distance(logits(ours), expected) < 1e-5


def test_so_they_are_where_the_host_is_called(mixed, versions):
    folder, arguments = mixed
    enable(ExpertsOptions(isa="generic"))
    try:
        actual = AutoModelForCausalLM.from_pretrained(folder, **arguments)
        expected = AutoModelForCausalLM.from_pretrained(versions[0])
    finally:
        disable()
    assert torch.equal(logits(actual), logits(expected))


def test_the_reader_alone_takes_the_hosts_files(mixed, versions):
    folder, arguments = mixed
    with open_checkpoint(folder, **arguments) as reader, open_checkpoint(versions[0]) as expected:
        assert reader.folder.missing_shards() == []
        actual = cpumoe.Experts.from_checkpoint(reader, 1).export(0)
        wanted = cpumoe.Experts.from_checkpoint(expected, 1).export(0)
    assert torch.equal(actual.gate.codes, wanted.gate.codes)
    if not arguments:
        assert collect(str(folder))["supported"]


def test_a_config_of_the_callers_may_name_other_weights(versions, tmp_path):
    folder, other = (copied(source, tmp_path / source.name) for source in versions)
    (other / "model.safetensors").rename(folder / "other.safetensors")
    config = from_pretrained(folder).config
    config.quantization_config = json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]
    config.transformers_weights = "other.safetensors"
    expected = logits(from_pretrained(versions[1]))
    assert torch.equal(logits(from_pretrained(folder, config=config)), expected)


def test_checkpoints_in_a_subfolder(versions, tmp_path):
    copied(versions[1], tmp_path / "other")
    copied(versions[0], tmp_path / "other" / "sub")
    actual = from_pretrained(tmp_path / "other", subfolder="sub")
    assert torch.equal(logits(actual), logits(from_pretrained(versions[0])))


def test_weights_that_are_not_there_are_named_and_so_is_what_is(v4):
    with pytest.raises(FileNotFoundError, match=r"neither model.fp8.safetensors nor .*; it has"):
        open_checkpoint(v4, variant="fp8")
    (v4 / "model.safetensors").rename(v4 / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"index.json; it has pytorch_model.bin$"):
        open_checkpoint(v4)
    edit_config(v4, transformers_weights="gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"_weights: gone.safetensors is missing"):
        open_checkpoint(v4)


@pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "weights.bin", 7, "", "\0"])
def test_a_config_may_not_name_files_elsewhere(v4, file):
    edit_config(v4, transformers_weights=file)
    with pytest.raises(CheckpointError, match=r"_weights: expected a file in the folder"):
        open_checkpoint(v4)


def test_what_more_than_the_folder_decides_is_refused(v4):
    edit_config(v4, configuration_files=["config.4.0.0.json"])
    with pytest.raises(CheckpointError, match="configuration_files: expected one config"):
        open_checkpoint(v4)
    edit_config(v4, configuration_files=None)
    (v4 / "shard-00001-model-00001-of-00001.safetensors").touch()
    with pytest.raises(CheckpointError, match="part of a checkpoint of distributed training"):
        open_checkpoint(v4)


def test_a_tensor_in_two_shards_is_refused(v4, tmp_path):
    split_into_shards(v4, tmp_path, 2)
    first, second = (tmp_path / shard for shard in SHARDS)
    tensors, more = load_file(first), load_file(second)
    name = next(iter(more))
    save_file(tensors | {name: more[name]}, first)
    message = f"{name}: expected one file that holds it, got two: .*{SHARDS[0]} and .*{SHARDS[1]}"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path).check_shards()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, files=[first, second])


def test_only_safetensors_are_read(v4):
    (v4 / "model.safetensors").rename(v4 / "model.bin")
    with pytest.raises(CheckpointError, match=r"model.bin: expected a .safetensors file"):
        open_checkpoint(v4, files=[v4 / "model.bin"])


def test_inspect_counts_the_shards_that_are_read(tmp_path):
    folder = write_small(tmp_path / "single", "v4-flash")
    split_into_shards(folder, folder, 2)
    assert collect(str(folder))["shards"] == {"present": 1, "missing": []}
