import json
import re
import sys

import pytest
import torch
from moe_tools import output_with_torch
from safetensors.torch import save_file

from cpumoe.checkpoint import CheckpointError, SafetensorsFolder

TENSORS = {
    "codes": torch.arange(-8, 8, dtype=torch.int8).view(4, 4),
    "scale": torch.arange(120, 128, dtype=torch.uint8).view(4, 2).view(torch.float8_e8m0fnu),
    "packed": torch.arange(6, dtype=torch.int32).view(2, 3),
    "gate": torch.ones(3, 2, dtype=torch.bfloat16),
}


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_read_bit_for_bit(layout, request):
    with SafetensorsFolder(request.getfixturevalue(layout)) as folder:
        assert set(folder.names()) == set(TENSORS)
        assert "codes" in folder
        assert "nothing" not in folder
        assert folder.missing_shards() == []
        for name, tensor in TENSORS.items():
            got = folder.tensor(name, (tensor.dtype,), tuple(tensor.shape))
            assert got.dtype == tensor.dtype
            assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))
        assert str(folder.info("scale")) == "float8_e8m0fnu [4, 2]"
        assert folder.info("packed").nbytes == 24


def mapped_ranges(path):
    """Address ranges at which this process maps a file."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0] for line in maps if line.rstrip().endswith(str(path))]
    return [tuple(int(end, 16) for end in span.split("-")) for span in spans]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_tensors_lie_in_the_mapped_file_until_dropped(single):
    path = single / "model.safetensors"
    folder = SafetensorsFolder(single)
    tensors = [folder.tensor(n, (t.dtype,), tuple(t.shape)) for n, t in TENSORS.items()]
    ranges = mapped_ranges(path)
    for tensor in tensors:
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    folder.close()
    assert torch.equal(tensors[0], TENSORS["codes"])
    del tensors, tensor
    assert mapped_ranges(path) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_uses_no_anonymous_memory(tmp_path):
    """64 MiB each of int8 and float8_e8m0fnu, read whole in a process of its own."""
    (tmp_path / "config.json").write_text("{}")
    big = {
        "codes": torch.ones(64, 1 << 20, dtype=torch.int8),
        "scale": torch.ones(64, 1 << 20, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    save_file(big, tmp_path / "model.safetensors")
    script = f"""
