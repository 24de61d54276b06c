"""What every figure needs beside it: the GPU, the driver, the versions and the commit."""

from __future__ import annotations

import pathlib
import platform
import subprocess

import torch


def describe_machine() -> str:
    """GPU, driver, Python, PyTorch, Triton and commit, a line."""
    import triton

    gpu = f"no GPU, {platform.machine()}"
    if torch.cuda.is_available():
        driver, _, _ = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")
        gpu = f"{torch.cuda.get_device_name()}, driver {driver}"
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    commit = _output("git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD")
    return f"{gpu}; {versions}; commit {commit}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
