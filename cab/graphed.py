"""Forward and backward of a task as one CUDA graph: a step that costs the GPU's time and not Python's."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cab.distill.task import DistillationTask

WARMUP = 3  # steps before the capture: kernels are compiled, workspaces made


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Where every capture warms up and happens: cuBLAS's workspaces stay, for each stream that ever had a product."""
    return torch.cuda.Stream(device)


class _Captured(NamedTuple):
    """A graph and the memory through which it is spoken to."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: list[Tensor | None]


class GraphedStep:
    """Replays the forward and backward pass of a task for batches of one shape.

    A small model on a fast GPU is bound by the launches of its thousands of kernels. Captured once, they are launched
    as one. What changes from step to step reaches the graph through memory: the batch, the parameters, the alignment's
    weight, the random numbers. For each shape of batch, and again when the alignment ends, a graph of its own is
    captured on first use.

    Args:
        task: on a GPU; its forward takes tensors by name and returns "loss" and other tensors.
        dtype: of autocast; float32 for none.
        passes: whose gradients are accumulated for a step of the optimiser; each counts 1 / passes.
    """

    def __init__(self, task: DistillationTask, dtype: torch.dtype, passes: int = 1) -> None:
        self.task = task
        self.dtype = dtype
        self.passes = passes
        self.parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
        self._captured: dict[Any, _Captured] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Add the gradients of one batch to ``.grad``, and return the task's outputs.

        The outputs are overwritten by the next call for a batch of the same shape.
        """
        key = (*((name, value.shape, value.dtype) for name, value in inputs.items()), self.task.alignment_weight > 0)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        captured = self._captured[key]
        for name, value in inputs.items():
            captured.inputs[name].copy_(value, non_blocking=True)
        before = [
            # The graph is about to write over the gradients that it handed out.
            earlier.clone() if earlier is not None and earlier is gradient else earlier
            for earlier, gradient in zip((p.grad for p in self.parameters), captured.gradients, strict=True)
        ]
        captured.graph.replay()
        for parameter, earlier, gradient in zip(self.parameters, before, captured.gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if earlier is None else earlier + gradient
        return captured.outputs

    def _capture(self, inputs: dict[str, Tensor]) -> _Captured:
        held = {name: value.clone() for name, value in inputs.items()}
        random_state = torch.cuda.get_rng_state()
        kept = {name: value.clone() for name, value in self.task.named_buffers()}
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._run(held)
        torch.cuda.current_stream().wait_stream(stream)
        for name, value in self.task.named_buffers():  # the warm-up was no training
            value.copy_(kept[name])
        torch.cuda.set_rng_state(random_state)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on: NCCL's looks for what has ended, the loader's pins memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs, gradients = self._run(held)
        return _Captured(graph, held, outputs, gradients)

    def _run(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            outputs = self.task(**inputs)
        gradients = torch.autograd.grad(outputs["loss"] / self.passes, self.parameters, allow_unused=True)
        return {name: value.detach() for name, value in outputs.items()}, list(gradients)
