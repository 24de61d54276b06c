"""Several processes that share a run make the run of one: the same losses, weights, schedule and files."""

import importlib.util
import json
import os
import shutil
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
from cab.files import locked
from cab.settings import resolve, to_yaml

LAUNCH = Path(__file__).parents[1] / "launch"
# Unequal images in each share of a batch, statistics and gradients that must be those of the whole batch, an
# alignment that ends, and a test split that two processes cannot halve.
SETTINGS = [
    "precision=float32",
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
SHARDED = [*SETTINGS, "shard=true", "optim.ema=0.9"]
ZERO3 = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")
SHARDING = ["fsdp2", pytest.param("zero3", marks=ZERO3)]
# What accelerate sets for launch/zero3.yaml.
BY_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"))]

# Every block is gathered, and every gradient reduced, by itself. One run goes through, the other is interrupted in the
# student's training; a copy of it is left, and it is resumed.
SHARED_OUT = """
import functools, os, shutil, sys
import cab.cli, cab.processes, cab.trainer
cab.processes.GATHERED = cab.zero.REDUCED = 1
launcher = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
def main(words):
    os.environ.update(launcher)
    return cab.cli.main(words)
leave, cab.processes.leave = cab.processes.leave, cab.processes.wait
cab.processes.start = functools.cache(cab.processes.start)
*words, folder = sys.argv[1:]
assert main([*words, f"{folder}/two"]) == 0
advance = cab.trainer._Advance.on_step_begin
def interrupt(self, args, state, control, **kwargs):
    if state.global_step == 5:
        raise KeyboardInterrupt
    advance(self, args, state, control, **kwargs)
cab.trainer._Advance.on_step_begin = interrupt
try:
    main([*words, f"{folder}/cut"])
except SystemExit as stopped:
    assert stopped.code == 130
cab.trainer._Advance.on_step_begin = advance
if cab.processes.rank() == 0:
    shutil.copytree(f"{folder}/cut", f"{folder}/alone")
cab.processes.wait()
assert main(["distill", "--resume", f"{folder}/cut"]) == 0
leave()
"""

# What a graph would replay, in the place of a graph.
REPLAYED = """
import sys
import torch
import cab.trainer
from cab.cli import main

class Replayed:
    def __init__(self, task, dtype, passes):
        self.task, self.passes = task, passes
        self.parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]

    def __call__(self, **inputs):
        outputs = self.task(**inputs)
        gradients = torch.autograd.grad(outputs["loss"] / self.passes, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return {name: value.detach() for name, value in outputs.items()}

step = cab.trainer.TaskTrainer.training_step
def unwrapped_step(self, model, *rest):
    assert model is self.model, f"wrapped by {type(model)}"
    return step(self, model, *rest)

cab.trainer.TaskTrainer.training_step = unwrapped_step
cab.trainer.GraphedStep, cab.trainer._replays = Replayed, lambda config, device: True
sys.exit(main(sys.argv[1:]))
"""


def arguments(folder: Path, settings: Sequence[str]) -> list[str]:
    return ["distill", *(word for setting in settings for word in ("--set", setting)), "--out", str(folder)]


def run_two(words: Sequence[str], program: str = "", by: str = "") -> list[subprocess.CompletedProcess[str]]:
    """``torchrun --nproc-per-node 2 -m cab WORDS``, or with a program for cab, as the two processes that it starts; by
    "zero3", as accelerate starts them."""
    command = ["-c", program] if program else ["-m", "cab"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, *command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **(BY_DEEPSPEED if by == "zero3" else {}),
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                "DS_ACCELERATOR": "cpu",  # accelerate loads DeepSpeed where it is, which says what it has to guess
            },
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=200) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def launched(configuration: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with a configuration that is shipped."""
    options = ["--config_file", str(LAUNCH / configuration), "--num_processes", "2", "--module"]
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


def same_weights(folder: Path, file: str) -> dict[str, torch.Tensor]:
    """Those of the run ``two``, which must be those of the run ``one``."""
    one, two = (safetensors.torch.load_file(folder / run / file) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        # Adam divides by the gradient's size, so that rounding shows where a gradient is all but 0.
        torch.testing.assert_close(two[name], one[name], rtol=2e-2, atol=5e-4, msg=name)
    for name in one.keys() & {"trust.total", "trust.best", "targets.of_key.mean", "targets.of_query.count"}:
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=1e-5)
    return two


def same_files(folder: Path) -> None:
    """Those of the run ``two`` are those of the run ``one``, but for what each process has of its own."""
    names = [
        sorted(str(file.relative_to(folder / run)) for file in (folder / run).rglob("*")) for run in ("one", "two")
    ]
    missing = {name for name in set(names[0]) ^ set(names[1]) if "tfevents" not in name and "rng_state" not in name}
    assert missing == set()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("targets", ["standardised", "raw"])  # on GPUs, a graph is replayed for the second alone
def test_two_processes_train_as_one_does(tmp_path: Path, targets: str, device: str) -> None:
    settings = [*SETTINGS, f"device={device}", f"bridge.targets={targets}"]
    assert main(arguments(tmp_path / "one", settings)) == 0
    first, second = run_two(arguments(tmp_path / "two", settings))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    assert "student sees 70 of " in first.stdout
    same_files(tmp_path)
    assert any(entry.get("align_weight", 0) > 0 for entry in same_metrics(tmp_path))
    same_weights(tmp_path, "custom/checkpoint-6/model.safetensors")


def test_two_processes_leave_a_run_alone_that_another_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(resolve(settings=SETTINGS)))
    with locked(run / ".lock"):
        for process in run_two(["distill", "--resume", str(run)]):
            line = f"cab distill: expected a folder in which no other process trains, got {run}"
            assert (process.returncode, process.stderr.splitlines()[-1]) == (2, line)
    assert {file.name for file in run.iterdir()} == {".lock", "config.yaml"}


FIRST = """
import cab.processes as processes
from cab.config import UserError
processes.start(0, cpu=True)
calls = []
def refuse(error):
    calls.append(error)
    raise error
for error in (UserError("expected this, got that"), PermissionError(13, "Permission denied", "there")):
    try:
        processes.first(lambda: refuse(error))
    except type(error) as raised:
        assert str(raised) == str(error)
    else:
        raise AssertionError("nothing was raised")
assert len(calls) == (2 if processes.rank() == 0 else 0)
assert processes.first(processes.rank) == 0
processes.leave()
"""


def test_what_the_first_process_gets_or_raises_all_do() -> None:
    for process in run_two([], FIRST):
        assert process.returncode == 0, process.stderr


def test_two_processes_refuse_what_the_first_does(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for process in run_two(arguments(tmp_path / "file" / "run", SETTINGS)):
        line = f"cab distill: expected a folder for the run that can be made, {tmp_path}/file/run, got: [Errno 20] "
        assert process.returncode == 2
        assert process.stderr.splitlines()[-1].startswith(line)


def test_a_replayed_step_is_not_wrapped_and_its_gradients_are_averaged(tmp_path: Path) -> None:
    assert main(arguments(tmp_path / "one", SETTINGS)) == 0
    for process in run_two(arguments(tmp_path / "two", SETTINGS), REPLAYED):
        assert process.returncode == 0, process.stderr
    same_metrics(tmp_path)
    same_weights(tmp_path, "custom/checkpoint-6/model.safetensors")


@pytest.mark.parametrize("by", SHARDING)
@pytest.mark.parametrize("device", DEVICES)
def test_sharded_processes_train_as_one_does_and_resume_exactly(tmp_path: Path, device: str, by: str) -> None:
    """On two processes bit for bit; on one, which holds the models whole, to rounding."""
    settings = [*SHARDED, f"device={device}"]
    assert main(arguments(tmp_path / "one", settings)) == 0
    for process in run_two(arguments(tmp_path, settings), SHARED_OUT, by):
        assert process.returncode == 0, process.stderr
    same_files(tmp_path)
    same_metrics(tmp_path)
    for file in ("custom/checkpoint-6/model.safetensors", "custom/checkpoint-6/averaged.safetensors"):
        same_weights(tmp_path, file)
    student = same_weights(tmp_path, "custom/student.safetensors")
    resumed = safetensors.torch.load_file(tmp_path / "cut" / "custom" / "student.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in student.items())
    assert [folder.name for folder in (tmp_path / "alone" / "custom").glob("checkpoint-*")] == ["checkpoint-3"]
    shutil.rmtree(tmp_path / "two")
    (tmp_path / "alone").rename(tmp_path / "two")
    assert main(["distill", "--resume", str(tmp_path / "two")]) == 0
    same_metrics(tmp_path)
    same_weights(tmp_path, "custom/student.safetensors")


EACH_BLOCK = """
import sys
import cab.processes
from cab.cli import main
cab.processes.GATHERED = 1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("by", SHARDING)
@pytest.mark.parametrize("device", DEVICES)
def test_a_sharded_block_whose_output_has_no_gradient_is_whole_in_backward(
    tmp_path: Path, device: str, by: str
) -> None:
    """Attention behind the last Mamba block, whose B and C alone have a gradient while the alignment is the loss.

    The layer map is learned, and logs read it between the passes.
    """
    hybrid = [
        "bridge.layer_map=learned",
        "student.name=bamba",
        "student.depth=3",
        "student.attention=2",
        "student.heads=2",
        "student.head_dim=16",
    ]
    settings = ["--preset", "lm-local", *arguments(tmp_path / "one", [*TEXT, *hybrid, f"device={device}"])[1:]]
    settings += ["--set", "precision=float32", "--set", "shard=true"]
    assert main(["distill", *settings]) == 0
    for process in run_two(["distill", *settings, "--out", str(tmp_path / "two")], EACH_BLOCK, by):
        assert process.returncode == 0, process.stderr
    same_metrics(tmp_path)
    same_weights(tmp_path, "custom/student/model.safetensors")


PARTS = """
import torch
from torch import nn
import cab.processes as processes
processes.GATHERED = 1
processes.start(0, cpu=True)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        self.scale, self.head = nn.Parameter(torch.ones(2)), nn.Linear(4, 6).requires_grad_(False)
    def forward(self, x):
        return self.head(self.blocks(x)) * self.scale.sum()
model = Model()
for value in model.parameters():
    value.grad = torch.full_like(value, processes.rank()) if value.requires_grad else None
processes.average_gradients(model)
for name, value in model.named_parameters():
    assert value.grad is None if name.startswith("head") else (value.grad == 0.5).all(), name
processes.shard(model, torch.device("cpu"))
for name, value in model.named_parameters():
    assert getattr(value, "_local_tensor", value).numel() == value.numel() / (1 if name.startswith("head") else 2), name
processes.leave()
"""


def test_processes_average_gradients_and_hold_their_parts() -> None:
    for process in run_two([], PARTS):
        assert process.returncode == 0, process.stderr


PARTITIONED = """
import copy, gc, os, weakref
import torch
from torch import nn
os.environ["DS_ACCELERATOR"] = "cpu"
import cab.processes as processes
import cab.zero as zero
processes.GATHERED = 1
processes.start(0, cpu=True, by_deepspeed=True)
seen = []
class Block(nn.Linear):
    def forward(self, x):
        seen.append([block.weight.numel() for block in model.blocks])
        return super().forward(x)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(5, 5, bias=False) for _ in range(3))
        self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(5, 2, bias=False).requires_grad_(False)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale.sum()
def sizes():
    return {name: value.numel() for name, value in model.named_parameters()}
torch.manual_seed(0)
model, inputs = Model(), torch.randn(2, 7, 5)
whole, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
for x in inputs:
    (whole(x).square().mean() / 2).backward()
empty = {name: 0 for name in sizes()} | {"head.weight": 10}
seen.clear()

processes.shard(model, torch.device("cpu"))
assert sizes() == empty
assert [len(processes.own(value)) for value in model.parameters()][:5] == [2, 2, 13, 13, 13], "a half, rounded up"
for passes in (1, 2, 3):
    model(inputs[processes.rank()]).square().mean().backward()
    assert sizes() == empty, "all let go of after backward"
    for name, value in model.named_parameters():
        part, expected = processes.own(value), whole.get_parameter(name).grad
        assert value.grad is None
        if expected is None:
            assert part.grad is None, name
        else:
            torch.testing.assert_close(zero.whole(part.grad, part), passes * expected)
assert seen[:3] == [[25, 0, 25], [0, 25, 25], [0, 0, 25]], seen
with processes.kept_whole(model):
    assert sizes() == {name: value.numel() for name, value in whole.named_parameters()}
    model(inputs[0])
    assert sizes() == {name: value.numel() for name, value in whole.named_parameters()}
assert sizes() == empty
seen.clear()
model(inputs[0])
assert seen == [[25, 0, 25], [0, 25, 25], [0, 0, 25]], seen

block, model = weakref.ref(model.blocks[0]), teacher
processes.shard(model, torch.device("cpu"))
gc.collect()
assert block() is None, "an earlier model of the run is kept"
assert sizes() == {name: 0 if name.startswith("blocks") else value.numel() for name, value in whole.named_parameters()}
seen.clear()
with torch.no_grad():
    for x in inputs:
        torch.testing.assert_close(model(x), whole(x))
assert seen[0] == [25, 0, 0] and seen[2] == [0, 0, 25], seen
processes.leave()
"""


@ZERO3
def test_zero3_holds_parts_of_parameters_and_gradients() -> None:
    """A block of a trained model is whole while it computes, the last one until backward ends; a frozen model's too."""
    for process in run_two([], PARTITIONED):
        assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp.yaml", DistributedType.MULTI_GPU),
        ("fsdp2.yaml", DistributedType.FSDP),
        ("zero3.yaml", DistributedType.DEEPSPEED),
    ],
)
def test_the_shipped_configurations_are_accelerate_s(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(LAUNCH / name))
    assert (config.distributed_type, config.num_machines) == (kind, 1)


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", pytest.param("zero3.yaml", marks=ZERO3)])
@pytest.mark.parametrize("device", DEVICES)
def test_accelerate_launches_a_run_on_text_in_stages(tmp_path: Path, name: str, device: str) -> None:
    settings = [*TEXT, f"device={device}", "precision=float32"]
    words = ["--preset", "lm-local", *arguments(tmp_path / "one", settings)[1:]]
    assert main(["distill", *words]) == 0
    words[-1] = str(tmp_path / "two")
    two = launched(name, ["distill", *words])
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("student reads ") == 1
    assert ("\nshard: true " in (tmp_path / "two" / "config.yaml").read_text()) == (name != "ddp.yaml")
    assert len(list((tmp_path / "two" / "custom" / "checkpoint-4").glob("rng_state_*"))) == 2
    metrics = [entry for entry in same_metrics(tmp_path) if entry["split"] == "train"]
    assert [entry["align_weight"] > 0 for entry in metrics] == [True, False]
    assert ["kl" in entry for entry in metrics] == [False, True]
    same_weights(tmp_path, "custom/student/model.safetensors")
