"""`cpumoe placement`: what SGLang has recorded becomes the GPU's experts."""

import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from cli_tools import read, refuse, run, succeed

from cpumoe.integrations.sglang.placement import generate_gpu_experts_masks
from cpumoe.integrations.sglang.recording import place, read_counts

PASSES, LAYERS, EXPERTS = 5, 4, 8
DENSE = 0  # a layer without routed experts


@pytest.fixture
def recording(tmp_path):
    """A file as SGLang's recorder writes it in the mode `stat`."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 50, (PASSES, LAYERS, EXPERTS), generator=generator).int()
    counts[:, DENSE] = 0
    path = tmp_path / "expert_distribution_recorder_1.pt"
    torch.save(
        {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path
    )
    return path, counts.sum(dim=0)


def test_counts_are_those_of_all_passes(recording):
    path, counts = recording
    assert torch.equal(read_counts(path), counts)
    assert read_counts(path).dtype == torch.int64


def test_the_map_puts_the_most_used_experts_into_the_gpus_slots(recording, tmp_path):
    path, counts = recording
    out = tmp_path / "map.json"
    succeed("placement", path, "--gpu-experts", 3, "--output", out)
    written = json.loads(out.read_text())
    assert list(written) == ["physical_to_logical_map"]  # SGLang takes each key as an argument
    rows = torch.tensor(written["physical_to_logical_map"])
    assert rows.shape == (LAYERS, EXPERTS)
    for layer, row in enumerate(rows):
        assert sorted(row.tolist()) == list(range(EXPERTS))
        assert row[3:].tolist() == sorted(row[3:].tolist())
        chosen = counts[layer][row[:3]]
        assert chosen.tolist() == counts[layer].sort(descending=True).values[:3].tolist()
    assert rows[DENSE].tolist() == list(range(EXPERTS))


def test_the_file_for_the_fork_gives_its_frequency_strategy_the_masks(recording, tmp_path):
    path, counts = recording
    out = tmp_path / "counts.pt"
    succeed("placement", path, "--gpu-experts", 2, "--output", out)
    content = torch.load(out, map_location="cpu", weights_only=True)
    recorded = content["logical_count"]
    assert recorded.shape == (1, LAYERS, EXPERTS)
    # What sglang-kt does with the file.
    masks = generate_gpu_experts_masks(recorded.sum(dim=0).float(), 2 * (LAYERS - 1))
    assert torch.equal(masks, content["gpu_experts_masks"])
    assert masks.sum() == 2 * (LAYERS - 1)
    assert not masks[DENSE].any()
    assert torch.equal(read_counts(out), counts)


def test_shares_count_routed_tokens(tmp_path):
    counts = torch.tensor([[1, 2, 3, 94], [40, 30, 20, 10]])
    torch.save({"logical_count": counts}, tmp_path / "stats.pt")
    document = read("placement", tmp_path / "stats.pt", "--gpu-experts", 1)
    assert document["routed_tokens"] == 200
    assert (document["layers"], document["experts"], document["gpu_experts"]) == (2, 4, 1)
    assert document["gpu_share"] == {
        "first_experts": 41 / 200,
        "map": 134 / 200,
        "masks": 134 / 200,
    }
    assert "67.0 %" in succeed("placement", tmp_path / "stats.pt", "--gpu-experts", 1)


@pytest.mark.parametrize(("gpu_experts", "share"), [(0, 0), (EXPERTS, 1)])
def test_none_and_all_experts(recording, gpu_experts, share):
    path, counts = recording
    placement = place(counts, gpu_experts)
    assert placement.mapped_share() == placement.masked_share() == share
    assert read("placement", path, "--gpu-experts", gpu_experts)["gpu_share"]["map"] == share


def test_the_options_for_each_host_are_named(recording, tmp_path):
    path, _ = recording
    for name, strategy in (("map.json", []), ("counts.pt", ["--kt-expert-placement-strategy"])):
        out = tmp_path / name
        document = read("placement", path, "--gpu-experts", 2, "--output", out)
        options = document["options"]
        assert options[:2] == ["--kt-num-gpu-experts", "2"]
        assert options[2:-2] == ([*strategy, "frequency"] if strategy else [])
        assert options[-2:] == ["--init-expert-location", str(out)]
        text = succeed("placement", path, "--gpu-experts", 2, "--output", out)
        assert "--init-expert-location" in text


ODD = {
    "records": ({"records": [], "last_physical_to_logical_map": torch.zeros(1)}, "single passes"),
    "keys": ({"rank": 0}, "logical_count: expected a tensor, got NoneType"),
    "shape": ({"logical_count": torch.ones(3)}, "expected numbers [passes, layers, experts], got"),
    "empty": ({"logical_count": torch.ones(0, 2, 3)}, "got float32 [0, 2, 3]"),
    "sparse": (
        {"logical_count": torch.ones(1, 2).to_sparse()},
        "expected a dense tensor, got layout torch.sparse_coo; save it with .to_dense()",
    ),
    "meta": (
        {"logical_count": torch.ones(1, 2, device="meta")},
        "expected a tensor with values, got device meta; record again",
    ),
    "uint64": ({"logical_count": torch.ones(1, 2).to(torch.uint64)}, "got uint64 [1, 2]; save it"),
    "float8": ({"logical_count": torch.ones(1, 2).to(torch.float8_e4m3fn)}, "got float8_e4m3fn"),
    "overflow": ({"logical_count": torch.full((2, 4), 2**62)}, "expected a sum below 2^62, got 3"),
    "huge": ({"logical_count": torch.full((2, 3), 1e30)}, "expected a sum below 2^62, got 6e+30"),
    "negative": ({"logical_count": -torch.ones(1, 2, 3)}, "got negative ones"),
    "nan": ({"logical_count": torch.full((2, 3), torch.nan)}, "got NaN or infinity"),
    "zeros": ({"logical_count": torch.zeros(4, 2, 3)}, "got zeros; send requests between"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_recording_is_refused(name, tmp_path):
    content, message = ODD[name]
    path = tmp_path / "stats.pt"
    torch.save(content, path)
    out = tmp_path / "out.pt"
    assert message in refuse("placement", path, "--gpu-experts", 1, "--output", out)
    assert not out.exists()


def test_counts_up_to_the_largest_sum_are_added_exactly(tmp_path):
    counts = torch.tensor([[[2**60, 1]], [[2**61, 2]]])
    torch.save({"logical_count": counts}, tmp_path / "stats.pt")
    document = read("placement", tmp_path / "stats.pt", "--gpu-experts", 1)
    assert document["routed_tokens"] == 2**60 + 2**61 + 3


@contextmanager
def file_size_limit(nbytes):
    """Lets the system refuse to write longer files, as it does if the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_an_output_that_cannot_be_written_gets_one_line(recording, tmp_path, suffix):
    command = ("placement", recording[0], "--gpu-experts", 1, "--output")
    missing = tmp_path / f"missing/out{suffix}"
    assert refuse(*command, missing) == f"error: {missing}: No such file or directory\n"
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert refuse(*command, folder) == f"error: {folder}: Is a directory\n"
    assert sorted(tmp_path.iterdir()) == sorted([recording[0], folder])


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_a_disk_that_is_full_leaves_the_old_output(recording, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    out.write_text("old")
    with file_size_limit(16):
        message = refuse("placement", recording[0], "--gpu-experts", 1, "--output", out)
    assert message == f"error: {out}: File too large\n"
    assert out.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted([recording[0], out])


def test_a_link_and_the_permissions_of_an_old_output_stay(recording, tmp_path):
    out, link = tmp_path / "out.json", tmp_path / "link.json"
    out.write_text("old")
    out.chmod(0o640)
    link.symlink_to(out)
    succeed("placement", recording[0], "--gpu-experts", 1, "--output", link)
    assert link.is_symlink()
    assert "physical_to_logical_map" in json.loads(out.read_text())
    assert out.stat().st_mode & 0o777 == 0o640


class Code:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 a damaged archive"])
def test_a_file_that_is_no_recording_is_refused(content, tmp_path):
    path = tmp_path / "stats.pt"
    path.write_bytes(content)
    assert "got something else, or a damaged file" in refuse("placement", path, "--gpu-experts", 1)


def test_no_code_of_the_file_is_run(tmp_path):
    made = tmp_path / "made"
    torch.save({"logical_count": Code(made)}, tmp_path / "stats.pt")
    refuse("placement", tmp_path / "stats.pt", "--gpu-experts", 1)
    assert not made.exists()


def test_wrong_arguments_are_refused(recording, tmp_path):
    path, _ = recording
    assert f"expected 0 to {EXPERTS}" in refuse("placement", path, "--gpu-experts", EXPERTS + 1)
    wrong = ("placement", path, "--gpu-experts", 1, "--output")
    assert "ends with .json (for SGLang) or .pt" in refuse(*wrong, tmp_path / "map.txt")
    assert "expected another file than the recording" in refuse(*wrong, path)
    assert "No such file" in refuse("placement", tmp_path / "gone.pt", "--gpu-experts", 1)
    assert run("placement", path).exit_code == 2
    assert run("placement", path, "--gpu-experts", -1).exit_code == 2
