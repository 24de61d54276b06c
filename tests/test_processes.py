"""Several processes that share a run make the run of one: the same losses, weights, schedule and files."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from language_models import TINY_RUN

from cab.cli import main

LAUNCH = Path(__file__).parents[1] / "launch"
# Unequal images in each share of a batch, statistics and gradients that must be those of the whole batch, an
# alignment that ends, and a test split that two processes cannot halve.
SETTINGS = [
    "device=cpu",
    "arms=custom",
    "data.fraction=0.05",
    "student.depth=2",
    "student.embed_dim=16",
    "student.d_state=4",
    "teacher.depth=1",
    "teacher.embed_dim=16",
    "teacher.num_heads=2",
    "teacher.steps=2",
    "bridge.hidden=8",
    "bridge.targets=standardised",
    "loss.schedule=adaptive",
    "optim.steps=6",
    "optim.batch_size=16",
    "optim.accumulation=2",
    "log_every=2",
    "eval_every=3",
    "save_every=3",
]
TEXT = [*TINY_RUN, "arms=custom", "loss.schedule=stages", "loss.until=0.5", "optim.steps=4", "log_every=2"]


def arguments(folder: Path, settings: Sequence[str]) -> list[str]:
    return ["distill", *(word for setting in settings for word in ("--set", setting)), "--out", str(folder)]


def run_two(words: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """``torchrun --nproc-per-node 2 -m cab WORDS``, as the two processes that it would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cab", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            },
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=200) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def launched(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with the configuration that is shipped."""
    options = ["--config_file", str(LAUNCH / "ddp.yaml"), "--num_processes", "2", "--module"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "cab", *words],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def entries(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def same_metrics(folder: Path) -> list[dict[str, Any]]:
    """Those of the student in the runs ``one`` and ``two``, which must have the same, as their teachers must."""
    for part in ("teacher", "custom"):
        one, two = (entries(folder / run / part / "metrics.jsonl") for run in ("one", "two"))
        assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"split", "seconds", "samples_per_second"}:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (part, a["step"], name)
    return one


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    assert main(arguments(tmp_path / "one", SETTINGS)) == 0
    first, second = run_two(arguments(tmp_path / "two", SETTINGS))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    assert "student sees 70 of " in first.stdout
    names = [
        sorted(str(file.relative_to(tmp_path / run)) for file in (tmp_path / run).rglob("*")) for run in ("one", "two")
    ]
    missing = {name for name in set(names[0]) ^ set(names[1]) if "tfevents" not in name and "rng_state" not in name}
    assert missing == set()
    assert any(entry.get("align_weight", 0) > 0 for entry in same_metrics(tmp_path))
    one, two = (
        safetensors.torch.load_file(tmp_path / run / "custom" / "checkpoint-6" / "model.safetensors")
        for run in ("one", "two")
    )
    for name in ("trust.total", "trust.best", "targets.of_key.mean", "targets.of_key.spread", "targets.of_query.count"):
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=1e-5)
    for name in one:
        # Adam divides by the gradient's size, so that rounding shows where a gradient is all but 0.
        torch.testing.assert_close(two[name], one[name], rtol=2e-2, atol=5e-4, msg=name)


def test_the_shipped_configuration_is_accelerate_s() -> None:
    config = load_config_from_file(str(LAUNCH / "ddp.yaml"))
    assert (config.distributed_type, config.num_machines) == (DistributedType.MULTI_GPU, 1)


def test_accelerate_launches_a_run_on_text_in_stages(tmp_path: Path) -> None:
    words = ["--preset", "lm-local", *arguments(tmp_path / "one", TEXT)[1:]]
    assert main(["distill", *words]) == 0
    words[-1] = str(tmp_path / "two")
    two = launched(["distill", *words])
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("student reads ") == 1
    assert len(list((tmp_path / "two" / "custom" / "checkpoint-4").glob("rng_state_*"))) == 2
    metrics = [entry for entry in same_metrics(tmp_path) if entry["split"] == "train"]
    assert [entry["align_weight"] > 0 for entry in metrics] == [True, False]
    assert ["kl" in entry for entry in metrics] == [False, True]
    one, two = (
        safetensors.torch.load_file(tmp_path / run / "custom" / "student" / "model.safetensors")
        for run in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-2, atol=5e-4, msg=name)
