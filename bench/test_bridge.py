"""The bridge loss, forward and backward of all bridges, against plain PyTorch.

    pytest bench/test_bridge.py --benchmark-only -p no:xdist -o addopts=""

Each time is of one replay of a CUDA graph ("graph") or of a step launched from Python ("eager"), with the gradients
dropped before each. Floor: 6 * tokens * hidden * (d_state + width) operations a bridge (two products forward, four
backward) at RATE. Memory is peak allocated above the inputs, with and without the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from cab_kernels import bridge_mse_grouped, bridge_mse_grouped_ref

RATE = {torch.bfloat16: 800e12, torch.float32: 50e12}  # measured on an H100: bf16 product; float32 without tf32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Case(NamedTuple):
    """``targets`` targets, each shared by ``share`` bridges."""

    targets: int
    share: int
    batch: int
    length: int
    d_state: int
    hidden: int
    width: int
    dtype: torch.dtype

    @property
    def floor_ms(self) -> float:
        operations = 6 * self.batch * self.length * self.hidden * (self.d_state + self.width)
        return 1e3 * self.targets * self.share * operations / RATE[self.dtype]


CASES = {
    "DeiT-Tiny to Vim-Tiny, bf16": Case(24, 4, 128, 197, 16, 128, 192, torch.bfloat16),
    "DeiT-Tiny to Vim-Tiny, fp32": Case(24, 4, 128, 197, 16, 128, 192, torch.float32),
    "DeiT-Base to Vim-Tiny, bf16": Case(24, 4, 128, 197, 16, 128, 768, torch.bfloat16),
    "GPT-2": Case(12, 1, 32, 1024, 768, 768, 768, torch.bfloat16),
    "Phi": Case(48, 1, 4, 2048, 2048, 2048, 2048, torch.bfloat16),
}


class Problem:
    """Inputs of one case; every second x is reversed."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

        bridges = range(case.targets * case.share)
        self.xs = [draw(case.batch, case.length, case.d_state).requires_grad_() for _ in bridges]
        self.targets = [draw(case.batch, case.length, case.width) for _ in range(case.targets)]
        sizes = ((case.hidden, case.d_state), (case.hidden,), (case.width, case.hidden), (case.width,))
        self.stacks = [
            [(draw(case.share, *size, dtype=torch.float32) * size[-1] ** -0.5).requires_grad_() for size in sizes]
            for _ in range(case.targets)
        ]
        order = torch.arange(case.length, device="cuda")
        self.index = torch.stack([order, order.flip(0)] * (case.share // 2)) if case.share > 1 else None

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [*self.xs, *(weight for stack in self.stacks for weight in stack)]

    def group(self, number: int) -> list[torch.Tensor]:
        return self.xs[number * self.case.share : (number + 1) * self.case.share]


def ours(problem: Problem, function: Callable[..., torch.Tensor] = bridge_mse_grouped) -> torch.Tensor:
    """Two targets a call: a teacher's layer has its K and Q at the same time."""
    index = None if problem.index is None else problem.index.repeat(2, 1)
    losses = []
    for j in range(0, len(problem.targets), 2):
        xs = [*problem.group(j), *problem.group(j + 1)]
        stacks = zip(*problem.stacks[j : j + 2], strict=True)
        losses.append(function(xs, *stacks, problem.targets[j : j + 2], token_index=index).sum())
    return torch.stack(losses).sum()


def plain(problem: Problem) -> torch.Tensor:
    losses = []
    for j, target in enumerate(problem.targets):
        for i, x in enumerate(problem.group(j)):
            w1, b1, w2, b2 = (weight[i] for weight in problem.stacks[j])
            seen = target if problem.index is None or i % 2 == 0 else target.flip(1)
            losses.append(F.mse_loss(F.linear(F.silu(F.linear(x, w1, b1)), w2, b2), seen))
    return torch.stack(losses).sum()


def stacked(problem: Problem) -> torch.Tensor:
    losses = []
    for j, target in enumerate(problem.targets):
        w1, b1, w2, b2 = problem.stacks[j]
        x = torch.stack(problem.group(j)).flatten(1, 2)
        hidden = F.silu(torch.baddbmm(b1.unsqueeze(1).to(x.dtype), x, w1.mT.to(x.dtype)))
        y = torch.baddbmm(b2.unsqueeze(1).to(x.dtype), hidden, w2.mT.to(x.dtype))
        y = y.unflatten(0, (-1, min(2, len(y))))
        seen = target if problem.index is None else torch.stack((target, target.flip(1)))
        seen = seen.view(1, -1, *y.shape[2:])
        losses.append((y - seen).square().mean((0, 2, 3)).sum() * len(y))
    return torch.stack(losses).sum()


WAYS: dict[str, Callable[[Problem], torch.Tensor]] = {"ours": ours, "plain": plain, "stacked": stacked}


def clear(problem: Problem) -> None:
    for value in problem.inputs:
        value.grad = None


def step(problem: Problem, way: Callable[[Problem], torch.Tensor]) -> None:
    clear(problem)
    with torch.autocast("cuda", torch.bfloat16, enabled=problem.case.dtype != torch.float32):
        loss = way(problem)
    loss.backward()


def peak(problem: Problem, way: Callable[[Problem], torch.Tensor]) -> int:
    clear(problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(problem, way)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def graphed(problem: Problem, way: Callable[[Problem], torch.Tensor]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(problem, way)
    torch.cuda.current_stream().wait_stream(stream)
    clear(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(problem, way)
    return graph.replay


@pytest.fixture(scope="module", autouse=True)
def headed(report: Callable[[str], None]) -> None:
    report("| case | way | launch | ms | times floor | GB | GB without the weights' gradients |")
    report("|---|---|---|---|---|---|---|")


@pytest.fixture(scope="module", params=list(CASES))
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, CASES[request.param])


@pytest.fixture(scope="module")
def checked() -> None:
    """No figures of a kernel that is wrong."""
    for name in CASES:
        small = Problem(name, CASES[name]._replace(targets=2, batch=2, length=70))
        got, want = (
            torch.autograd.grad(ours(small, function), small.inputs)
            for function in (bridge_mse_grouped, bridge_mse_grouped_ref)
        )
        for one, other in zip(got, want, strict=True):
            if (one - other).norm() > 1e-2 * other.norm():
                pytest.fail("bridge_mse disagrees with its definition: no figures")


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("launch", ["graph", "eager"])
@pytest.mark.parametrize("way", [*WAYS, "compiled"])
def test_forward_and_backward(
    benchmark, problem: Problem, way: str, launch: str, report: Callable[[str], None]
) -> None:
    run = WAYS.get(way) or torch.compile(stacked)
    step(problem, run)
    memory = peak(problem, run) / 1e9
    rest = memory - sum(weight.nbytes for stack in problem.stacks for weight in stack) / 1e9
    once = graphed(problem, run) if launch == "graph" else lambda: step(problem, run)

    def timed() -> None:
        once()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    ms = 1e3 * benchmark.stats.stats.median
    name, floor = problem.name, problem.case.floor_ms
    report(f"| {name} | {way} | {launch} | {ms:.2f} | {ms / floor:.2f} | {memory:.3f} | {rest:.3f} |")
    benchmark.extra_info |= {"floor_ms": floor, "gb": memory, "gb_without_weight_gradients": rest}
    clear(problem)
    torch.cuda.empty_cache()
