"""Hostile, damaged and changing files end in one line that names them."""

import json
import os

import pytest
from checkpoint_tools import edit_config, split_into_shards
from moe_tools import PEAK_MEMORY, output_with_torch

import cpumoe
from cpumoe.checkpoint import CheckpointError, ExpertReader, open_checkpoint
from cpumoe.checkpoint.files import CONFIG_LIMIT, HEADER_LIMIT, INDEX_LIMIT, NAME_LIMIT

INDEX = "model.safetensors.index.json"


def sparse(path, size, start=b""):
    """A file whose `size` takes no disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def read_all(folder):
    with open_checkpoint(folder) as reader:
        reader.folder.check_shards()
        reader.expert(0, 0)


def refusal(folder):
    """Returns the error of opening and reading a checkpoint, which is one short line."""
    with pytest.raises(CheckpointError) as error:
        read_all(folder)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


OPENING_LONG_FILES = """
import sys
from cpumoe.checkpoint import CheckpointError, open_checkpoint
with PeakMemory() as peak:
    try:
        open_checkpoint(sys.argv[1])
    except CheckpointError as error:
        print(error)
print((peak.bytes - peak.before) >> 20)
"""


@pytest.mark.parametrize(
    ("file", "start", "message"),
    [
        ("config.json", b"{}", f"config.json: expected at most {CONFIG_LIMIT} bytes, got"),
        (INDEX, b"{}", f"{INDEX}: expected at most {INDEX_LIMIT} bytes, got 1000000000000"),
        (
            "model.safetensors",
            (10**9).to_bytes(8, "little"),
            f"not a safetensors file: expected a header of at most {HEADER_LIMIT} bytes, got one",
        ),
    ],
)
def test_lengths_are_checked_before_anything_is_read(v4, file, start, message):
    if file == INDEX:
        (v4 / "model.safetensors").unlink()
    sparse(v4 / file, 10**12, start)
    line, mebibytes = output_with_torch(PEAK_MEMORY + OPENING_LONG_FILES, str(v4)).splitlines()
    assert message in line
    assert int(mebibytes) < 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "maximum recursion depth"),
        ('{"a":' * 10**5, "maximum recursion depth"),
        ('{"a": 1, "a": 2}', "duplicate name 'a'"),
        (f'{{"a": {"9" * 5000}}}', "malformed JSON: Exceeds the limit"),
        (b"\xff\xfe{\x00}\x00", "malformed JSON: 'utf-8' codec can't decode"),
        (b"\xef\xbb\xbf{}", "malformed JSON: Unexpected UTF-8 BOM"),
        ("", "malformed JSON: the file is empty; download it again"),
        ("[]", "expected a JSON object, got list"),
        ("NaN", "expected a JSON object, got float"),
        ('{"a": nan}', "malformed JSON: Expecting value"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_any_json_is_refused_in_one_line(v4, tmp_path, file, text, message):
    split_into_shards(v4, tmp_path, 2)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(tmp_path).startswith(f"{tmp_path / file}: ")
    assert message in refusal(tmp_path)


HUGE = "x" * 10**5


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**400},
        {"hidden_size": float("nan")},
        {"num_hidden_layers": HUGE},
        {"n_routed_experts": [HUGE] * 100},
        {"swiglu_limit": float("inf")},
        {"swiglu_limit": {HUGE: HUGE}},
        {"quantization_config": HUGE},
        {"text_config": [[HUGE]]},
        {"expert_dtype": "\ud800\n" + HUGE},
        {"hidden_act": HUGE},
        {"transformers_weights": HUGE},
        {"n_routed_experts": 0, "model_type": HUGE},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_values_are_shown_as_far_as_a_line_has_room(v4, changes):
    edit_config(v4, **changes)
    refusal(v4)


HEADER = b'{"x":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"[0,1]", b"[0,NaN]", "malformed safetensors header: x: expected dtype, shape and two"),
        (b"[0,1]", b"[1,0]", "malformed safetensors header: x"),
        (b"[0,1]", b"[0,true]", "malformed safetensors header: x"),
        (b"[1]", b"[-1]", "malformed safetensors header: x"),
        (b"[1]", b'"1"', "malformed safetensors header: x"),
        (b"[1]", b"[" + b"9" * 40 + b"]", "safetensors: "),
        (b"[1]", b"[" + b"9" * 5000 + b"]", "malformed JSON: Exceeds the limit"),
        (b"{", b"[" * 10**5 + b"{", "maximum recursion depth"),
        (b'"x"', b'"\xff"', "malformed JSON: 'utf-8' codec can't decode"),
        (b'"x"', b'"%s"' % HUGE.encode(), f"names of at most {NAME_LIMIT} characters, got 100000"),
        (b"I8", HUGE.encode(), "safetensors: "),
    ],
)
def test_any_header_is_refused_in_one_line(v4, old, new, message):
    header = HEADER.replace(old, new)
    (v4 / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert refusal(v4).startswith(str(v4 / "model.safetensors"))
    assert message in refusal(v4)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x" * 10**6: "model-1.safetensors"},
        {"x": "y" * 10**6 + ".safetensors"},
        {"\ud800\n": "model-1.safetensors\n"},
        {"x": 7},
        {"x": ""},
        {"x": "/etc/model.safetensors"},
        {"x": "a/../../model.safetensors"},
        {"x": "a\0.safetensors"},
        {"x": "model.bin"},
        [],
        None,
        "x",
    ],
)
def test_any_index_is_refused_in_one_line(v4, weight_map):
    (v4 / "model.safetensors").unlink()
    (v4 / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert refusal(v4).startswith(str(v4 / INDEX))


def test_pointers_of_git_lfs_are_recognised(v4, tmp_path):
    split_into_shards(v4, tmp_path, 2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    expected = f"{shard}: a Git LFS pointer, expected the file itself: run `git lfs pull` in"
    assert refusal(tmp_path).startswith(expected)


def test_the_cache_of_the_hub_is_recognised(v4, tmp_path):
    model = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    v4.rename(snapshot)
    for folder in (model, snapshot.parent):
        with pytest.raises(FileNotFoundError, match=f"whose snapshot is {snapshot}$"):
            open_checkpoint(folder)
    assert open_checkpoint(snapshot).layers() == [0, 1]


SHRINKING = """
import os, sys
from cpumoe.checkpoint import open_checkpoint
file = sys.argv[1] + "/model.safetensors"
reader = open_checkpoint(sys.argv[1])
print(int(reader.expert(0, 0).gate.codes.sum()) > 0)
os.truncate(file, 4096)
try:
    print(int(reader.expert(1, 2).gate.codes.sum()))
