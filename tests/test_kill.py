"""A run that is killed at any moment goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from cab.cli import main

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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of how torch starts its processes
def test_a_killed_run_goes_on_as_if_nothing_had_happened(images: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-m", "cab", *words(images, "killed")],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    last = time.monotonic() + 120
    while not list((images / "killed" / "cab").glob("checkpoint-*")) and time.monotonic() < last:
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)  # its loading processes too
    killed.wait()
    assert not (images / "killed" / "cab" / "result.json").exists()
    assert main(words(images, "straight")) == 0
    assert main(["distill", "--resume", str(images / "killed")]) == 0
    assert figures(images / "killed" / "cab") == figures(images / "straight" / "cab")
    straight, resumed = (
        safetensors.torch.load_file(images / run / "cab" / "student.safetensors") for run in ("straight", "killed")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
