"""What data are, as far as the names and sizes of their files tell: folder by folder, without reading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import TypedDict


class Held(TypedDict):
    """What a folder holds.

    Attributes:
        files: how many.
        bytes: of all of them.
        digest: of their names and sizes.
    """

    files: int
    bytes: int
    digest: str


def fingerprint(root: str, files: Iterable[str]) -> dict[str, Held]:
    """What each folder with some of the files holds of them, by its path below ``root``, in the order of the files.

    Args:
        root: the folder that holds them all, or a file that is the only one.
        files: in an order that does not depend on the file system.
    """
    listed: dict[str, list[tuple[str, int]]] = {}
    for file in files:
        folder, name = (root, "") if file == root else os.path.split(file)
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:  # a link to nothing, which is refused when it is read
            size = 0
        listed.setdefault(folder, []).append((name, size))
    return {os.path.relpath(folder, root): _held(entries) for folder, entries in listed.items()}


def difference(root: str, before: Mapping[str, Held], now: Mapping[str, Held]) -> str | None:
    """What was expected and what came, in the first folder that does not hold the same; None where all do."""
    for folder in sorted({**before, **now}):
        expected, got = before.get(folder), now.get(folder)
        if expected != got:
            told = _told(got)
            if told == _told(expected):
                told = "as many with other names or sizes"
            return f"{_told(expected)} in {os.path.normpath(os.path.join(root, folder))}, got {told}"
    return None


def _held(entries: list[tuple[str, int]]) -> Held:
    digest = hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()
    return {"files": len(entries), "bytes": sum(size for _, size in entries), "digest": digest}


def _told(held: Held | None) -> str:
    if held is None:
        return "no file"
    return f"{held['files']:,} file{'s' * (held['files'] > 1)} of {held['bytes']:,} bytes"
