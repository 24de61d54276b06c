import gc
import os
import socket
from io import TextIOWrapper
from pathlib import Path

import pytest

from cab.files import locked


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass
    with locked(tmp_path / "lock", wait=False):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of it where there are threads
def test_a_lock_is_not_its_child_s(tmp_path: Path) -> None:
    """Nor one of several; the child lives on when its parent has left."""
    ours, its = socket.socketpair()
    with locked(tmp_path / "one"), locked(tmp_path / "two"):
        child = os.fork()
        if not child:
            ours.close()
            its.send(b"here")
            its.recv(1)  # until our end is closed
            os._exit(0)
    ours.recv(4)
    try:
        for name in ("one", "two"):
            with locked(tmp_path / name, wait=False):
                pass
    finally:
        ours.close()
        os.waitpid(child, 0)
        its.close()


def test_nothing_is_left_of_a_lock_but_its_file(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        pass
    assert str(tmp_path / "lock") not in [str(it.name) for it in gc.get_objects() if type(it) is TextIOWrapper]
