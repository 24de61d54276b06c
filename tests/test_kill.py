"""A run that is killed at any moment goes on as if nothing had happened; while it lives, none other goes on with it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from cab.cli import main
from cab.config import RunConfig, UserError
from cab.files import locked
from cab.run import distill
from cab.settings import resolve

SETTINGS = [
    "device=cpu",
    "arms=cab",
    "data.image_size=16",
    "data.augment=rand",
    "data.mixup=0.8",
    "data.repeats=2",
    "data.workers=1",
    "student.depth=1",
    "student.embed_dim=16",
    "student.d_state=4",
    "student.patch_size=8",
    "student.drop_path=0.5",
    "teacher.pretrained=false",
    "teacher.steps=1",
    "teacher.depth=1",
    "teacher.embed_dim=16",
    "teacher.num_heads=2",
    "teacher.patch_size=8",
    "bridge.hidden=8",
    "optim.steps=24",
    "optim.batch_size=4",
    "optim.ema=0.9",
    "log_every=3",
    "eval_every=24",
    "save_every=4",
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 6 training and 2 test images of noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def words(images: Path, out: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["distill", "--data", str(images), *settings, "--out", str(images / out)]


def figures(folder: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{**entry, "seconds": None, "samples_per_second": None} for entry in entries]


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def trained_by_another(images: Path, out: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process, the first of a group, that has written a checkpoint and trains on; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cab", *words(images, out)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    last = time.monotonic() + 120
    while not list((images / out / "cab").glob("checkpoint-*")) and time.monotonic() < last:
        time.sleep(0.001)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its loading processes too
        process.wait()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of how torch starts its processes
def test_a_killed_run_goes_on_as_if_nothing_had_happened(images: Path) -> None:
    with trained_by_another(images, "killed"):
        pass
    assert not (images / "killed" / "cab" / "result.json").exists()
    assert main(words(images, "straight")) == 0
    assert main(["distill", "--resume", str(images / "killed")]) == 0
    assert figures(images / "killed" / "cab") == figures(images / "straight" / "cab")
    straight, resumed = (
        safetensors.torch.load_file(images / run / "cab" / "student.safetensors") for run in ("straight", "killed")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_is_left_alone_while_another_process_trains_it(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded; and no longer: when that process is killed, one that loads its images may live on."""
    run = images / "run"
    with trained_by_another(images, "run") as process:
        os.killpg(process.pid, signal.SIGSTOP)
        before = contents(run)
        with monkeypatch.context() as patched:
            patched.setattr("cab.run._run", None)
            assert main(["distill", "--resume", str(run)]) == 2
        expected = f"cab distill: expected a folder in which no other process trains, got {run}\n"
        assert capsys.readouterr() == ("", expected)
        assert contents(run) == before
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.killpg(process.pid, 0)  # raises where no process of the group is left
        assert main(["distill", "--resume", str(run)]) == 0
        assert (run / "cab" / "result.json").is_file()


def small() -> RunConfig:
    sizes = [
        "student.depth=1",
        "student.embed_dim=16",
        "teacher.depth=1",
        "teacher.embed_dim=16",
        "teacher.num_heads=2",
    ]
    return resolve(settings=["device=cpu", "arms=ce", "optim.steps=1", *sizes])


def test_a_new_run_is_not_begun_where_another_has_just_begun(tmp_path: Path) -> None:
    """Both found no folder, and the other made it first."""
    refusal = f"expected a folder in which no other process trains, got {tmp_path}"
    with locked(tmp_path / ".lock"), pytest.raises(UserError, match=refusal):
        distill(small(), tmp_path, print)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_new_run_is_not_begun_where_another_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began when this one had looked, and ended, or was killed, before this one was to write."""
    config = tmp_path / "config.yaml"
    monkeypatch.setattr("cab.run.Run.check", lambda run: config.write_text("another's"))
    refusal = f"expected a new or empty folder for --out, got {tmp_path}; --resume {tmp_path} goes on with it"
    with pytest.raises(UserError, match=refusal):
        distill(small(), tmp_path, print)
    assert config.read_text() == "another's"
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "config.yaml"}


def flock_that_says(code: int) -> Callable[..., None]:
    """``flock`` of a disk that says this error."""

    def flock(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock


def test_a_run_goes_without_a_lock_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / ".lock"):
        for code in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            with monkeypatch.context() as patched:
                patched.setattr("fcntl.flock", flock_that_says(code))
                assert [row.name for row in distill(small(), tmp_path, print)] == ["ce"]
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on a system that knows none
        assert [row.name for row in distill(small(), tmp_path, print)] == ["ce"]


def test_a_run_does_not_go_without_its_lock_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"
    refusal = f"expected a file that can be written, {lock}, got: .Errno "
    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", flock_that_says(errno.EIO))
        with pytest.raises(UserError, match=f"{refusal}5. "):
            distill(small(), tmp_path, print)
    lock.unlink()
    lock.mkdir()
    with pytest.raises(UserError, match=f"{refusal}21. "):
        distill(small(), tmp_path, print)
    assert list(tmp_path.iterdir()) == [lock]