except ValueError as error:
    print(error)
"""


def test_a_shard_that_shrinks_kills_nothing(v4):
    size = (v4 / "model.safetensors").stat().st_size
    message = f"{v4 / 'model.safetensors'}: changed while it was read: it had {size} bytes and has"
    assert output_with_torch(SHRINKING, str(v4)).splitlines()[1].startswith(f"{message} 4096; ")


@pytest.mark.parametrize(("changed", "index"), [("shorter", 1), ("rewritten", 1), ("rewritten", 2)])
def test_a_shard_that_changes_while_a_layer_is_packed_is_named(v4, monkeypatch, changed, index):
    path, read = v4 / "model.safetensors", ExpertReader.expert

    def change(reader, layer, expert, **arguments):
        weights = read(reader, layer, expert, **arguments)
        if expert == index and changed == "shorter":
            os.truncate(path, 4096)
        elif expert == index:
            os.utime(path, ns=(0, 0))
        return weights

    monkeypatch.setattr(ExpertReader, "expert", change)
    with pytest.raises(CheckpointError, match=r"model.safetensors: changed while it was read"):
        cpumoe.Experts.from_checkpoint(v4, layer=0)


def test_a_file_that_is_replaced_stays_what_it_was(v4):
    """A rename leaves the mapped file unchanged, so it replaces files without harm."""
    with open_checkpoint(v4) as reader:
        expected = reader.expert(1, 0).gate.codes.clone()
        (v4 / "new").write_bytes(b"")
        (v4 / "new").replace(v4 / "model.safetensors")
        assert (reader.expert(1, 0).gate.codes == expected).all()


def test_no_descriptor_is_left_open(v4):
    before = len(os.listdir("/proc/self/fd"))
    open_checkpoint(v4).expert(0, 0)  # not closed
    with open_checkpoint(v4) as reader:
        reader.expert(0, 0)
    assert len(os.listdir("/proc/self/fd")) == before
