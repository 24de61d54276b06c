"""What the environment must say before torch, or any kernel, is imported: without a GPU, kernels are interpreted."""

import os

# Tests run side by side, one on a core; inherited by the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

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
