"""Targets over a checkpoint's files: config.json, the safetensors header, the index."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import checkpoint_tools
from hypothesis import strategies as st

from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.checkpoint.weight_files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from cpumoe.cli import inspect_model
from cpumoe.experts import Experts

from .documents import changed, damaged, dumped
from .target import Target, in_one_line

MODELS = (
    "v4-flash",
    "gpt-oss-20b",
    "kimi-k2",
    "DeepSeek-V3",
    "DeepSeek-R1-NVFP4",
    "Qwen3-30B-A3B-NVFP4",
)
_LENGTH_BYTES = 8


class _Folders(Target):
    """Replaces a file of a sound checkpoint, and uses the checkpoint as commands do."""

    # The exceptions of `open_checkpoint`, `inspect` and `Experts.from_checkpoint`.
    allowed = (
        CheckpointError,
        UnsupportedFormatError,
        OSError,
        MemoryError,
        ValueError,
        IndexError,
    )

    file = ""

    def __init__(self):
        self._root = Path(tempfile.mkdtemp(prefix="cpumoe-fuzz-"))
        self._paths = [self._sound(model) / self.file for model in MODELS]
        self._contents = [path.read_bytes() for path in self._paths]

    def close(self):
        shutil.rmtree(self._root)

    def strategy(self):
        @st.composite
        def which_and_what(draw):
            number = draw(st.integers(0, len(MODELS) - 1))
            return number, self._content(draw, self._contents[number])

        return which_and_what()

    def check(self, data):
        number, content = data
        path = self._paths[number]
        try:
            path.write_bytes(content)
            self._use(path.parent)
        finally:
            path.write_bytes(self._contents[number])

    def _sound(self, model):
        return checkpoint_tools.write_small(self._root / model, model)

    def _content(self, draw, sound):
        """Draws the file's content."""
        return damaged(draw, dumped(changed(draw, [json.loads(sound)])))

    def _use(self, folder):
        for use in (_inspected, _packed):
            try:
                use(folder)
            except self.allowed as error:
                in_one_line(error)


def _inspected(folder):
    document = inspect_model.collect(str(folder))
    json.dumps(document).encode()
    with contextlib.redirect_stdout(io.StringIO()):
        inspect_model._render(document)


def _packed(folder):
    with open_checkpoint(folder) as reader:
        layers = reader.layers()
        if not reader.unsupported and layers:
            Experts.from_checkpoint(reader, layers[0], progress=False)


class ConfigFile(_Folders):
    """config.json."""

    file = CONFIG_NAME


class Header(_Folders):
    """A safetensors file: the header's length, the header, the data."""

    file = SINGLE_NAME

    def _content(self, draw, sound):
        length = int.from_bytes(sound[:_LENGTH_BYTES], "little")
        header, data = sound[_LENGTH_BYTES:][:length], sound[_LENGTH_BYTES + length :]
        text = super()._content(draw, header)
        lengths = [len(text), len(text), 0, 1, len(text) + 1, 2**30, 2**63, 2**64 - 1]
        said = lengths[draw(st.integers(0, len(lengths) - 1))]
        return damaged(draw, said.to_bytes(_LENGTH_BYTES, "little") + text + data)


class Index(_Folders):
    """model.safetensors.index.json."""

    file = INDEX_NAME

    def _sound(self, model):
        whole = super()._sound(model)
        folder = self._root / f"{model}-shards"
        folder.mkdir()
        return checkpoint_tools.split_into_shards(whole, folder, 2)
