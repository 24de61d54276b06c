"""The documents of a run as tokens, end to end: in memory, or in files that are read as they are needed."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cab.config import TextConfig
from cab.data.documents import documents, files_of
from cab.data.tokens import Tokens
from cab.files import locked, save_whole


class Encoded(NamedTuple):
    """Documents as tokens, end to end.

    Attributes:
        stream: (tokens,) int32.
        bounds: (documents + 1,) int64, where each begins, and the end of the last.
    """

    stream: Tensor
    bounds: Tensor


def encoded(config: TextConfig, tokens: Tokens) -> tuple[Encoded, Encoded]:
    """The documents for training, and those for the test: whole documents, or of a single one the end.

    With ``config.cache`` they are written to a folder of their own in it, unless a run on the same text has done so
    before, and few documents at a time are held in memory.

    Raises:
        UserError: there is no text.
    """
    if config.cache is None:
        training, test = _parts(config, tokens)
        return in_memory(training), in_memory(test)
    folder = Path(config.cache) / _key(config, tokens)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):  # another process that wants the same waits, and finds it
        if not folder.is_dir():
            save_whole(folder, lambda unfinished: _write_parts(unfinished, _parts(config, tokens)))
    return read_encoded(folder / "train"), read_encoded(folder / "test")


def in_memory(documents: Iterable[Sequence[int]]) -> Encoded:
    """The documents, held in memory."""
    stream, bounds = array("i"), array("q", [0])
    for document in documents:
        stream.extend(document)
        bounds.append(len(stream))
    return Encoded(torch.from_numpy(np.array(stream, np.int32)), torch.from_numpy(np.array(bounds, np.int64)))


def write_encoded(folder: Path, documents: Iterable[Sequence[int]]) -> None:
    """Write the documents to a folder, from which :func:`read_encoded` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    end = 0
    with (folder / "stream").open("wb") as stream, (folder / "bounds").open("wb") as bounds:
        bounds.write(array("q", [end]).tobytes())
        for document in documents:
            end += len(document)
            stream.write(array("i", document).tobytes())
            bounds.write(array("q", [end]).tobytes())


def read_encoded(folder: Path) -> Encoded:
    """What :func:`write_encoded` wrote, as tensors that are the files, mapped into memory."""
    return Encoded(_mapped(folder / "stream", torch.int32), _mapped(folder / "bounds", torch.int64))


def _mapped(file: Path, dtype: torch.dtype) -> Tensor:
    size = file.stat().st_size // dtype.itemsize
    return torch.from_file(str(file), size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)


def _parts(config: TextConfig, tokens: Tokens) -> tuple[Iterable[list[int]], Iterable[list[int]]]:
    """The documents for training and for the test, each read anew and encoded as they are asked for."""

    def part(chosen: Callable[[int], bool]) -> Iterator[list[int]]:
        for texts in _batches(text for index, text in enumerate(documents(config)) if chosen(index)):
            yield from ([*document, tokens.end] for document in tokens.encode(texts))

    total = sum(1 for _ in documents(config))
    if total == 1:
        (only,) = part(lambda index: True)
        cut = max(round(len(only) * (1 - config.held_out)), 1)
        return [only[:cut]], [only[cut:]]
    count = max(round(total * config.held_out), 1)
    test = set(random.Random(config.seed).sample(range(total), count)) if total else set()
    return part(lambda index: index not in test), part(test.__contains__)


def _batches(texts: Iterable[str], characters: int = 100_000) -> Iterator[list[str]]:
    """As many texts at a time as have so many characters together: a tokenizer encodes them side by side."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_parts(folder: Path, parts: tuple[Iterable[list[int]], Iterable[list[int]]]) -> None:
    for name, part in zip(("train", "test"), parts, strict=True):
        write_encoded(folder / name, part)


def _key(config: TextConfig, tokens: Tokens) -> str:
    """What tells these documents, so encoded and held out, from others: files that changed are others."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(config)]
    told = (files, config.field, config.limit, config.held_out, config.seed, tokens.key)
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
