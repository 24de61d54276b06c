#!/usr/bin/env python3
"""One training step of transformers' Mamba with 130M parameters: milliseconds, tokens/s, peak memory.

    python bench/language_step.py                # on cab_kernels, 8 x 2048 and 1 x 2048 tokens
    python bench/language_step.py --fallback     # and transformers' own sequential loop, 1 x 2048: half a minute a step
    python bench/language_step.py --profile      # and the largest kernels of the step of 8 x 2048

Weights and tokens are random. bf16 autocast over float32 parameters, cross-entropy by the model itself, a fused AdamW.
Peak memory is the allocator's, with parameters and optimiser state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _machine import describe_machine
from _timing import WARMUP, measured, print_kernels
from transformers import MambaConfig, MambaForCausalLM

from cab.students.transformers_mamba import use_cab_kernels

LENGTH = 2048


def make_step(batch: int, on_kernels: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24)).train()
        ids = torch.randint(model.config.vocab_size, (batch, LENGTH))
    if on_kernels:
        use_cab_kernels(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()

    return step


def report(name: str, batch: int, on_kernels: bool, **counts: int) -> None:
    ms, peak = measured(lambda: make_step(batch, on_kernels), **counts)
    print(f"| {name} | {batch} x {LENGTH} | {ms:.1f} | {batch * LENGTH / ms * 1000:,.0f} | {peak:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--profile", metavar="KERNELS", nargs="?", type=int, const=24, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none")
    print(describe_machine())
    print("\n| MambaForCausalLM, 130M | tokens | ms | tokens/s | peak GiB |\n|---|---|---|---|---|")
    for batch in (8, 1):
        report("cab_kernels", batch, True)
    if args.fallback:
        report("transformers' loop", 1, False, warmup=0, steps=1)
    if args.profile:
        step = make_step(8, True)
        for _ in range(WARMUP):
            step()
        print()
        print_kernels(step, args.profile)


if __name__ == "__main__":
    main()
