"""Files that are written whole or not at all, whenever the process is killed, and locks that die with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_locks: set[IO[str]] = set()  # that this process holds, or waits for


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


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[None]:
    """Let one process at a time in; the lock of a process that was killed is gone with it.

    Args:
        file: that is locked, made where it is missing; it stays.
        wait: until the process that is in has left.

    Raises:
        BlockingIOError: another process is in, and this one does not wait.
        OSError: the disk knows no locks, or does not take the file.
        ModuleNotFoundError: the system knows no locks.
    """
    import fcntl

    lock = file.open("a")
    _locks.add(lock)
    try:
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
    finally:
        _locks.discard(lock)


def _leave_to_parent() -> None:
    """A process that loads data may outlive the one that holds the locks."""
    while _locks:
        _locks.pop().close()


if hasattr(os, "register_at_fork"):  # where it is missing, so are fork and these locks
    os.register_at_fork(after_in_child=_leave_to_parent)