import torch
from cpumoe.checkpoint import SafetensorsFolder
def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind))
torch.set_num_threads(1)
torch.ones(8, dtype=torch.uint8).amax()
folder = SafetensorsFolder({str(tmp_path)!r})
before = resident("RssAnon"), resident("RssFile")
tensors = [
    folder.tensor("codes", (torch.int8,), (64, 1 << 20)),
    folder.tensor("scale", (torch.float8_e8m0fnu,), (64, 1 << 20)).view(torch.uint8),
]
assert all(int(t.amax()) == 1 for t in tensors)
print(resident("RssAnon") - before[0], resident("RssFile") - before[1])
"""
    anonymous, file = (int(kib) for kib in output_with_torch(script).split())
    assert file >= 127 << 10
    assert anonymous < 4 << 10


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such checkpoint folder"):
        SafetensorsFolder(tmp_path / "none")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="expected a checkpoint folder, got a file"):
        SafetensorsFolder(file)
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint: it has no config.json"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    message = r"neither model.safetensors nor model.safetensors.index.json"
    with pytest.raises(FileNotFoundError, match=message):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config.json: malformed JSON: "),
        ("config.json", "[1]", r"config.json: expected a JSON object, got list"),
        ("config.json", "\xff\xfe", r"config.json: malformed JSON: "),
        ("model.safetensors.index.json", "{}", r"weight_map: expected an object, got None"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../a.safetensors"}}',
            r"weight_map: a: expected the name of a .safetensors file in the folder, got '../a",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "x", "b": "x", "a": "y"}}',
            r"malformed JSON: duplicate name 'a'",
        ),
    ],
)
def test_malformed_json_names_the_file(sharded, file, text, message):
    (sharded / file).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(sharded)


def test_missing_shard_names_file_and_tensor(sharded):
    (sharded / "model-2.safetensors").unlink()
    folder = SafetensorsFolder(sharded)
    assert folder.missing_shards() == ["model-2.safetensors"]
    folder.info("codes")
    message = r"model-2.safetensors: missing shard; it holds scale"
    with pytest.raises(FileNotFoundError, match=message):
        folder.info("scale")


@pytest.mark.parametrize("cut", [1, 20])
def test_truncated_shard_names_file_and_sizes(sharded, cut):
    path = sharded / "model-1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    # The header tells the whole size if data is cut; its length does if the header is cut.
    expected = len(data) - (TENSORS["codes"].nbytes if cut == 20 else 0)
    message = (
        rf"model-1.safetensors: truncated.*: expected .*{expected} bytes, got {len(data) - cut}; "
        rf"download it again"
    )
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(sharded).info("codes")


@pytest.mark.parametrize("data", [b"", b"abc", b"12345678{}"])
def test_files_that_are_no_safetensors(sharded, data):
    (sharded / "model-1.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsFolder(sharded).info("codes")


def test_overlong_and_malformed_shards(sharded):
    path = sharded / "model-1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match=rf"too long: expected {len(data)} bytes"):
        SafetensorsFolder(sharded).info("codes")
    for entry in (b'{"dtype":"I8"}', b'{"dtype":"I8","shape":[1],"data_offsets":[0,1e999]}'):
        header = b'{"codes":%b}' % entry
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match="malformed safetensors header"):
            SafetensorsFolder(sharded).info("codes")
    entry = b'{"dtype":"I8","shape":[1],"data_offsets":[0,1]}'
    header = b'{"codes":%b,"codes":%b}' % (entry, entry)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(CheckpointError, match="duplicate name 'codes'"):
        SafetensorsFolder(sharded).info("codes")


def test_header_that_safetensors_refuses(sharded):
    """Overlapping offsets pass the size check, and safetensors refuses them."""
    header = (
        b'{"codes":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"I8","shape":[2],"data_offsets":[1,3]}}'
    )
    path = sharded / "model-1.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xyz")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        SafetensorsFolder(sharded).info("codes")


def test_wrong_dtype_shape_and_name(sharded):
    folder = SafetensorsFolder(sharded)
    message = r"scale: expected bfloat16 \[4, 2\], got float8_e8m0fnu \[4, 2\]"
    with pytest.raises(CheckpointError, match=message):
        folder.tensor("scale", (torch.bfloat16,), (4, 2))
    message = r"codes: expected uint8 or int8 \[4, 8\], got int8 \[4, 4\]"
    with pytest.raises(CheckpointError, match=message):
        folder.tensor("codes", (torch.uint8, torch.int8), (4, 8))
    with pytest.raises(CheckpointError, match=r"nothing: no such tensor in "):
        folder.info("nothing")
    index = {"weight_map": {"lost": "model-1.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lost: no such tensor in .*, where the index puts"):
        SafetensorsFolder(sharded).info("lost")


def test_closed_folder_says_so(single):
    folder = SafetensorsFolder(single)
    folder.close()
    with pytest.raises(ValueError, match="the checkpoint is closed"):
        folder.info("codes")


UNMAPPABLE = """
import os, resource, sys
from pathlib import Path
from cpumoe.checkpoint import SafetensorsFolder

pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * os.sysconf("SC_PAGE_SIZE") + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    SafetensorsFolder(sys.argv[1]).check_shards()
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("mappings", [0.5, 1.5])  # safetensors maps a file, then PyTorch does
def test_a_shard_larger_than_the_address_space_is_a_clear_error(tmp_path, mappings):
    size = 16 << 30
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a hole, which takes no disk
    (tmp_path / "config.json").write_text("{}")
    said = output_with_torch(UNMAPPABLE, str(tmp_path), str(int(size * mappings)))
    size = path.stat().st_size
    expected = f"{path}: expected a file that can be mapped, got an error for its {size} bytes: "
    assert said.startswith(expected)
    assert "Cannot allocate memory" in said
    assert "; raise the limit of virtual memory (`ulimit -v`), set" in said
    assert said.count("\n") == 0
