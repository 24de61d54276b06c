#!/usr/bin/env python3
"""One training step of a vision distillation on synthetic images: milliseconds, images/s, peak memory, phases.

    python bench/step.py              # the table: KL alone and with the alignment, bf16 and fp32, eager and graphed
    python bench/step.py --profile    # and the phases and the largest kernels of the step in the first dtype
    python bench/step.py --student vim_small_patch16_224 --teacher deit_base_patch16_224

Weights are random: the time of a step does not depend on them. The step is forward, backward and a fused AdamW. Peak
memory is the allocator's, with parameters, optimiser state and teacher. "graphed" replays forward and backward as
one CUDA graph, as the trainer does.
"""

from __future__ import annotations

import argparse

import timm
import torch
from _machine import describe_machine
from _timing import WARMUP, measured, print_kernels

import cab.students.vim  # noqa: F401  (registers the students)
from cab.bridge import Bridges
from cab.distill.vision import VisionTask
from cab.graphed import GraphedStep
from cab.teachers.timm import TimmTeacher


def make_task(student_name: str, teacher_name: str, align: bool) -> VisionTask:
    student = timm.create_model(student_name, a_init="zero")
    teacher = TimmTeacher(timm.create_model(teacher_name))
    layers, width = student.num_layers, (teacher.key_width, teacher.query_width)
    bridges = Bridges(layers, student.directions, student.d_state, 128, *width) if align else None
    return VisionTask(student, teacher, bridges).cuda().train()


class Step:
    """A training step on one batch of noise, callable again and again."""

    def __init__(self, task: VisionTask, batch: int, dtype: torch.dtype, graph: bool) -> None:
        self.task = task
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
        self.images = torch.rand(batch, 3, 224, 224, device="cuda")
        self.graphed = GraphedStep(task, dtype) if graph else None

    def forward(self) -> torch.Tensor:
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            return self.task(self.images)["loss"]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if self.graphed:
            self.graphed(images=self.images)
        else:
            self.forward().backward()
        self.optimizer.step()


def measure(student: str, teacher: str, align: bool, batch: int, dtype: torch.dtype, graph: bool) -> None:
    ms, peak = measured(lambda: Step(make_task(student, teacher, align), batch, dtype, graph))
    loss = "KL + alignment" if align else "KL"
    how = "graphed" if graph else "eager"
    print(
        f"| {loss} | {batch} | {str(dtype).removeprefix('torch.')} | {how} | {ms:.1f} | {1000 * batch / ms:.0f} "
        f"| {peak:.2f} |",
        flush=True,
    )


def profile(student: str, teacher: str, batch: int, dtype: torch.dtype, count: int) -> None:
    """Phases of a step by events, and its ``count`` largest kernels."""
    step = Step(make_task(student, teacher, True), batch, dtype, graph=False)
    for _ in range(WARMUP):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    step.optimizer.zero_grad()
    marks[0].record()
    loss = step.forward()
    marks[1].record()
    loss.backward()
    marks[2].record()
    step.optimizer.step()
    marks[3].record()
    torch.cuda.synchronize()
    phases = zip(("forward", "backward", "optimiser"), marks, marks[1:], strict=False)
    print("\n" + ", ".join(f"{name} {start.elapsed_time(end):.1f} ms" for name, start, end in phases))
    print_kernels(step, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="vim_tiny_patch16_224")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 8])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--profile", metavar="KERNELS", nargs="?", type=int, const=24, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none")
    print(describe_machine())
    print(f"\n{args.teacher} -> {args.student}, 224 px\n")
    print("| loss | batch | dtype | how | ms | images/s | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    dtypes = [getattr(torch, name) for name in args.dtype]
    for batch in args.batch:
        for dtype in dtypes:
            for align in (False, True):
                for graph in (False, True):
                    measure(args.student, args.teacher, align, batch, dtype, graph)
    if args.profile:
        profile(args.student, args.teacher, args.batch[0], dtypes[0], args.profile)


if __name__ == "__main__":
    main()
