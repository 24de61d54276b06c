"""A run that reports to Weights & Biases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vision_runs import distill

from cab.cli import main

FAKE_WANDB = """
import json, os
config, run = {}, None
class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)
class Run:
    id, url, summary = "0", "", {}
    def _label(self, **labels): pass
def tell(**what):
    with open(os.environ["TOLD"], "a") as lines:
        lines.write(json.dumps(what, default=str) + "\\n")
def init(project, name, dir, config):
    global run
    assert run is None and config["optim.steps"] == 2
    run = Run()
    tell(init=name)
def log(values, **kwargs): tell(log=values)
def finish():
    global run
    run = None
    tell(finish=True)
def termwarn(*args, **kwargs): pass
config, summary = Config(), {}
"""


def test_wandb_is_told_of_each_arm(tmp_path: Path) -> None:
    """A module in the place of wandb: nothing here reaches a network."""
    package = tmp_path / "packages" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    for part in ("sdk", "sdk/lib"):
        (package / part / "__init__.py").write_text("")
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    paths = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TOLD": str(tmp_path / "told")}
    words = [*distill("arms=soft-kd,cab", "wandb=true"), "--out", str(tmp_path / "run")]
    for command in (words, ["eval", str(tmp_path / "run")]):  # what only measures is no run
        done = subprocess.run([sys.executable, "-m", "cab", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [entry["init"] for entry in told if "init" in entry] == ["run/teacher", "run/soft-kd", "run/cab"]
    assert sum("finish" in entry for entry in told) == 3
    names = {name for entry in told for name in entry.get("log", {})}
    assert {"train/loss", "train/kl", "train/align", "train/align_layers/00", "eval/accuracy"} <= names


def test_wandb_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cab.callbacks.is_wandb_available", lambda: False)
    assert main([*distill("wandb=true"), "--out", str(tmp_path / "run")]) == 2
    expected = "cab distill: expected the packages of cab-kernels[wandb] for wandb=true, got no module 'wandb'\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()
