"""Checks the files that transformers reads, so that an error names the file at fault.

transformers itself finds faults late, by whatever exception the wrong content causes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from cpumoe._base.memory import is_out_of_memory
from cpumoe.checkpoint import CheckpointError, ExpertReader, SafetensorsFolder, open_checkpoint
from cpumoe.checkpoint.files import (
    CONFIG_LIMIT,
    check_content,
    read_json,
    shown,
    shown_value,
)
from cpumoe.checkpoint.weight_files import CONFIG_NAME, EXPLICIT_KEY
from cpumoe.integrations.transformers.completeness import check_scaled

# Possible names on the hub, such as "gpt2" or "openai/gpt-oss-20b".
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TOKENIZER = "tokenizer.json"
# These files hold JSON objects.
_MODEL_CONFIGS = ("generation_config.json", "adapter_config.json")
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("*.jinja", "*/*.jinja")
# Vocabularies, which transformers parses early, and the most bytes of one. The largest published
# vocabularies have 35 MB.
_VOCABULARIES = (_TOKENIZER, "vocab.json", "tekken.json", "merges.txt", "vocab.txt", "*.model")
_VOCABULARY_LIMIT = 256 << 20


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuses a path that is no folder and cannot be a name on the hub.

    A name such as "models/mine" is a path if there is a folder "models". transformers would look
    for it on the hub for half a minute.

    Raises:
        FileNotFoundError: `path` is neither. transformers would complain of the name.
        NotADirectoryError: `path` is a file.
    """
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"{path}: expected a checkpoint folder, got a file")
    if folder.exists():
        return
    if not _HUB_NAME.fullmatch(os.fspath(path)):
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    if folder.parent != Path() and folder.parent.is_dir():
        raise FileNotFoundError(
            f"{path}: no such checkpoint folder; if it is a name on the hub, rename or leave the "
            f"folder {folder.parent}, which hides the name"
        )


