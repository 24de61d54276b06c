"""Files that are written whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a text file through one beside it."""
    save_whole(file, lambda unfinished: unfinished.write_text(text))


def save_whole(file: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a file beside its place, and move it there, over an older one, when it is on the disk."""
    unfinished = file.with_name(f"unfinished-{file.name}")
    save(unfinished)
    settle(unfinished)
    os.replace(unfinished, file)


def settle(path: Path) -> None:
    """Wait until a file, or all that a folder holds, is on the disk."""
    for entry in [*path.rglob("*"), path] if path.is_dir() else [path]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
