"""Speed of the causal convolution and the one-token steps, beside causal_conv1d and beside the bytes they must move.

    pytest bench/test_conv.py --benchmark-only -n 0

Every figure is device time: the median of ``triton.testing.do_bench``, which empties the L2 cache before each run, over
replays of a captured CUDA graph, so that no launch from Python counts. The rival runs the same way where it is
installed; else its figure is the one recorded in ``recorded/``, taken without a graph. The floor is the bytes that the
operation cannot avoid over the bandwidth of a large copy, measured first.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Callable

import pytest
import torch
from _timing import copy_bandwidth
from torch import Tensor

from cab_kernels import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    selective_state_update,
    selective_state_update_ref,
)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
triton = pytest.importorskip("triton")

RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded" / "causal_conv1d_h100.json").read_text())
# Vim-Tiny's tokens, Mamba 130M, Mamba 1.4B, one long sequence.
SHAPES = [(128, 384, 197), (8, 1536, 2048), (4, 4096, 2048), (1, 5120, 65536)]
STEPS = [(1, 1536), (1, 5120), (64, 1536), (64, 5120)]
WIDTH, DSTATE = 4, 16


def device_ms(prepare: Callable[[], Callable[[], object]]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the device time of the function that ``prepare`` returns.

    Both run on the capturing stream, because autograd runs a backward pass where its forward pass ran.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    low, median, high = triton.testing.do_bench(graph.replay, warmup=10, rep=50, quantiles=[0.2, 0.5, 0.8])
    return median, low, high


@pytest.fixture(scope="module")
def bandwidth(report: Callable[[str], None]) -> float:
    """Bytes a millisecond of a large copy; refuses first if the results are wrong."""
    check_results()
    report(f"copy {copy_bandwidth() / 1e9:.2f} TB/s; recorded rival: {RECORDED['machine']}")
    return copy_bandwidth()


def check_results() -> None:
    """Stop unless every operation timed here agrees with its definition in float64."""
    x, dout, weight, bias = conv_inputs((2, 72, 197), "time")
    out, *gradients = convolve_both_ways(x, weight, bias, dout, causal_conv1d_fn)
    exact = convolve_both_ways(x.double(), weight.double(), bias.double(), dout.double(), causal_conv1d_ref)
    pairs = list(zip((out, *gradients), exact, strict=True))
    inputs = step_inputs(3, 72)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    pairs.append((selective_state_update(**inputs), selective_state_update_ref(**doubles)))
    state = torch.randn(2, 72, WIDTH, device="cuda")
    pairs.append(
        (
            causal_conv1d_update(x[..., 0], state.clone(), weight, bias, "silu"),
            causal_conv1d_update_ref(x[..., 0].double(), state.double(), weight.double(), bias.double(), "silu"),
        )
    )
    for value, gold in pairs:
        if not (value.double() - gold).norm() <= 1e-2 * gold.norm():
            pytest.exit("the operations disagree with their definitions: no figure would mean anything", returncode=1)


def conv_inputs(shape: tuple[int, int, int], layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dout, weight and bias; time or channels contiguous."""
    batch, dim, length = shape
    size = shape if layout == "time" else (batch, length, dim)
    x, dout = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if layout == "channels":
        x, dout = x.transpose(1, 2), dout.transpose(1, 2)
    return x, dout, torch.randn(dim, WIDTH, device="cuda"), torch.randn(dim, device="cuda")


def convolve_both_ways(
    x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, function: Callable[..., Tensor]
) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    out = function(*inputs, activation="silu")
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def step_inputs(batch: int, dim: int) -> dict[str, Tensor]:
    """Arguments of a step as a Mamba block has them in generation: a float32 state, bfloat16 activations."""
    x, dt, z = (torch.randn(batch, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    B, C = (torch.randn(batch, DSTATE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    state, A = torch.randn(batch, dim, DSTATE, device="cuda"), -torch.rand(dim, DSTATE, device="cuda")
    D, dt_bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
    return {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}


def rival_ms(shape: tuple[int, int, int], layout: str, direction: str, inputs: tuple[Tensor, ...]) -> tuple[float, str]:
    """causal_conv1d's time here if it is installed, else as it was recorded, and which of the two it is."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return RECORDED[layout]["x".join(map(str, shape))][direction == "backward"], "recorded"
    from causal_conv1d import causal_conv1d_fn as rival

    return device_ms(lambda: direction_of(rival, direction, *inputs))[0], "live"


def direction_of(
    function: Callable[..., Tensor], direction: str, x: Tensor, dout: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], object]:
    """One pass as a function without arguments; the backward one runs on a graph that is kept."""
    if direction == "forward":
        return lambda: function(x, weight, bias, activation="silu")
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    out = function(*inputs, activation="silu")
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_convolution(benchmark, shape, layout, direction, bandwidth, report):
    inputs = conv_inputs(shape, layout)
    median, low, high = device_ms(lambda: direction_of(causal_conv1d_fn, direction, *inputs))
    # Forward reads x and writes out; backward reads x and dout and writes dx.
    floor = inputs[0].numel() * 2 * (2 if direction == "forward" else 3) / bandwidth
    rival, source = rival_ms(shape, layout, direction, inputs)
    report(
        f"{'x'.join(map(str, shape)):>13} {layout:>8} {direction:>8}: {median:.4f} ms ({low:.4f} to {high:.4f}), "
        f"causal_conv1d {rival:.4f} ({source}), {rival / median:.2f} times faster, "
        f"floor {floor:.4f}, {floor / median:.0%} of its speed"
    )
    benchmark.extra_info.update(device_ms=median, rival_ms=rival, rival=source, floor_ms=floor)
    run = direction_of(causal_conv1d_fn, direction, *inputs)
    benchmark.pedantic(lambda: (run(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("batch", "dim"), STEPS)
def test_steps(benchmark, batch, dim, bandwidth, report):
    # As many layers' inputs as a large cache cannot hold; one graph takes a step in each.
    layers = [step_inputs(batch, dim) for _ in range(16)]
    conv_states = [torch.randn(batch, dim, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in layers]
    weight = torch.randn(dim, WIDTH, device="cuda")

    def scan_steps() -> list[Tensor]:
        return [selective_state_update(**inputs, dt_softplus=True) for inputs in layers]

    def conv_steps() -> list[Tensor]:
        pairs = zip(layers, conv_states, strict=True)
        return [causal_conv1d_update(inputs["x"], state, weight, inputs["D"], "silu") for inputs, state in pairs]

    # The states are read and written; A, the filter and the vectors over dim are read once; x, dt, z and out too.
    first, state = layers[0], conv_states[0]
    floors = {
        "scan": (2 * first["state"].nbytes + first["A"].nbytes + 4 * first["x"].nbytes + 8 * dim) / bandwidth,
        "conv": (2 * state.nbytes + weight.nbytes + 2 * first["x"].nbytes + 4 * dim) / bandwidth,
    }
    for name, steps in (("scan", scan_steps), ("conv", conv_steps)):
        median, low, high = (1e3 * value / len(layers) for value in device_ms(lambda steps=steps: steps))
        report(
            f"{batch:>4} x {dim}, one {name} step: {median:.2f} us ({low:.2f} to {high:.2f}), "
            f"floor {floors[name] * 1e3:.2f}, {floors[name] * 1e3 / median:.0%} of its speed"
        )
        benchmark.extra_info[f"{name}_us"] = median
    benchmark.pedantic(lambda: (scan_steps(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
