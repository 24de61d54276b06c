"""The selective scan's speed, forward and backward: ``pytest bench/test_scan.py --benchmark-only [--sweep]``.

The rival is mamba_ssm's CUDA extension: timed beside ours where it is installed, on tensors whose steps lie side by
side, the only ones that it does not copy; else its recorded figures, on the GPU that
``recorded/selective_scan_h100.json`` names. The floor is the larger of two times: the bytes that must be read and
written once, at the rate of a large copy; and an exponential for each batch, channel, step and state, at 16 a clock on
each multiprocessor of an H100. All options are on: D, z, delta_bias, softplus. What is launched from Python, and the
definition, are timed for the table alone, not for the sweep.

Below 0.05 ms a replay is mostly the launches of its kernels, and the sum of the kernels' own times, by torch.profiler,
is what is compared, where both are known.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from _timing import copy_bandwidth, kernels_of

from cab_kernels import bidirectional_selective_scan_fn, selective_scan_fn, selective_scan_ref

RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded" / "selective_scan_h100.json").read_text())
EXPONENTIALS_PER_MS = 16 * 132 * 1.755e6
LAUNCHES_RULE = 0.05  # ms: below, kernels are compared by their own times
REFERENCE_NUMBERS = 1e9  # the definition keeps the states of a chunk: beyond this, it takes minutes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    names = list(RECORDED["table"])
    if metafunc.config.getoption("--sweep"):
        names += [name for name in RECORDED["sweep"] if name not in RECORDED["table"]]
    metafunc.parametrize("name", names)
    metafunc.parametrize("layout", ["length-contiguous", "channel-contiguous"])


@pytest.fixture(scope="module", autouse=True)
def headed(report: Callable[[str], None]) -> None:
    report(f"Rival, where recorded: {RECORDED['machine']}")
    report("Times: replayed as a CUDA graph [its kernels alone, compared where short] / launched from Python")
    report("| shape, dtype, layout | what | ms | rival ms | ratio | definition ms | floor ms | of floor |")
    report("|---|---|---|---|---|---|---|---|")


def sizes_of(name: str) -> tuple[int, int, int, int, torch.dtype]:
    """Batch, channels, steps, states and dtype of a shape as it is recorded."""
    sizes, states, dtype = name.split()
    batch, dim, length = map(int, sizes.split("x"))
    return batch, dim, length, int(states[1:]), getattr(torch, dtype)


def make_inputs(batch: int, dim: int, length: int, dstate: int, dtype: torch.dtype, layout: str) -> dict:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def activation() -> torch.Tensor:
        if layout == "channel-contiguous":
            return normal(batch, length, dim).to(dtype).mT
        return normal(batch, dim, length).to(dtype)

    inputs = {"u": activation(), "delta": activation() - 3, "z": activation()}
    inputs |= {name: normal(batch, 1, dstate, length).to(dtype) for name in ("B", "C")}
    inputs |= {"A": -torch.arange(1.0, dstate + 1, device="cuda").repeat(dim, 1)}
    inputs |= {"D": normal(dim), "delta_bias": normal(dim) * 0.5}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def check() -> None:
    """Refuse to report the speed of a wrong answer."""
    inputs = make_inputs(2, 80, 517, 16, torch.float32, "channel-contiguous")
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    results = []
    for scan, given in ((selective_scan_fn, inputs), (selective_scan_ref, wide)):
        out = scan(**given, delta_softplus=True)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(given.values()))])
    for got, want in zip(*results, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-5, "wrong results: no figures"


def cuda_extension() -> Callable | None:
    try:
        importlib.import_module("selective_scan_cuda")
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except (ImportError, AttributeError):
        return None


def median(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=30, return_mode="median")


def graphed(function: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The same launches as one CUDA graph: what the GPU takes when Python is not in its way."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


class Times(NamedTuple):
    """Milliseconds of forward and of backward alone: replayed as a CUDA graph; the sum of the graph's kernels, where it
    is short and was timed here; and, if asked for, launched from Python.
    """

    graph: tuple[float, float]
    kernels: tuple[float | None, float | None] = (None, None)
    eager: tuple[float, float] | None = None

    def text(self, way: int) -> str:
        kernels = "" if self.kernels[way] is None else f" [{self.kernels[way]:.4f}]"
        return f"{self.graph[way]:.4f}" + kernels + (f" / {self.eager[way]:.4f}" if self.eager else "")

    def over(self, other: Times, way: int) -> str:
        """How many times as long these took."""
        these, others = (times.kernels[way] for times in (self, other))
        short = these is not None and others is not None
        ratio = f"[{these / others:.2f}]" if short else f"{self.graph[way] / other.graph[way]:.2f}"
        return ratio + (f" / {self.eager[way] / other.eager[way]:.2f}" if self.eager and other.eager else "")


@functools.lru_cache
def time_definition(batch: int, dim: int, length: int, dstate: int, dtype: torch.dtype) -> tuple[float, float]:
    """Forward and backward of plain PyTorch, once after a warm-up; they do not depend on the layout."""
    inputs = make_inputs(batch, dim, length, dstate, dtype, "channel-contiguous")
    for _ in range(2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        out = selective_scan_ref(**inputs, delta_softplus=True)
        marks[1].record()
        out.backward(torch.randn_like(out))
        marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


@functools.lru_cache
def time_rival(name: str, eager: bool) -> Times:
    """Here, if it is installed, or else as recorded, which was from Python."""
    extension = cuda_extension()
    if extension is None:
        recorded = tuple(RECORDED["table"].get(name) or RECORDED["sweep"][name])
        return Times(recorded, eager=recorded if eager else None)
    return time_both(extension, make_inputs(*sizes_of(name), "length-contiguous"), eager)


def time_both(scan: Callable, inputs: dict, eager: bool = True) -> Times:
    leaves, stream = list(inputs.values()), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Backward runs on the stream that forward ran on, and a graph wants it to be its own.
    with torch.cuda.stream(stream):
        out = scan(**inputs, delta_softplus=True)
        dout = torch.randn_like(out)

        def forward() -> object:
            return scan(**inputs, delta_softplus=True)

        def backward() -> object:
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        from_python = (median(forward), median(backward)) if eager else None
        replays = [graphed(function, stream) for function in (forward, backward)]
        graph = (median(replays[0]), median(replays[1]))
        kernels = tuple(
            kernel_time(replay) if ms < LAUNCHES_RULE else None for replay, ms in zip(replays, graph, strict=True)
        )
        return Times(graph, kernels, from_python)


def kernel_time(replay: Callable[[], None], times: int = 10) -> float:
    """Milliseconds of the kernels of a graph, one after the other, without what lies between them."""
    return sum(event.self_device_time_total for event in kernels_of(replay, times)) / times / 1000


def bidirectional(way: Callable) -> Callable:
    """A scan of two directions that takes what ``make_inputs`` names, those of the second with a ``_1`` behind."""

    def scan(delta_softplus: bool, z: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        names = [name for name in inputs if not name.endswith("_1")]
        pairs = {name: [inputs[name], inputs[f"{name}_1"]] for name in names}
        return way(**pairs, z=z, delta_softplus=delta_softplus)

    return scan


def one_by_one(z: torch.Tensor, delta_softplus: bool, **pairs: list[torch.Tensor]) -> torch.Tensor:
    first, second = ({name: pair[way] for name, pair in pairs.items()} for way in range(2))
    out = selective_scan_fn(**first, z=z, delta_softplus=delta_softplus)
    return out + selective_scan_fn(**second, z=z, delta_softplus=delta_softplus, reverse=True)


def floors(batch: int, dim: int, length: int, dstate: int, size: int) -> tuple[float, float]:
    # Forward: u, delta, z, out; B, C. Backward: u, delta, z, dout, du, ddelta, dz, ungated out; B, C, dB, dC.
    activation, projection = batch * dim * length * size, batch * dstate * length * size
    exponentials = batch * dim * length * dstate / EXPONENTIALS_PER_MS
    return (
        max((4 * activation + 2 * projection) / copy_bandwidth(), exponentials),
        max((8 * activation + 4 * projection) / copy_bandwidth(), exponentials),
    )


@pytest.fixture(scope="module", autouse=True)
def checked() -> None:
    check()


def test_scan(name: str, layout: str, benchmark, report: Callable[[str], None]) -> None:
    batch, dim, length, dstate, dtype = sizes_of(name)
    of_table = name in RECORDED["table"]
    inputs = make_inputs(batch, dim, length, dstate, dtype, layout)
    ours, rival = time_both(selective_scan_fn, inputs, of_table), time_rival(name, of_table)
    definition = (None, None)
    if of_table and batch * dim * length * dstate <= REFERENCE_NUMBERS and length <= 4096:
        definition = time_definition(batch, dim, length, dstate, dtype)
    label = "recorded" if cuda_extension() is None else "timed here"
    floor = floors(batch, dim, length, dstate, dtype.itemsize)
    for i, what in enumerate(("forward", "backward")):
        slow = "-" if definition[i] is None else f"{definition[i]:.1f}"
        report(
            f"| {name}, {layout} | {what} | {ours.text(i)} | {rival.text(i)} ({label}) | {rival.over(ours, i)} "
            f"| {slow} | {floor[i]:.4f} | {floor[i] / ours.graph[i]:.0%} |"
        )
    benchmark.pedantic(lambda: selective_scan_fn(**inputs, delta_softplus=True), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(graph_ms=ours.graph, eager_ms=ours.eager, rival_ms=rival)


@pytest.mark.parametrize(("batch", "dim", "length"), [(128, 384, 197), (8, 384, 197)])
def test_bidirectional(batch: int, dim: int, length: int, benchmark, report: Callable[[str], None]) -> None:
    """Both directions of a block of Vim-Tiny in one launch of each kernel, against two scans and a sum."""
    inputs = make_inputs(batch, dim, length, 16, torch.bfloat16, "channel-contiguous")
    inputs |= {f"{name}_1": tensor.detach().clone().requires_grad_() for name, tensor in inputs.items() if name != "z"}
    ours, separate = (time_both(bidirectional(way), inputs) for way in (bidirectional_selective_scan_fn, one_by_one))
    name = f"{batch}x{dim}x{length} N16 bfloat16"
    for i, what in enumerate(("forward", "backward")):
        report(
            f"| {name}, both directions | {what} | {ours.text(i)} | {separate.text(i)} (two scans and a sum) "
            f"| {separate.over(ours, i)} | - | - | - |"
        )
    scan = bidirectional(bidirectional_selective_scan_fn)
    benchmark.pedantic(lambda: scan(**inputs, delta_softplus=True), rounds=5, warmup_rounds=1)
