"""What launchers set, and what of it is refused in one line."""

import os
import sys
from pathlib import Path

import pytest
from vision_runs import distill

from cab.cli import main


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            (
                {"ACCELERATE_USE_DEEPSPEED": "true", name: value},
                f"expected {name}={wanted}, as launch/zero3.yaml has it, got {value}\n",
            )
            for name, wanted, value in [
                ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "2"),
                ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "cpu"),
                ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "nvme"),
                ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "zero.json"),
            ]
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "expected FSDP_VERSION=2, as launch/fsdp2.yaml has it, got 1\n",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "expected FSDP_OFFLOAD_PARAMS=false, as launch/fsdp2.yaml has it, got true\n",
        ),
        ({"WORLD_SIZE": "two"}, "expected WORLD_SIZE, which a launcher sets, to be a whole number, got two\n"),
        ({"WORLD_SIZE": "2"}, "expected LOCAL_RANK, which a launcher sets, to be a whole number, got none\n"),
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "expected what a launcher sets for 2 processes, as torchrun does, got: Error initializing ",
        ),
    ],
    ids=[
        *("ZeRO-2", "ZeRO-Offload", "ZeRO-Infinity", "DeepSpeed's file", "FSDP1", "offloading"),
        *("size", "rank", "address"),
    ],
)
def test_launchers_that_are_refused(
    settings: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, whole where the message ends it."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert main([*distill(), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cab distill: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("switch", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerate_itself_is_not_asked_to_shard(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("cab.processes.start", lambda *options: started.append(options))
    monkeypatch.setenv("DS_ACCELERATOR", "")
    for name, value in {switch: "true", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "taken").write_text("")
    assert main([*distill("device=cpu"), "--out", str(tmp_path)]) == 2
    assert switch not in os.environ
    assert started == [(0, True, switch == "ACCELERATE_USE_DEEPSPEED")]


def test_deepspeed_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main([*distill(), "--out", str(tmp_path / "run")]) == 2
    expected = "cab distill: expected the packages of cab-kernels[deepspeed], got no module 'deepspeed'\n"
    assert capsys.readouterr().err == expected
