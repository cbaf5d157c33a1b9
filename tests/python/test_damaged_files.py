"""Whatever is wrong with a model's files, commands end in one line that names the file."""

import json
import shutil

import pytest
import tiny_models
import torch
from checkpoint_tools import edit_config, edit_tensors, split_into_shards
from cli_tools import refuse, run
from safetensors.torch import load_file

from cpumoe.checkpoint import CheckpointError
from cpumoe.integrations.transformers import LanguageModel, disable, enable, from_pretrained
from cpumoe.integrations.transformers.host_files import check_vocabulary, host_reads
from cpumoe.integrations.transformers.loading import from_pretrained_by_host

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
SETTINGS = ["config.json", "generation_config.json", "tokenizer_config.json"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
WRONG_VALUES = {
    "model_type": 7,
    "tokenizer_class": 7,
    "added_tokens": 7,
    "model": 7,
    "eos_token_id": "x",
    "metadata": {},
    "weight_map": 7,
}
DAMAGES = {
    "pointer": lambda content: POINTER,
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 4,
    "half": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "wrong values": lambda content: json.dumps(WRONG_VALUES).encode(),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    source, target = (tmp_path_factory.mktemp(name) for name in ("single", "shards"))
    tiny_models.gpt_oss(source)
    tiny_models.byte_tokenizer(target)
    split_into_shards(source, target, 3)
    shutil.copy(source / "generation_config.json", target)
    return target


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def generation(folder):
    return ("generate", folder, "-p", "Once", "--max-tokens", "2")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*SETTINGS, "tokenizer.json", INDEX, *SHARDS])
def test_a_damaged_file_is_named(model, file, damage):
    path = model / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    line = refuse(*generation(model))
    # A valid file may contradict the rest of the folder.
    assert file in line or (damage == "wrong values" and str(model) in line)
    assert len(line) < 700


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", INDEX, *SHARDS])
def test_a_missing_file_is_named(model, file):
    (model / file).unlink()
    line = refuse(*generation(model))
    assert file in line or "tokenizer" in line


@pytest.mark.parametrize("damage", ["pointer", "garbage"])
def test_a_chat_template_is_a_file_like_others(model, damage):
    (model / "chat_template.jinja").write_bytes(DAMAGES[damage](b""))
    assert "chat_template.jinja: " in refuse(*generation(model))


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--text", __file__),
        ("eval", "--text", __file__, "--experts", "host"),
        ("serve", "--port", "0"),
        ("chat",),
    ],
    ids=lambda command: " ".join(word for word in command if word.isalpha()),
)
@pytest.mark.parametrize("file", [SHARDS[0], "tokenizer.json"])
def test_other_commands_name_the_file_too(model, command, file):
    (model / file).write_bytes(POINTER)
    assert f"{file}: a Git LFS pointer" in refuse(command[0], model, *command[1:])


def test_a_sound_copy_generates(model):
    result = run(*generation(model))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_an_index_without_metadata_says_what_to_add(model, metadata):
    index = json.loads((model / INDEX).read_text())
    del index["metadata"]
    (model / INDEX).write_text(json.dumps(index | ({"metadata": metadata} if metadata else {})))
    assert "index.json: metadata: transformers expects an object" in refuse(*generation(model))


def test_the_folder_of_the_hubs_cache_is_not_the_checkpoint(model, tmp_path):
    cache = tmp_path / "models--openai--gpt-oss-20b"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    shutil.move(model, snapshot)
    assert refuse(*generation(cache)).endswith(f"whose snapshot is {snapshot}\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"head_dim": -64},
        {"vocab_size": "many"},
        {"layer_types": ["none"] * tiny_models.LAYERS},
        {"rope_scaling": 7},
        {"num_hidden_layers": 10**8},
        {"architectures": 7},
        {"architectures": [7]},
        {"num_nextn_predict_layers": "x"},
        {"hidden_act": None, "rms_norm_eps": "x"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_the_host_stumbles_over_are_one_line(model, changes):
    edit_config(model, **changes)
    result = run(*generation(model))
    assert result.exit_code in (0, 2)
    assert result.exit_code == 0 or (str(model) in result.stderr or "config.json" in result.stderr)


def test_as_many_layers_as_the_config_claims_must_be_there(model):
    edit_config(model, num_hidden_layers=10**8)
    message = (
        "config.json: num_hidden_layers: expected at most 3, as the weights have, got 100000000"
    )
    assert message in refuse(*generation(model))


def test_a_truncated_dense_shard_is_found_whoever_loads(tmp_path):
    """The shard holds no expert, so that only transformers would read it."""
    single, folder = tmp_path / "single", tmp_path / "model"
    folder.mkdir()
    tiny_models.gpt_oss(single)
    tensors = load_file(single / "model.safetensors")
    edit_tensors(single, {"lm_head.weight": None})
    split_into_shards(single, folder, 1)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "dense.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    edit_config(folder)
    shard = folder / "dense.safetensors"
    tiny_models.save_file({"lm_head.weight": tensors["lm_head.weight"]}, shard, {"format": "pt"})
    shard.write_bytes(shard.read_bytes()[:-8])
    for load in (from_pretrained, from_pretrained_by_host):
        with pytest.raises(CheckpointError, match=r"dense.safetensors: truncated: expected"):
            load(folder)
    enable()
    try:
        with pytest.raises(CheckpointError, match=r"dense.safetensors: truncated: expected"):
            tiny_models.GptOssForCausalLM.from_pretrained(folder)
    finally:
        disable()


def test_a_tokenizer_of_another_model_is_refused(model):
    tokenizer = LanguageModel.from_pretrained(model).tokenizer
    check_vocabulary(tokenizer, tokenizer.vocab_size, model)
    with pytest.raises(CheckpointError, match=r"tokenizer: expected a vocabulary of at most 100"):
        check_vocabulary(tokenizer, 100, model)


def test_errors_of_the_hosts_stay_apart_from_ours():
    message = r"^x: transformers cannot read it: AttributeError: 'ParameterDict' object has no"
    with pytest.raises(CheckpointError, match=message), host_reads("x"):
        torch.nn.ParameterDict()["a"]
    with pytest.raises(RuntimeError, match="can't allocate memory"), host_reads("x"):
        torch.empty(1 << 60)
    with pytest.raises(torch.OutOfMemoryError), host_reads("x"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    unknown = "unexpected keyword argument 'dtpye'"
    with pytest.raises(TypeError, match=unknown), host_reads("x", {"dtpye"}):
        raise TypeError(unknown)
    with pytest.raises(CheckpointError, match=unknown), host_reads("x", {"token", "unexpected"}):
        raise TypeError(unknown)
    with pytest.raises(KeyboardInterrupt), host_reads("x"):
        raise KeyboardInterrupt
