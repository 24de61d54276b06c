#!/usr/bin/env python3
"""Memory of the bridge loss against aligning whole attention matrices, over the sequence length.

    python bench/memory_vs_fullmatrix.py                # measured on the GPU; about five minutes
    python bench/memory_vs_fullmatrix.py --quick        # the short lengths; under a minute
    python bench/memory_vs_fullmatrix.py --device cpu   # the same table from a trace of fake tensors, without a GPU

Peak memory above the inputs of forward and backward, at a fixed number of tokens. "matrix" materialises the teacher's
softmax(Q K^T / sqrt(d)) and the student's mixer (C B^T times a scalar decay, causal), which are outputs of the two
models and so stay until backward; the distance is a Frobenius norm per head, or of the means over heads ("head mean").
"bridge" maps B to K and C to Q through two layers, in plain
PyTorch, compiled, and with bridge_mse. "one layer" is a layer with its backward; "all layers" keeps every layer's graph
until one backward. What does not fit is projected from one layer at a batch that does, and says so.

"x" is how many times what bridge_mse takes in the same dtype, "x bf16" how many times what it takes in bfloat16: the
matrices are commonly compared in float32, the bridges trained under bfloat16 autocast.

The claim is about materialised matrices only: an alignment that makes the matrices tile by tile, as attention kernels
do, would be linear in the length too.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from _machine import describe_machine
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cab_kernels import bridge_mse
from cab_kernels.bridge import chunked_kernels, fused_kernels, product_kernels
from cab_kernels.bridge.kernels import bridge_mse_triton

GIB = 2**30


class Size(NamedTuple):
    """A pair of models: ``bridges`` a layer, one for each of K and Q and direction."""

    name: str
    layers: int
    tokens: int
    heads: int
    head_dim: int
    student_heads: int
    d_state: int
    hidden: int
    bridges: int
    causal: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


GPT2 = Size("GPT-2", 6, 32768, 12, 64, 12, 64, 768, 2, True)
VISION = Size("DeiT-Tiny to Vim-Tiny", 24, 25216, 3, 64, 1, 16, 128, 4, False)
GOALS = {197: 10, 512: 19, 1024: 39, 2048: 78, 4096: 156}  # GPT-2, all layers: float32 matrices, bfloat16 bridges
LAYERS = ("one layer", "all layers")
OURS = "bridge, bridge_mse"


class Trace(TorchDispatchMode):
    """Bytes of all storages that were made under it and are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What is written into a tensor that is there makes none.
        out = kwargs["out"] if "out" in kwargs else function(*args, **kwargs)
        before = {StorageWeakRef(leaf.untyped_storage()) for leaf in _tensors((args, kwargs))}
        for leaf in _tensors(out):
            ref = StorageWeakRef(leaf.untyped_storage())
            if ref not in before:
                self.alive.setdefault(ref, leaf.untyped_storage().nbytes())
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def attention_matrices(
    size: Size, batch: int, length: int, dtype: torch.dtype, device: str, head_mean: bool
) -> Callable:
    """A layer's inputs are drawn here; the function returned makes its loss."""

    def draw(heads: int, dim: int, grad: bool) -> torch.Tensor:
        return torch.randn(batch, heads, length, dim, device=device).to(dtype).requires_grad_(grad)

    q, k = draw(size.heads, size.head_dim, False), draw(size.heads, size.head_dim, False)
    directions = [
        (draw(size.student_heads, size.d_state, True), draw(size.student_heads, size.d_state, True),
         draw(size.student_heads, 1, True))
        for _ in range(size.bridges // 2)
    ]  # fmt: skip

    def loss() -> tuple[torch.Tensor, list[torch.Tensor]]:
        keep = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        with torch.no_grad():
            scores = q @ k.mT / size.head_dim**0.5
            teacher = (scores.masked_fill(~keep, float("-inf")) if size.causal else scores).softmax(-1)
            teacher = teacher.mean(1, keepdim=True) if head_mean else teacher
        total, outputs = torch.zeros((), device=device), [teacher]
        for b, c, decay in directions:
            steps = F.logsigmoid(decay).cumsum(2)
            mixer = (c @ b.mT) * (steps - steps.mT).masked_fill(~keep, float("-inf")).exp()
            mixer = mixer.mean(1, keepdim=True) if head_mean else mixer
            outputs.append(mixer)
            total = total + torch.linalg.matrix_norm(mixer - teacher).float().mean()
        return total, outputs

    return loss


def plain_bridge(x: torch.Tensor, weights: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = weights
    return F.mse_loss(F.linear(F.silu(F.linear(x, w1, b1)), w2, b2), target)


def bridge_layer(
    size: Size, batch: int, length: int, dtype: torch.dtype, device: str, bridge: Callable[..., torch.Tensor]
) -> Callable:
    """A layer's inputs and bridges are drawn here; the function returned makes its loss."""
    width = size.student_heads * size.d_state
    shapes = ((size.hidden, width), (size.hidden,), (size.width, size.hidden), (size.width,))
    xs = [torch.randn(batch, length, width, device=device).to(dtype).requires_grad_() for _ in range(size.bridges)]
    weights = [[torch.randn(s, device=device).mul(0.05).to(dtype).requires_grad_() for s in shapes] for _ in xs]
    targets = [torch.randn(batch, length, size.width, device=device).to(dtype) for _ in range(2)]

    def loss() -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.stack([bridge(x, weights[i], targets[i % 2]).float() for i, x in enumerate(xs)]).sum(), []

    return loss


def our_bridge(x: torch.Tensor, weights: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        return bridge_mse(x, *weights, target)
    # Without a GPU, bridge_mse would take the definition.
    stacks = [[value.unsqueeze(0)] for value in weights]
    return bridge_mse_triton([x], *stacks, [target], None, None, None, None).squeeze(0)


def launch_nothing(_kernel: Any, _grid: Any) -> Callable[..., None]:
    """In the place of a kernel's launch; a mock would keep the arguments alive."""
    return lambda *_, **__: None


@contextlib.contextmanager
def traced_as_on_an_h100() -> Iterator[Trace]:
    """Tensors are fake, no kernel is launched, and buffers are as large as the GPU's multiprocessors make them."""
    with contextlib.ExitStack() as stack:
        for module in (chunked_kernels, fused_kernels, product_kernels):
            stack.enter_context(mock.patch.object(module, "processors", return_value=132))
        # Fake tensors lie nowhere.
        stack.enter_context(mock.patch.object(product_kernels, "is_described", return_value=True))
        stack.enter_context(mock.patch.object(chunked_kernels, "is_described", return_value=True))
        kernel = type(chunked_kernels._chunk_x_kernel)  # compiled or interpreted
        stack.enter_context(mock.patch.object(kernel, "__getitem__", launch_nothing))
        yield stack.enter_context(Trace())


def peak(make_layer: Callable[[], Callable], layers: int, device: str) -> int:
    """Peak bytes above the inputs of ``layers`` layers' losses and one backward."""
    if device == "cpu":
        with FakeTensorMode():
            losses = [make_layer() for _ in range(layers)]
            with traced_as_on_an_h100() as trace:
                _step(losses)
            return trace.peak
    losses = [make_layer() for _ in range(layers)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(losses)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _step(losses: list[Callable]) -> None:
    results = [loss() for loss in losses]
    torch.stack([total for total, _ in results]).sum().backward()


class Figure(NamedTuple):
    bytes: float
    projected: bool


def measure(make: Callable[[int, int], Callable], size: Size, length: int, device: str) -> dict[str, Figure]:
    """Of one layer and of all, measured where that fits, else projected from fewer layers or a smaller batch."""
    batch = size.tokens // length
    room = 0.85 * torch.cuda.mem_get_info()[0] if device != "cpu" else float("inf")
    # A batch of one, or a sixteenth, says what to expect.
    small = max(1, batch // 16)
    one, two = (peak(lambda: make(small, length), layers, device) * batch / small for layers in (1, 2))
    torch.cuda.empty_cache()
    projected = {"one layer": one, "all layers": one + (size.layers - 1) * (two - one)}
    figures = {}
    for which, layers in zip(LAYERS, (1, size.layers), strict=True):
        if 1.3 * projected[which] > room:
            figures[which] = Figure(projected[which], True)
            continue
        figures[which] = Figure(peak(lambda: make(batch, length), layers, device), False)  # noqa: B023
        torch.cuda.empty_cache()
    return figures


def rows(size: Size, lengths: list[int], device: str, compiled: bool) -> Iterable[dict[str, Any]]:
    bridges = {"bridge, plain": plain_bridge, OURS: our_bridge}
    if compiled and device != "cpu":
        bridges["bridge, compiled"] = torch.compile(plain_bridge)
    for length in lengths:
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            ways = {}
            for head_mean in (False, True):
                name = "matrix, head mean" if head_mean else "matrix, per head"
                ways[name] = functools.partial(
                    attention_matrices, size, dtype=dtype, device=device, head_mean=head_mean
                )
            for name, bridge in bridges.items():
                ways[name] = functools.partial(bridge_layer, size, dtype=dtype, device=device, bridge=bridge)
            for name, way in ways.items():
                make = lambda batch, length, way=way: way(batch=batch, length=length)  # noqa: E731
                for which, figure in measure(make, size, length, device).items():
                    found[str(dtype).removeprefix("torch."), name, which] = figure
        for (dtype_name, name, which), figure in found.items():
            yield {
                "size": size.name,
                "T": length,
                "dtype": dtype_name,
                "layers": which,
                "way": name,
                "GiB": figure.bytes / GIB,
                "x": figure.bytes / found[dtype_name, OURS, which].bytes,
                "x bf16": figure.bytes / found["bfloat16", OURS, which].bytes,
                "projected": figure.projected,
            }


def check(table: list[dict[str, Any]]) -> list[str]:
    """What the table should show and does not: the goals, and a ratio that grows with T."""
    ratios = {
        row["T"]: row["x bf16"]
        for row in table
        if (row["size"], row["dtype"], row["way"], row["layers"])
        == (GPT2.name, "float32", "matrix, per head", "all layers")
    }
    wrong = [f"T = {t}: {ratios[t]:.1f} times, not {goal}" for t, goal in GOALS.items() if ratios.get(t, goal) < goal]
    slopes = [ratio / t for t, ratio in ratios.items() if t >= 512]
    if slopes and max(slopes) > 1.1 * min(slopes):
        wrong.append(f"ratio / T from {min(slopes):.4f} to {max(slopes):.4f}, not constant within 10 %")
    return wrong


def draw(table: list[dict[str, Any]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for way in dict.fromkeys(row["way"] for row in table):
        line = [
            row for row in table
            if (row["size"], row["dtype"], row["layers"], row["way"]) == (GPT2.name, "float32", "all layers", way)
        ]  # fmt: skip
        axes.loglog([row["T"] for row in line], [row["GiB"] for row in line], marker="o", label=way)
    axes.set(xlabel="sequence length", ylabel="GiB above the inputs", title="GPT-2 size, float32, all layers")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", default="memory_vs_fullmatrix.csv")
    parser.add_argument("--png", default="memory_vs_fullmatrix.png")
    arguments = parser.parse_args()
    print(describe_machine())
    print(
        "measured" if arguments.device == "cuda" else "traced with fake tensors: no allocator, no workspace of cuBLAS"
    )
    table = []
    lengths = list(GOALS)[: 3 if arguments.quick else None]
    for size, wanted in ((GPT2, lengths), (VISION, [197])):
        for row in rows(size, wanted, arguments.device, not arguments.quick):
            table.append(row)
            mark = " projected" if row["projected"] else ""
            print(
                f"{row['size']:22} T {row['T']:5} {row['dtype']:9} {row['layers']:11} {row['way']:20} "
                f"{row['GiB']:9.3f} GiB {row['x']:7.1f} x {row['x bf16']:7.1f} x bf16{mark}",
                flush=True,
            )
    with open(arguments.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    draw(table, arguments.png)
    wrong = check(table)
    print("\n".join(wrong) or "as claimed, and linear in T")
    print("An alignment of attention matrices made tile by tile would be linear in T too.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
