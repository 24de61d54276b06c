#!/usr/bin/env python3
"""A training step of a vision distillation on one GPU and on all of them: milliseconds, images/s, peak memory.

    torchrun --nproc-per-node 2 bench/scaling.py
    torchrun --nproc-per-node 2 bench/scaling.py --student vim_base_patch16_224 --teacher deit_base_patch16_224

Each GPU has a batch of its own, of synthetic images; bf16, KL and alignment, random weights. On one GPU the first
process works and the others wait. "DDP, graphed" replays forward and backward as one CUDA graph and averages all
gradients in one exchange, as the trainer does; "FSDP2" shards student, bridges and teacher and has no graph. The ratio
is that of images/s to the same step on one GPU. The slowest process counts. Peak memory is the first process'.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from _machine import describe_machine
from _timing import measured
from step import Step, make_task

import cab.processes as processes


class SharedStep(Step):
    """A step whose gradients are means over the processes."""

    def __init__(self, student: str, teacher: str, batch: int, *, shard: bool) -> None:
        task = make_task(student, teacher, True)
        if shard:
            for module in (task.teacher, task):
                processes.shard(module, torch.device("cuda", torch.cuda.current_device()))
        super().__init__(task, batch, torch.bfloat16, graph=not shard)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if self.graphed:
            self.graphed(images=self.images)
            processes.average_gradients(self.task)
        else:
            self.forward().backward()
        self.optimizer.step()


def measure(name: str, make: Callable[[], Step], batch: int, alone: bool, before: float | None = None) -> float:
    """Print a row, and return its images/s."""
    count = 1 if alone else processes.count()
    found = torch.zeros(2, device="cuda")
    if not alone or processes.rank() == 0:
        found += torch.tensor(measured(make), device="cuda")
    every = [torch.empty_like(found) for _ in range(processes.count())]
    torch.distributed.all_gather(every, found)
    ms, peak = max(float(each[0]) for each in every), float(every[0][1])
    speed = 1000 * batch * count / ms
    ratio = "" if before is None else f"{speed / before:.2f}x"
    if processes.rank() == 0:
        print(f"| {count} | {name} | {ms:.1f} | {speed:.0f} | {ratio} | {peak:.2f} |", flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="vim_tiny_patch16_224")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=128, help="of a GPU")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not torch.cuda.is_available():
        parser.error("expected torchrun with at least 2 processes, each with a CUDA GPU, got fewer")
    processes.start(int(os.environ["LOCAL_RANK"]), cpu=False)
    if processes.rank() == 0:
        print(f"{describe_machine()}\n\n{args.teacher} -> {args.student}, 224 px, batch {args.batch} a GPU, bf16\n")
        print("| GPUs | how | ms | images/s | over one GPU | peak GiB |\n|---|---|---|---|---|---|")
    names = args.student, args.teacher

    def one(graph: bool) -> Step:
        return Step(make_task(*names, True), args.batch, torch.bfloat16, graph)

    def shared(shard: bool) -> Step:
        return SharedStep(*names, args.batch, shard=shard)

    graphed = measure("graphed", lambda: one(True), args.batch, True)
    measure("DDP, graphed", lambda: shared(False), args.batch, False, graphed)
    eager = measure("eager", lambda: one(False), args.batch, True)
    measure("FSDP2, eager", lambda: shared(True), args.batch, False, eager)
    processes.leave()


if __name__ == "__main__":
    main()
