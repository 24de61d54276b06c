"""Encoded documents, end to end: in memory, or in files that are read as they are needed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Encoded(NamedTuple):
    """Documents as tokens, end to end.

    Attributes:
        stream: (tokens,) int32.
        bounds: (documents + 1,) int64, where each begins, and the end of the last.
    """

    stream: Tensor
    bounds: Tensor


def in_memory(documents: Iterable[Sequence[int]]) -> Encoded:
    """The documents, held in memory."""
    stream, bounds = array("i"), array("q", [0])
    for document in documents:
        stream.extend(document)
        bounds.append(len(stream))
    return Encoded(torch.from_numpy(np.array(stream, np.int32)), torch.from_numpy(np.array(bounds, np.int64)))


def write_encoded(folder: Path, documents: Iterable[Sequence[int]]) -> None:
    """Write the documents to a folder, from which :func:`read_encoded` takes them; only one is held at a time."""
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
