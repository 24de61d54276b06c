"""The Triton convolution against its definition: through the interpreter in float32, on a GPU in every dtype."""

import math

import pytest
import torch
from torch import Tensor

from cab_kernels import causal_conv1d_fn

pytest.importorskip("triton")

from cab_kernels.conv import kernels
from cab_kernels.conv.kernels import causal_conv1d

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
TIME, CHANNELS = "time", "channels"
ARGUMENTS = ("x", "weight", "bias", "initial_states")


def make_inputs(
    batch: int,
    dim: int,
    length: int,
    width: int,
    layout: str = TIME,
    *,
    states: bool = False,
    dtype: torch.dtype = FLOAT,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Arguments that require gradients. ``x`` lies between NaNs, as one part of a larger tensor may."""
    generator = torch.Generator().manual_seed(batch + dim + length + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if layout == TIME:
        padded = torch.full((batch, dim + 2, length), math.nan)
        padded[:, 1:-1] = normal(batch, dim, length)
        x = padded.to(device, dtype)[:, 1:-1]
    else:
        padded = torch.full((batch, length, dim + 2), math.nan)
        padded[..., 1:-1] = normal(batch, length, dim)
        x = padded.to(device, dtype)[..., 1:-1].transpose(1, 2)
    inputs = {"x": x, "weight": normal(dim, width).to(device), "bias": normal(dim).to(device)}
    if states:
        inputs["initial_states"] = normal(batch, dim, width - 1).to(device, dtype)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def results_and_gradients(inputs: dict[str, Tensor], options: dict, backend: str) -> dict[str, Tensor]:
    out = causal_conv1d_fn(**inputs, **options, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, inputs["x"].dtype)
    gradients = torch.autograd.grad(out, list(inputs.values()), dout.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}}


def assert_within_budget(inputs: dict[str, Tensor], options: dict) -> None:
    """The kernels err at most twice what the definition errs at these dtypes, plus one rounding."""
    kernel = results_and_gradients(inputs, options, "triton")
    definition = results_and_gradients(inputs, options, "reference")
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    out = causal_conv1d_fn(**double, **options, backend="reference")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, inputs["x"].dtype)
    gradients = torch.autograd.grad(out, list(double.values()), dout.double())
    gold = {"out": out.detach(), **{f"d{name}": gradient for name, gradient in zip(double, gradients, strict=True)}}
    for name, exact in gold.items():
        assert kernel[name].dtype == definition[name].dtype, name
        error, allowed = ((result[name].double() - exact).norm().item() for result in (kernel, definition))
        rounding = torch.finfo(kernel[name].dtype).eps * exact.norm().item()
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, the definition's {allowed:.2e}"


# One step; fewer steps than taps; width - 1; around 4 runs of 8; over 2 blocks of 32 runs in the time layout; a dim
# over one block of 64 channels; filters of one and of nine taps. Each once in either layout, direction and mode.
CASES = {
    "one-step": ((2, 3, 1, 4, TIME), {}),
    "one-step-reverse": ((2, 3, 1, 4, CHANNELS), {"reverse": True}),
    "width-1": ((1, 3, 2, 3, CHANNELS), {"states": True}),
    "width-1-reverse": ((1, 3, 2, 3, TIME), {"states": True, "reverse": True}),
    "odd": ((2, 5, 33, 4, TIME), {"activation": "silu"}),
    "odd-channels": ((2, 5, 33, 4, CHANNELS), {"activation": "silu"}),
    "whole-runs-reverse": ((1, 8, 32, 2, TIME), {"activation": "silu", "reverse": True}),
    "whole-runs-channels-reverse": ((1, 8, 32, 2, CHANNELS), {"activation": "silu", "reverse": True}),
    "states": ((1, 5, 65, 4, TIME), {"activation": "silu", "states": True}),
    "states-channels-reverse": ((1, 5, 33, 4, CHANNELS), {"activation": "silu", "states": True, "reverse": True}),
    "states-at-a-whole-run": ((1, 2, 64, 4, TIME), {"activation": "silu", "states": True, "reverse": True}),
    "packed": ((1, 3, 33, 4, TIME), {"activation": "silu", "cu_seqlens": [0, 1, 1, 9, 20, 33]}),
    "packed-channels": ((1, 3, 33, 4, CHANNELS), {"activation": "silu", "cu_seqlens": [0, 5, 8, 33], "reverse": True}),
    "many-steps": ((1, 16, 1033, 4, TIME), {"activation": "silu"}),
    "many-channels": ((1, 131, 9, 4, CHANNELS), {"activation": "silu"}),
    "one-tap": ((1, 3, 9, 1, CHANNELS), {"activation": "silu"}),
    "nine-taps": ((1, 3, 17, 9, TIME), {}),
}


def options_of(given: dict, device: str) -> tuple[dict, bool]:
    options = {name: value for name, value in given.items() if name != "states"}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device=device)
    return options, "states" in given


@pytest.mark.parametrize(("sizes", "given"), CASES.values(), ids=CASES)
def test_matches_definition(sizes, given, device):
    options, states = options_of(given, device)
    assert_within_budget(make_inputs(*sizes, states=states, device=device), options)


def test_padding_steps_match_definition(device):
    seq_idx = torch.tensor([[0, 0, 0, -1, -1, -1, -1, -1, -1, 4], [-1, -1, -1, 7, 7, 8, 8, 8, 8, 8]], device=device)
    for layout in (TIME, CHANNELS):
        inputs = make_inputs(2, 3, 10, 4, layout, device=device)
        assert_within_budget(inputs, {"activation": "silu", "seq_idx": seq_idx})


def test_no_bias_and_memory_where_neither_axis_is_contiguous(device):
    inputs = make_inputs(2, 3, 12, 4, device=device)
    inputs = {"x": inputs["x"].detach()[..., ::2].requires_grad_(), "weight": inputs["weight"]}
    assert_within_budget(inputs, {"activation": "silu"})


def test_output_and_gradient_keep_the_memory_order_of_x(device):
    for layout, order in ((TIME, (2, 1, 0)), (CHANNELS, (1, 2, 0))):
        x = make_inputs(2, 3, 5, 4, layout, device=device)["x"]
        results = results_and_gradients({"x": x}, {"weight": torch.ones(3, 4, device=device)}, "triton")
        for name in ("out", "dx"):
            strides = results[name].stride()
            assert tuple(sorted(range(3), key=strides.__getitem__)) == order, name


@pytest.mark.parametrize("layout", [TIME, CHANNELS])
def test_two_runs_give_the_same_bits(layout, device):
    inputs = make_inputs(3, 5, 40, 4, layout, states=True, device=device)
    first, second = (results_and_gradients(inputs, {"activation": "silu"}, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_each_gradient_alone_equals_the_definitions(device):
    inputs = make_inputs(1, 3, 9, 4, states=True, device=device)
    expected = results_and_gradients(inputs, {"activation": "silu"}, "reference")
    for name in ARGUMENTS:
        frozen = {other: tensor.detach().requires_grad_(other == name) for other, tensor in inputs.items()}
        out = causal_conv1d_fn(**frozen, activation="silu", backend="triton")
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (gradient,) = torch.autograd.grad(out, [frozen[name]], dout)
        torch.testing.assert_close(gradient, expected[f"d{name}"], rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_needed_are_not_computed(device, monkeypatch):
    computed = []

    def recording(*arguments):
        gradients = kernels.causal_conv1d_bwd(*arguments)
        computed.append([gradient.numel() for gradient in gradients])
        return gradients

    monkeypatch.setattr(kernels, "causal_conv1d_backward", recording)
    inputs = make_inputs(1, 3, 9, 4, device=device)
    for frozen in ("x", "weight bias"):
        given = {name: tensor.detach().requires_grad_(name not in frozen) for name, tensor in inputs.items()}
        causal_conv1d_fn(**given, backend="triton").sum().backward()
    assert computed == [[0, 12, 3, 0], [27, 0, 0, 0]]


def test_second_derivative_raises(device):
    inputs = make_inputs(1, 2, 5, 3, device=device)
    (dx,) = torch.autograd.grad(causal_conv1d_fn(**inputs, backend="triton").sum(), [inputs["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_empty_axes_give_empty_results_and_zero_gradients(device):
    for sizes in ((0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4)):
        results = results_and_gradients(make_inputs(*sizes, states=True, device=device), {}, "triton")
        assert results["out"].numel() == 0
        for name in ("dweight", "dbias", "dinitial_states"):
            assert torch.equal(results[name], torch.zeros_like(results[name])), name


def test_kernels_refuse_float64_and_wide_filters(device):
    inputs = {name: tensor.double() for name, tensor in make_inputs(1, 2, 5, 3, device=device).items()}
    with pytest.raises(TypeError, match="expected x of dtype float32 or float16 or bfloat16, got float64"):
        causal_conv1d_fn(**inputs, backend="triton")
    inputs = make_inputs(1, 2, 5, 10, device=device)
    with pytest.raises(ValueError, match="expected weight with at most 9 taps for backend 'triton', got 10"):
        causal_conv1d_fn(**inputs, backend="triton")


@pytest.mark.parametrize("layout", [TIME, CHANNELS])
def test_operator_is_registered_truthfully(layout, device):
    inputs = make_inputs(2, 3, 9, 4, layout, states=True, device=device)
    arguments = [inputs[name].detach() for name in ARGUMENTS]
    torch.library.opcheck(causal_conv1d, (*arguments, None, True, False))
    torch.library.opcheck(causal_conv1d, (*arguments[:2], None, None, None, False, True))


STRIDES = ("x_batch", "x_row", "out_batch", "out_row", "dout_batch", "dout_row", "dx_batch", "dx_row")


def spec(backward: bool, options: bool, time_fast: bool) -> dict:
    """One kernel with initial states, backwards in time, or plain with packed sequences; as a GPU launches it."""
    low = ("x", "out", "dout", "dx", "initial", "dinitial")
    names = (*low, "weight", "bias", "partial")
    signature = {f"{name}_ptr": "*bf16" if name in low else "*fp32" for name in names} | {"seq_idx_ptr": "*i32"}
    signature |= dict.fromkeys(("dim", "length", "groups", "blocks", *(f"stride_{name}" for name in STRIDES)), "i32")
    constexprs = {"WIDTH": 4, "SILU": True, "REVERSE": options, "HAS_BIAS": options, "HAS_INITIAL": options}
    constexprs |= {"HAS_SEQ_IDX": not options, "TIME_FAST": time_fast, "ALIGN": 8 if options else 1, "NATIVE": True}
    constexprs |= {"BLOCK_DIM": 2, "BLOCK_RUNS": 64} if time_fast else {"BLOCK_DIM": 64, "BLOCK_RUNS": 4}
    constexprs |= {"seq_idx_ptr": None} if options else {"initial_ptr": None, "bias_ptr": None}
    if backward:
        constexprs |= {"NEEDS_DX": True, "NEEDS_DWEIGHT": True}
        constexprs |= {} if options else {"dinitial_ptr": None}
    return {
        "module": "cab_kernels.conv.kernels",
        "kernel": f"_causal_conv1d_{'bwd' if backward else 'fwd'}_kernel",
        "signature": signature,
        "constexprs": constexprs,
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }


def test_compiles_for_sm_80_90_and_100(compile_offline):
    specs = [spec(True, options=True, time_fast=True), spec(True, options=False, time_fast=False)]
    specs += [spec(False, options=False, time_fast=True), spec(False, options=True, time_fast=False)]
    specs += [
        {
            "module": "cab_kernels.conv.kernels",
            "kernel": "_causal_conv1d_reduce_kernel",
            "signature": {"partial_ptr": "*fp32", "dweight_ptr": "*bf16", "dbias_ptr": "*bf16"}
            | {"programs": "i32", "dim": "i32"},
            "constexprs": {"WIDTH": 4, "HAS_BIAS": True, "BLOCK_PROGRAMS": 64, "BLOCK_DIM": 32},
            "options": {"num_warps": 4, "enable_fp_fusion": True},
        }
    ]
    assert len(compile_offline(specs).splitlines()) == 3 * len(specs)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [TIME, CHANNELS])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("length", [197, 264, 2050])
def test_matches_definition_at_models_sizes(length, dtype, layout):
    for reverse in (False, True):
        inputs = make_inputs(2, 200, length, 4, layout, states=reverse, dtype=dtype, device="cuda")
        assert_within_budget(inputs, {"activation": "silu", "reverse": reverse})


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [TIME, CHANNELS])
def test_offsets_beyond_32_bits(layout):
    inputs = make_inputs(1, 3, 8, 4, layout, dtype=BFLOAT, device="cuda")
    memory = torch.zeros(3 * 2**30, dtype=BFLOAT, device="cuda")
    strides = (0, 2**30, 1) if layout == TIME else (0, 1, 320_000_000)  # the last row begins beyond 2**31
    far = memory.as_strided((1, 3, 8), strides)
    far.copy_(inputs["x"].detach())
    out, expected = (causal_conv1d_fn(x, inputs["weight"], inputs["bias"], "silu") for x in (far, inputs["x"].detach()))
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_compiles_in_one_graph_with_dynamic_lengths():
    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, "silu", reverse=True).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in (33, 197, 64):
        inputs = make_inputs(2, 16, length, 4, CHANNELS, dtype=BFLOAT, device="cuda")
        arguments = (inputs["x"].detach().transpose(1, 2).requires_grad_(), inputs["weight"], inputs["bias"])
        gradients = [torch.autograd.grad(function(*arguments), arguments) for function in (loss, compiled)]
        for eager, traced in zip(*gradients, strict=True):
            torch.testing.assert_close(traced, eager, rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
def test_captured_in_a_graph():
    inputs = make_inputs(2, 16, 197, 4, dtype=BFLOAT, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = results_and_gradients(inputs, {"activation": "silu"}, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    dout = torch.randn(expected["out"].shape, generator=torch.Generator().manual_seed(1)).to("cuda", BFLOAT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_fn(**inputs, activation="silu")
        gradients = torch.autograd.grad(out, list(inputs.values()), dout)
    graph.replay()
    for value, captured in zip(expected.values(), (out, *gradients), strict=True):
        assert torch.equal(value, captured)


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    from cab_kernels.conv.kernels import _causal_conv1d_fwd_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _causal_conv1d_fwd_kernel.device_caches.values())

    for lengths in ((33, 35, 47, 201), (264, 272, 1000, 2048)):
        counts = set()
        for length in lengths:
            causal_conv1d_fn(torch.ones(1, 8, length, device="cuda"), torch.ones(8, 4, device="cuda"))
            counts.add(compiled())
        assert len(counts) == 1, lengths
