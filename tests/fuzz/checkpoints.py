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

from .documents import changed, damaged, dumped, json_bytes
from .target import Target, in_one_line

MODELS = ("v4-flash", "gpt-oss-20b", "kimi-k2")
_LENGTH_BYTES = 8


class _Folders(Target):
    """Writes what was drawn into a sound checkpoint's place, and does what commands do with it."""

    # What `open_checkpoint`, `inspect` and `Experts.from_checkpoint` may raise.
    allowed = (
        CheckpointError,
        UnsupportedFormatError,
        OSError,
        MemoryError,
        ValueError,
        IndexError,
    )

    def __init__(self):
        self._root = Path(tempfile.mkdtemp(prefix="cpumoe-fuzz-"))
        self.folders = [self._sound(model) for model in MODELS]

    def close(self):
        shutil.rmtree(self._root)

    def _sound(self, model):
        folder = self._root / model
        return checkpoint_tools.write_small(folder, model)

    def check(self, data):
        number, content = data
        folder = self.folders[number]
        path = folder / self.file
        sound = path.read_bytes()
        try:
            path.write_bytes(content)
            self._use(folder)
        finally:
            path.write_bytes(sound)

    def _use(self, folder):
        for use in (_inspected, _packed):
            try:
                use(folder)
            except self.allowed as error:
                in_one_line(error)

    def one_of(self, content):
        """Draws a folder, and what `content` makes of its file."""
        numbers = range(len(self.folders))
        return st.sampled_from(numbers).flatmap(
            lambda n: st.tuples(st.just(n), content((self.folders[n] / self.file).read_bytes()))
        )


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

    def strategy(self):
        return self.one_of(lambda sound: json_bytes(json.loads(sound)))


class Header(_Folders):
    """A safetensors file: the header's length, the header, the data."""

    file = SINGLE_NAME

    def strategy(self):
        return self.one_of(_files)


@st.composite
def _files(draw, sound):
    length = int.from_bytes(sound[:_LENGTH_BYTES], "little")
    header, data = sound[_LENGTH_BYTES:][:length], sound[_LENGTH_BYTES + length :]
    text = draw(damaged(changed((json.loads(header),)).map(dumped)))
    said = draw(
        st.just(len(text)) | st.sampled_from([0, 1, len(text) + 1, 2**30, 2**63, 2**64 - 1])
    )
    return draw(damaged(st.just(said.to_bytes(_LENGTH_BYTES, "little") + text + data)))


class Index(_Folders):
    """model.safetensors.index.json."""

    file = INDEX_NAME

    def _sound(self, model):
        whole = super()._sound(model)
        folder = self._root / f"{model}-shards"
        folder.mkdir()
        return checkpoint_tools.split_into_shards(whole, folder, 2)

    def strategy(self):
        return self.one_of(lambda sound: json_bytes(json.loads(sound)))