def check_tokenizer_files(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> None:
    """Refuses a folder whose tokenizer files are damaged. A name on the hub is not checked.

    Args:
        path: a checkpoint folder, or a name on the hub.
        kwargs: arguments for transformers, such as ``subfolder``.

    Raises:
        CheckpointError: a file is damaged; the message names it.
    """
    folder = _local_folder(path, kwargs)
    if folder is None:
        return
    _check_model_type(folder)
    _check_configs(folder, _TOKENIZER_CONFIGS)
    for file in _existing(folder, _TEMPLATES):
        _check_text(file)
    for file in _existing(folder, _VOCABULARIES):
        check_content(file, _VOCABULARY_LIMIT)


def check_model_files(
    path: str | os.PathLike[str], kwargs: Mapping[str, Any], *, experts: bool
) -> None:
    """Refuses a folder whose model files are damaged.

    A name on the hub is not checked, and neither are the weights if the caller passes a config.
    cpumoe's quantizer checks both after transformers has resolved them.

    Args:
        path: a checkpoint folder, or a name on the hub.
        kwargs: arguments of transformers' ``from_pretrained``.
        experts: whether cpumoe must support the experts' format.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no checkpoint folder, or a shard is missing.
        CheckpointError: a file is damaged; see `open_checkpoint`.
    """
    folder = _local_folder(path, kwargs)
    if folder is None:
        return
    _check_configs(folder, _MODEL_CONFIGS)
    if kwargs.get("config") is not None:
        return
    _check_model_type(folder)
    variant = kwargs.get("variant")
    if not experts:
        with SafetensorsFolder(folder, variant=variant) as weights:
            _check_weights(weights)
            check_scaled(weights)  # in the other case, cpumoe's quantizer does
        return
    with open_checkpoint(folder, variant=variant) as reader:
        reader.check_supported()
        reader.check_depth()
        _check_weights(reader.folder)


def open_resolved(files: Sequence[str], config: Any) -> ExpertReader:
    """Opens the experts in the files that transformers resolved, and reads all their headers.

    Args:
        files: transformers' ``checkpoint_files``.
        config: the model's config.

    Raises:
        FileNotFoundError: there is no config.json beside the files.
        CheckpointError, ValueError: see `open_checkpoint`.
    """
    first, explicit = Path(files[0]), getattr(config, EXPLICIT_KEY, None)
    for folder in first.parents:
        # Names of weight files may contain folders. The config lies where those names begin.
        if explicit is not None:
            begins = (folder / explicit).is_file()
        else:
            begins = folder == first.parent or any(folder.glob("model.safetensors.index*.json"))
        if begins and (folder / CONFIG_NAME).is_file():
            return open_checkpoint(folder, files=files)
    raise FileNotFoundError(f"{first}: expected a {CONFIG_NAME} beside the weights, found none")


@contextmanager
def host_reads(what: str, arguments: Collection[str] = ()) -> Iterator[None]:
    """Turns any exception for wrong content into one error that names the file.

    transformers may raise a KeyError, an AttributeError, or a panic of a library in Rust. Errors
    that explain themselves pass unchanged: those of cpumoe's own code, of the system, for too
    little memory or a missing package, and those that name an argument of the caller.

    Args:
        what: the file or folder that is read.
        arguments: the names of the caller's arguments for transformers.

    Raises:
        CheckpointError: transformers raised another exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, OSError, ImportError):
        raise
    except BaseException as error:
        if _is_ours(error) or is_out_of_memory(error) or _names_one(error, arguments):
            raise
        raise _unreadable(what, "transformers", error) from error


@contextmanager
def host_reads_tokenizer(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Like `host_reads`, but names tokenizer.json if that file is at fault."""
    try:
        with host_reads(f"{path}: tokenizer", kwargs):
            yield
    except CheckpointError as error:
        folder = _local_folder(path, kwargs)
        if folder is not None and (folder / _TOKENIZER).is_file():
            _diagnose_tokenizer(folder / _TOKENIZER)
        raise error


def check_vocabulary(tokenizer: Any, embeddings: int, path: str | os.PathLike[str]) -> None:
    """Refuses a tokenizer whose vocabulary, without added tokens, is larger than the model's.

    Raises:
        CheckpointError: the tokenizer belongs to another model.
    """
    size = tokenizer.vocab_size
    if size > embeddings:
        raise CheckpointError(
            f"{path}: tokenizer: expected a vocabulary of at most {embeddings} tokens, as the "
            f"model has, got {size}; the tokenizer belongs to another model"
        )


def _local_folder(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path | None:
    check_path(path)
    return Path(path, kwargs.get("subfolder") or "") if Path(path).exists() else None


def _existing(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


def _check_configs(folder: Path, names: Sequence[str]) -> None:
    for file in _existing(folder, names):
        read_json(file, CONFIG_LIMIT)


def _check_model_type(folder: Path) -> None:
    """Raises CheckpointError if config.json has no model_type: transformers would guess one."""
    file = folder / CONFIG_NAME
    if file.is_file() and "model_type" not in read_json(file, CONFIG_LIMIT):
        raise CheckpointError(
            f"{file}: expected a model_type, by which transformers recognizes a model, got none; "
            f"for gpt-oss, load the parent of OpenAI's folder 'original'"
        )


def _check_text(file: Path) -> None:
    check_content(file, CONFIG_LIMIT)
    try:
        file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: expected UTF-8 text: {error}") from None


def _diagnose_tokenizer(file: Path) -> None:
    """Raises CheckpointError if the file is no tokenizer.

    Called only after transformers has failed, because reading a large vocabulary takes a second.
    """
    try:
        tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust code as well
        raise _unreadable(str(file), "tokenizers", error) from error


def _unreadable(what: str, reader: str, error: BaseException) -> CheckpointError:
    reason = shown(" ".join(str(error).split()), 300)
    return CheckpointError(f"{what}: {reader} cannot read it: {type(error).__name__}: {reason}")


def _check_weights(weights: SafetensorsFolder) -> None:
    if weights.index is not None and not isinstance(weights.index_metadata, dict):
        raise CheckpointError(
            f"{weights.index}: metadata: transformers expects an object, "
            f'got {shown_value(weights.index_metadata)}; add "metadata": {{}}'
        )
    weights.check_shards()


def _names_one(error: BaseException, arguments: Collection[str]) -> bool:
    """Whether an error is about one of the arguments, by their names in its text.

    A name without an underscore may be an ordinary word, so it counts only in quotes or before "=".
    """

    def named(name: str) -> bool:
        word = rf"\b{name}\b" if "_" in name else rf"(['\"`]){name}\1|\b{name}="
        return re.search(word, str(error)) is not None

    return any(map(named, arguments))


def _is_ours(error: BaseException) -> bool:
    """Whether cpumoe's own code raised the error, which explains itself or is a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] == __name__.partition(".")[0]
