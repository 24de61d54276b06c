"""Residual add and RMSNorm: the definition against PyTorch's own norm, the kernels against the definition."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels import rms_norm_fn, rms_norm_ref

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = ("x", "weight", "bias", "residual")


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = FLOAT,
    residual_dtype: torch.dtype = FLOAT,
    absent: tuple[str, ...] = (),
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Arguments that require gradients. Their rows lie between NaNs, as those of a part of a tensor may."""
    generator = torch.Generator().manual_seed(sum(shape))
    inputs = {}
    for name, kind in zip(NAMES, (dtype, FLOAT, FLOAT, residual_dtype), strict=True):
        tensor = torch.randn(shape if name in ("x", "residual") else shape[-1:], generator=generator)
        padded = F.pad(tensor, (1, 1), value=math.nan).to(device, kind)
        if name not in absent:
            inputs[name] = padded[..., 1:-1].requires_grad_()
    return inputs


def gradients_from_above(*outputs: Tensor) -> list[Tensor]:
    """Random numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(-64, 65, out.shape, generator=generator) / 32).to(out) for out in outputs]


def results_and_gradients(inputs: dict[str, Tensor], options: dict, backend: str) -> dict[str, Tensor]:
    """Both results, and the gradients of a random sum of them."""
    y, residual_out = rms_norm_fn(**inputs, **options, prenorm=True, backend=backend)
    from_above = gradients_from_above(y, residual_out)
    gradients = torch.autograd.grad((y, residual_out), list(inputs.values()), from_above)
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "residual_out": residual_out.detach(), **named}


def assert_within_budget(inputs: dict[str, Tensor], options: dict) -> None:
    """The kernels err at most twice what the definition errs at these dtypes, plus one rounding."""
    kernel, definition = (results_and_gradients(inputs, options, backend) for backend in ("triton", "reference"))
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    gold = results_and_gradients(double, options, "reference")
    for name, exact in gold.items():
        assert kernel[name].dtype == definition[name].dtype, name
        error, allowed = ((result[name].double() - exact).norm().item() for result in (kernel, definition))
        rounding = torch.finfo(kernel[name].dtype).eps * exact.norm().item()
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, the definition's {allowed:.2e}"


class TestReference:
    @pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 33), (0, 7)], ids=str)
    def test_equals_addition_and_pytorchs_norm(self, shape):
        x, weight, bias, residual = make_inputs(shape, DOUBLE, DOUBLE).values()
        y, total = rms_norm_ref(x, weight.double(), bias.double(), residual, eps=1e-3, prenorm=True)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(y, F.rms_norm(x + residual, shape[-1:], weight.double(), 1e-3) + bias)
        y, total = rms_norm_ref(x, weight.double(), prenorm=True)
        assert torch.equal(total, x)
        torch.testing.assert_close(y, F.rms_norm(x, shape[-1:], weight.double(), 1e-6))

    @pytest.mark.parametrize("absent", [(), ("bias",), ("residual",)], ids=str)
    def test_gradcheck(self, absent):
        inputs = {name: t.detach().double() for name, t in make_inputs((2, 3, 5), absent=absent).items()}
        tensors = [tensor.requires_grad_() for tensor in inputs.values()]

        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return rms_norm_fn(**dict(zip(inputs, tensors, strict=True)), prenorm=True)

        assert torch.autograd.gradcheck(function, tensors)


# x, residual, residual_in_fp32, autocast -> y, residual_out
DTYPES = {
    "float32": ((FLOAT, FLOAT, False, None), (FLOAT, FLOAT)),
    "bfloat16": ((BFLOAT, BFLOAT, False, None), (BFLOAT, BFLOAT)),
    "bfloat16-float32-stream": ((BFLOAT, FLOAT, False, None), (BFLOAT, FLOAT)),
    "float32-float16-stream": ((FLOAT, HALF, False, None), (FLOAT, HALF)),
    "stream-in-fp32": ((HALF, HALF, True, None), (HALF, FLOAT)),
    "first": ((BFLOAT, None, False, None), (BFLOAT, BFLOAT)),
    "first-in-fp32": ((BFLOAT, None, True, None), (BFLOAT, FLOAT)),
    "autocast": ((BFLOAT, FLOAT, True, BFLOAT), (BFLOAT, FLOAT)),
    "autocast-first": ((FLOAT, None, True, BFLOAT), (BFLOAT, FLOAT)),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("given", "expected"), DTYPES.values(), ids=DTYPES)
def test_dtypes(given, expected, backend, device):
    dtype, residual_dtype, in_fp32, autocast = given
    absent = ("bias",) if residual_dtype else ("bias", "residual")
    inputs = make_inputs((2, 33), dtype, residual_dtype or FLOAT, absent, device)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        results = results_and_gradients(inputs, {"residual_in_fp32": in_fp32}, backend)
    assert (results["y"].dtype, results["residual_out"].dtype) == expected
    for name, tensor in inputs.items():
        assert results[f"d{name}"].dtype == tensor.dtype, name


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_changes_the_dtype_of_y_alone(backend, device):
    inputs = make_inputs((2, 33), device=device)
    expected, stream = rms_norm_fn(**inputs, prenorm=True, backend=backend)
    with torch.autocast(device, HALF):
        y, stream_in_autocast = rms_norm_fn(**inputs, prenorm=True, backend=backend)
    assert torch.equal(y, expected.to(HALF))
    assert torch.equal(stream_in_autocast, stream)


def test_float64_stays_float64_under_autocast():
    inputs = {name: tensor.double() for name, tensor in make_inputs((2, 33)).items()}
    with torch.autocast("cpu", BFLOAT):
        y, stream = rms_norm_fn(**inputs, prenorm=True, residual_in_fp32=True)
    assert y.dtype == stream.dtype == DOUBLE


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_norm_is_that_of_the_rounded_stream(backend, device):
    x, weight, _, residual = make_inputs((4, 33), HALF, HALF, device=device).values()
    y, stream = rms_norm_fn(x, weight, residual=residual, prenorm=True, backend=backend)
    assert torch.equal(stream, (x.float() + residual.float()).to(HALF))
    exact = F.rms_norm(stream.double(), (33,), weight.double(), 1e-6)
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(HALF).eps * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_prenorm_it_is_y(backend, device):
    inputs = make_inputs((2, 33), device=device)
    y, _ = rms_norm_fn(**inputs, prenorm=True, backend=backend)
    assert torch.equal(rms_norm_fn(**inputs, backend=backend), y)


# A number; a row; an odd width; one below and one above two tiles of 2048 numbers; a tile of one column; the widest.
SHAPES = [(1, 1), (5,), (2, 3, 33), (7, 256), (2, 9, 192), (4500, 1), (65, 1100), (2, 8192)]


@pytest.mark.parametrize("absent", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, absent, device):
    assert_within_budget(make_inputs(shape, absent=absent, device=device), {"eps": 1e-3})


def test_matches_definition_where_a_program_has_several_tiles(device, monkeypatch):
    monkeypatch.setattr("cab_kernels.norm.kernels.PROGRAMS", 2)
    assert_within_budget(make_inputs((5, 8, 192), device=device), {})


@pytest.mark.parametrize("dtypes", [(HALF, FLOAT), (FLOAT, HALF), (BFLOAT, BFLOAT)], ids=str)
def test_matches_definition_in_mixed_dtypes(dtypes, device):
    for options in ({}, {"residual_in_fp32": True}):
        assert_within_budget(make_inputs((2, 9, 192), *dtypes, device=device), options)


def test_memory_where_rows_are_not_contiguous(device):
    inputs = {name: tensor.detach() for name, tensor in make_inputs((6, 4, 33), device=device).items()}
    for name in ("x", "residual"):
        inputs[name] = inputs[name].transpose(0, 2).contiguous().transpose(0, 2)
    assert_within_budget({name: tensor.requires_grad_() for name, tensor in inputs.items()}, {})


def test_two_runs_give_the_same_bits(device):
    inputs = make_inputs((5, 8, 192), device=device)
    first, second = (results_and_gradients(inputs, {}, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_each_gradient_alone_equals_the_definitions(device):
    inputs = make_inputs((3, 33), device=device)
    for name in NAMES:
        frozen = {other: tensor.detach().requires_grad_(other == name) for other, tensor in inputs.items()}
        gradients = []
        for backend in ("triton", "reference"):
            y, total = rms_norm_fn(**frozen, prenorm=True, backend=backend)
            gradients += torch.autograd.grad(y.square().sum() + total.square().sum(), [frozen[name]])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_gradient_of_one_result_alone_equals_the_definitions(device):
    inputs = make_inputs((3, 33), device=device)
    for result in (0, 1):
        gradients = []
        for backend in ("triton", "reference"):
            out = rms_norm_fn(**inputs, prenorm=True, backend=backend)[result]
            gradients.append(torch.autograd.grad(out.square().sum(), [inputs["x"], inputs["residual"]]))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_needed_or_are_the_same_are_not_written(device, monkeypatch):
    from cab_kernels.norm import kernels

    written = []

    def recording(*arguments):
        gradients = kernels.rms_norm_bwd(*arguments)
        written.append([gradient.numel() for gradient in gradients])
        return gradients

    monkeypatch.setattr(kernels, "rms_norm_backward", recording)
    for dtype, frozen in ((FLOAT, ""), (HALF, ""), (HALF, "x weight"), (FLOAT, "residual bias")):
        inputs = make_inputs((3, 33), dtype, device=device)
        given = {name: tensor.detach().requires_grad_(name not in frozen.split()) for name, tensor in inputs.items()}
        rms_norm_fn(**given, backend="triton").sum().backward()
    assert written == [[99, 0, 33, 33], [99, 99, 33, 33], [0, 99, 0, 33], [99, 0, 33, 0]]


@pytest.mark.parametrize("absent", [(), ("residual",)], ids=str)
def test_keeps_the_stream_and_a_number_a_row(absent, device):
    inputs, kept = make_inputs((2, 4, 33), absent=absent, device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y, residual_out = rms_norm_fn(**inputs, prenorm=True, backend="triton")
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 4, 33), (33,), (2, 4)]
    assert kept[0].data_ptr() == residual_out.data_ptr()
    assert (residual_out.data_ptr() == inputs["x"].data_ptr()) is bool(absent)
    assert residual_out.grad_fn is y.grad_fn  # one launch adds up the gradients of both


def test_second_derivative_raises(device):
    inputs = make_inputs((2, 5), device=device)
    (dx,) = torch.autograd.grad(rms_norm_fn(**inputs, backend="triton").sum(), [inputs["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_empty_axes_give_empty_results_and_zero_gradients(shape, device):
    results = results_and_gradients(make_inputs(shape, device=device), {}, "triton")
    for name in ("y", "residual_out", "dx", "dresidual"):
        assert results[name].shape == shape, name
    for name in ("dweight", "dbias"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


BAD = {
    "number": (TypeError, {"x": 1.0}, "expected x to be a tensor, got float"),
    "integers": (TypeError, {"x": torch.zeros(2, 5).long()}, "expected x of dtype float32 or float16 or bfloat16 or"),
    "no-axes": (ValueError, {"x": torch.zeros(())}, "expected x of shape (width), got ()"),
    "no-width": (ValueError, {"x": torch.zeros(2, 0)}, "expected x of width at least 1, got (2, 0)"),
    "weight": (ValueError, {"weight": torch.ones(4)}, "expected weight of shape (width) = (5,), got (4,)"),
    "bias": (ValueError, {"bias": torch.ones(1, 5)}, "expected bias of shape (width), got (1, 5)"),
    "residual": (
        ValueError,
        {"residual": torch.ones(3, 5)},
        "expected residual of shape (axis0, width) = (2, 5), got (3, 5)",
    ),
    "device": (ValueError, {"weight": torch.ones(5, device="meta")}, "expected weight on cpu like the rest, got meta"),
    "backend": (ValueError, {"backend": "cuda"}, "expected backend None, 'triton' or 'reference', got 'cuda'"),
}


@pytest.mark.parametrize(("error", "change", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(error, change, message):
    with pytest.raises(error, match=f"^rms_norm_fn: {re.escape(message)}"):
        rms_norm_fn(**({"x": torch.zeros(2, 5), "weight": torch.ones(5)} | change))


def test_kernels_refuse_float64_and_wide_rows(device):
    inputs = make_inputs((2, 5), residual_dtype=DOUBLE, device=device)
    with pytest.raises(TypeError, match="expected residual of dtype float32 or float16 or bfloat16, got float64"):
        rms_norm_fn(**inputs, backend="triton")
    inputs = make_inputs((2, 8193), device=device)
    with pytest.raises(ValueError, match="expected x of width at most 8192 for backend 'triton', got 8193"):
        rms_norm_fn(**inputs, backend="triton")


def test_operator_is_registered_truthfully(device):
    from cab_kernels.norm.kernels import rms_norm

    for dtype, absent in ((FLOAT, ()), (HALF, ("bias",)), (FLOAT, ("bias", "residual"))):
        inputs = make_inputs((2, 3, 9), dtype, absent=absent, device=device)
        arguments = [inputs[name].detach() if name in inputs else None for name in NAMES]
        torch.library.opcheck(rms_norm, (*arguments, 1e-6, dtype, FLOAT))


def spec(kernel: str, pointers: dict[str, str], absent: str, width: int) -> dict:
    sizes = "rows width steps stride_x_row stride_residual_row stride_dy_row stride_dresidual_out_row stride_r_row"
    block_width = 1 << (width - 1).bit_length()
    blocks = {"BLOCK_ROWS": max(1, 2048 // block_width), "BLOCK_WIDTH": block_width}
    return {
        "module": "cab_kernels.norm.kernels",
        "kernel": kernel,
        "signature": {f"{name}_ptr": kind for name, kind in pointers.items()}
        | dict.fromkeys(sizes.split(), "i32")
        | {"eps": "fp32"},
        "constexprs": blocks | {f"{name}_ptr": None for name in absent.split()},
        "options": {"num_warps": max(4, block_width // 512), "enable_fp_fusion": True},
    }


def test_compiles_for_sm_80_90_and_100(compile_offline):
    forward = dict.fromkeys(("residual", "weight", "bias", "residual_out", "rstd"), "*fp32") | {"x": "*bf16"}
    forward |= {"y": "*bf16"}
    backward = dict.fromkeys(("dresidual_out", "r", "weight", "rstd", "dresidual", "dweight", "dbias"), "*fp32")
    backward |= {"dy": "*bf16", "dx": "*bf16"}
    specs = [spec("_rms_norm_fwd_kernel", forward, absent, 192) for absent in ("", "bias residual residual_out")]
    specs += [spec("_rms_norm_bwd_kernel", backward, absent, 192) for absent in ("", "dresidual_out dresidual dbias")]
    specs += [spec("_rms_norm_fwd_kernel", forward, "", 8192), spec("_rms_norm_bwd_kernel", backward, "dbias", 8192)]
    partial = dict.fromkeys(("partial_weight", "partial_bias"), "*fp32")
    specs += [
        {
            "module": "cab_kernels.norm.kernels",
            "kernel": "_rms_norm_reduce_kernel",
            "signature": {
                f"{name}_ptr": kind for name, kind in (partial | {"dweight": "*fp32", "dbias": "*bf16"}).items()
            }
            | dict.fromkeys(("programs", "width"), "i32"),
            "constexprs": {"BLOCK_PROGRAMS": 64, "BLOCK_WIDTH": 32} | {f"{name}_ptr": None for name in absent},
            "options": {"num_warps": 4, "enable_fp_fusion": True},
        }
        for absent in ((), ("partial_bias", "dbias"))
    ]
    assert len(compile_offline(specs).splitlines()) == 3 * len(specs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("residual_dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("shape", [(128, 197, 192), (2, 197, 384), (3, 1023, 2560), (2, 65, 8192)], ids=str)
def test_matches_definition_at_models_sizes(shape, residual_dtype, dtype):
    assert_within_budget(make_inputs(shape, dtype, residual_dtype, device="cuda"), {})


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    memory = torch.zeros(2**31 + 8, dtype=BFLOAT, device="cuda")
    far = memory.as_strided((3, 8), (2**30, 1))  # the last row begins at 2**31
    near = make_inputs((3, 8), BFLOAT, absent=("residual", "bias"), device="cuda")
    far.copy_(near["x"].detach())
    expected = results_and_gradients(near, {}, "triton")
    results = results_and_gradients({**near, "x": far.requires_grad_()}, {}, "triton")
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_compiles_in_one_graph_with_dynamic_lengths(device):
    def loss(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        with torch.autocast(device, HALF):
            first, stream = rms_norm_fn(x, weight, prenorm=True, residual_in_fp32=True)
            y, stream = rms_norm_fn(first, weight, residual=stream + residual, prenorm=True)
            return y.float().square().sum() + stream.square().sum()

    compiled = torch.compile(
        loss, fullgraph=True, dynamic=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    for length in (33, 197, 64):
        inputs = make_inputs((2, length, 192), absent=("bias",), device=device)
        arguments = [tensor.detach().contiguous().requires_grad_() for tensor in inputs.values()]
        gradients = [torch.autograd.grad(function(*arguments), arguments) for function in (loss, compiled)]
        for eager, traced in zip(*gradients, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_captured_in_a_graph():
    inputs = make_inputs((2, 197, 192), BFLOAT, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = results_and_gradients(inputs, {}, "triton")
        from_above = gradients_from_above(expected["y"], expected["residual_out"])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = rms_norm_fn(**inputs, prenorm=True)
        gradients = torch.autograd.grad(results, list(inputs.values()), from_above)
    graph.replay()
    for value, captured in zip(expected.values(), (*results, *gradients), strict=True):
        assert torch.equal(value, captured)


@pytest.mark.gpu
def test_a_new_number_of_rows_compiles_nothing():
    from cab_kernels.norm.kernels import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel, _rms_norm_reduce_kernel

    def compiled() -> int:
        kernels = (_rms_norm_fwd_kernel, _rms_norm_bwd_kernel, _rms_norm_reduce_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    counts = set()
    for rows in (1, 2, 16, 33, 40000):
        x, weight = torch.ones(rows, 192, device="cuda", requires_grad=True), torch.ones(192, device="cuda")
        rms_norm_fn(x, weight).sum().backward()
        counts.add(compiled())
    assert len(counts) == 1
