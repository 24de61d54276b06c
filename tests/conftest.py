"""What the environment must say before torch, or any kernel, is imported: without a GPU, kernels are interpreted.

And what tests of several files share.
"""

import os
from pathlib import Path

# Tests run side by side, one on a core; inherited by the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from vision_runs import distill

from cab.cli import main

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on images that has ended; nobody writes to it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*distill("arms=soft-kd,cab"), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 6 training and 2 test images, 16 x 16."""
    from PIL import Image  # which kernels do without

    for split, count in (("train", 6), ("val", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (16, 16), colour).save(tmp_path / split / name / f"{index}.png")
    return tmp_path
