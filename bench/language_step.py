#!/usr/bin/env python3
"""One training step of transformers' Mamba with 130M parameters: milliseconds, tokens/s, peak memory.

    python bench/language_step.py                # on cab_kernels, 8 x 2048 and 1 x 2048 tokens, eager and graphed
    python bench/language_step.py --fallback     # and transformers' own sequential loop, 1 x 2048: half a minute a step
    python bench/language_step.py --profile      # and the largest kernels of the step of 8 x 2048

Weights and tokens are random. bf16 autocast over float32 parameters, cross-entropy by the model itself, a fused AdamW.
Peak memory is the allocator's, with parameters and optimiser state. "eager" launches each kernel from Python; "graphed"
replays forward and backward as one CUDA graph, as the trainer does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _machine import describe_machine
from _timing import WARMUP, measured, print_kernels
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from cab.graphed import GraphedStep
from cab.students.transformers_mamba import use_cab_kernels

LENGTH = 2048


class Task(nn.Module):
    """A language model and its own loss, as :class:`GraphedStep` wants a task."""

    alignment_weight = 0.0

    def __init__(self, on_kernels: bool) -> None:
        super().__init__()
        self.model = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24))
        if on_kernels:
            use_cab_kernels(self.model)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss}


def make_step(batch: int, on_kernels: bool, graph: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        task = Task(on_kernels).train()
        ids = torch.randint(task.model.config.vocab_size, (batch, LENGTH))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    graphed = GraphedStep(task, torch.bfloat16) if graph else None

    def step() -> None:
        optimizer.zero_grad()
        if graphed:
            graphed(input_ids=ids)
        else:
            with torch.autocast("cuda", torch.bfloat16):
                loss = task(ids)["loss"]
            loss.backward()
        optimizer.step()

    return step


def report(name: str, batch: int, on_kernels: bool, graph: bool = False, **counts: int) -> None:
    ms, peak = measured(lambda: make_step(batch, on_kernels, graph), **counts)
    how, rate = "graphed" if graph else "eager", batch * LENGTH / ms * 1000
    print(f"| {name} | {batch} x {LENGTH} | {how} | {ms:.1f} | {rate:,.0f} | {peak:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--profile", metavar="KERNELS", nargs="?", type=int, const=24, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none")
    print(describe_machine())
    print("\n| MambaForCausalLM, 130M | tokens | how | ms | tokens/s | peak GiB |\n|---|---|---|---|---|---|")
    for batch in (8, 1):
        for graph in (False, True):
            report("cab_kernels", batch, True, graph)
    if args.fallback:
        report("transformers' loop", 1, False, warmup=0, steps=1)
    if args.profile:
        step = make_step(8, True, graph=False)
        for _ in range(WARMUP):
            step()
        print()
        print_kernels(step, args.profile)


if __name__ == "__main__":
    main()
