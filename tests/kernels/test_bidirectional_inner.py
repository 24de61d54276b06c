"""A bidirectional block between its projections: its definition, and the kernels' op against the ops it is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels import (
    _backend,
    bidirectional_mamba_inner_fn,
    bidirectional_selective_scan_fn,
    causal_conv1d_fn,
)

pytest.importorskip("triton")

NAMES = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")


def make_inputs(
    batch: int = 2,
    length: int = 9,
    dim: int = 6,
    rank: int = 3,
    dstate: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Inputs that want gradients, those of the two directions as ``D_0``, ``D_1``, ...; parameters are float32."""
    generator = torch.Generator().manual_seed(batch + length + dim + rank + dstate)
    width = rank + 2 * dstate
    shapes = ((dim, 4), (dim,), (width, dim), (dim, rank), (dim,), (dim, dstate), (dim,))
    given = {"xz": torch.randn(batch, length, 2 * dim, generator=generator).to(device, dtype)}
    for name, shape in zip(NAMES, shapes, strict=True):
        for way in range(2):
            scale = shape[1] ** -0.5 if len(shape) > 1 else 0.5
            given[f"{name}_{way}"] = (scale * torch.randn(shape, generator=generator)).to(device)
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


def inner(inputs: dict[str, Tensor], backend: str | None) -> list[Tensor]:
    pairs = [[inputs[f"{name}_{way}"] for way in range(2)] for name in NAMES]
    out, B, C = bidirectional_mamba_inner_fn(inputs["xz"], *pairs, backend=backend)
    return [out, *B, *C]


def step_by_step(inputs: dict[str, Tensor], backend: str | None) -> list[Tensor]:
    """The same by the ops that it is made of."""
    x, z = inputs["xz"].mT.chunk(2, dim=1)
    dtype, us, deltas, Bs, Cs = x.dtype, [], [], [], []
    for way in range(2):
        conv_weight, conv_bias, x_proj, dt_proj, _, A_log, _ = (inputs[f"{name}_{way}"] for name in NAMES)
        u = causal_conv1d_fn(x, conv_weight, conv_bias, "silu", reverse=bool(way), backend=backend)
        sizes = [dt_proj.shape[1], A_log.shape[1], A_log.shape[1]]
        dt, B, C = F.linear(u.mT, x_proj.to(dtype)).split(sizes, dim=-1)
        us, deltas = [*us, u], [*deltas, F.linear(dt, dt_proj.to(dtype)).mT]
        Bs, Cs = [*Bs, B], [*Cs, C]
    dt_bias, A_log, D = ([inputs[f"{name}_{way}"] for way in range(2)] for name in NAMES[-3:])
    A = [-one.exp() for one in A_log]
    out = bidirectional_selective_scan_fn(
        us, deltas, A, [B.mT for B in Bs], [C.mT for C in Cs], D, z, dt_bias, True, backend=backend
    )
    return [out.mT, *Bs, *Cs]


def gradients(results: list[Tensor], inputs: dict[str, Tensor], seen: slice = slice(None)) -> list[Tensor]:
    """Of the results in ``seen``, by all inputs; zero where there is none."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator).to(result.device, result.dtype) for result in results]
    return list(torch.autograd.grad(results[seen], list(inputs.values()), weights[seen], materialize_grads=True))


def assert_as_exact_as_the_ops(inputs: dict[str, Tensor], seen: slice) -> None:
    """The op errs at most twice what the ops it is made of err, plus one rounding.

    Or what the definition errs at these dtypes, or with a kernel's exponential, off by up to 2 ulp, for that of A.
    """
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    off = {name: 2 * torch.finfo(torch.float32).eps * name.startswith("A_log") for name in inputs}
    with_off = {name: (tensor.detach() + off[name]).requires_grad_() for name, tensor in double.items()}
    results = [(inner(inputs, "triton"), inputs), (inner(double, "reference"), double)]
    results += [(step_by_step(inputs, "triton"), inputs), (inner(inputs, "reference"), inputs)]
    results += [(inner(with_off, "reference"), with_off)]
    names = ["out", "B_0", "B_1", "C_0", "C_1", *(f"d{name}" for name in inputs)]
    for name, *found in zip(names, *([*of, *gradients(of, given, seen)] for of, given in results), strict=True):
        got, gold, *others = found
        assert got.dtype == others[0].dtype, name
        error, *allowed = ((one.double() - gold).norm().item() for one in (got, *others))
        rounding = torch.finfo(got.dtype).eps * gold.norm().item()
        assert error <= 2 * max(allowed) + rounding, f"{name}: error {error:.2e}, that of the others {allowed}"


# An odd length; a step; rows of projections that are multiples of 16 bytes as they are; one channel, one state, one
# column of dt; nothing at all. Each with other results that are seen.
CASES = {
    "odd": ({}, slice(None)),
    "one-step": ({"length": 1}, slice(0, 1)),
    "aligned": ({"rank": 8, "dstate": 8}, slice(1, 2)),
    "ones": ({"dim": 1, "rank": 1, "dstate": 1}, slice(2, None)),
    "no-steps": ({"length": 0}, slice(None)),
    "no-batch": ({"batch": 0}, slice(None)),
}


@pytest.mark.parametrize(("sizes", "seen"), CASES.values(), ids=CASES)
def test_as_exact_as_the_ops_one_after_the_other(sizes, seen, device):
    assert_as_exact_as_the_ops(make_inputs(**sizes, device=device), seen)


def test_as_exact_when_directions_take_turns(device, monkeypatch):
    from cab_kernels.scan import launch_kernels

    monkeypatch.setattr(launch_kernels, "FILL_DIRECTION", 0)
    assert_as_exact_as_the_ops(make_inputs(device=device), slice(None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [{"length": 197, "dim": 384, "rank": 12, "dstate": 16}, {"rank": 8, "dstate": 8}])
def test_as_exact_as_the_ops_in_16_bits(sizes, dtype):
    assert_as_exact_as_the_ops(make_inputs(**sizes, dtype=dtype, device="cuda"), slice(None))


def test_definition_is_the_ops_one_after_the_other():
    inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in make_inputs().items()}
    got, want = inner(inputs, "reference"), step_by_step(inputs, "reference")
    torch.testing.assert_close([*got, *gradients(got, inputs)], [*want, *gradients(want, inputs)])


def test_definition_computes_in_float32_and_rounds_once():
    inputs = make_inputs(dtype=torch.bfloat16)
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = inner(inputs, None)
        for got, want in zip(results, inner(wide, "reference"), strict=True):
            assert torch.equal(got, want.bfloat16())


def test_keeps_neither_u_nor_delta(device):
    inputs = make_inputs(batch=1, length=96, dim=64, device=device)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        inner(inputs, "triton")
    given = {tensor.data_ptr() for tensor in inputs.values()}
    weights = sum(tensor.nbytes for name, tensor in inputs.items() if name.startswith(("x_proj", "dt_proj", "A_log")))
    made = sum(tensor.nbytes for place, tensor in kept.items() if place not in given)
    one = 96 * 64 * 4  # bytes of u, or of delta, of one direction
    assert inputs["xz"].data_ptr() in kept
    assert made - weights < one


def test_both_convolutions_are_those_of_either_direction(device):
    """Over more than one block of channels, and over several blocks of runs in a program and several programs."""
    from cab_kernels.conv.bidirectional_kernels import bidirectional_conv1d_bwd, bidirectional_conv1d_fwd

    generator = torch.Generator().manual_seed(0)
    for batch, dim, length, width in ((2, 131, 9, 4), (1, 8, 197, 3)):
        shapes = ((batch, length, 2 * dim), (2, batch, length, dim), (2, dim, width), (2, dim))
        xz, douts, weights, biases = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        x, dx = (both.mT[:, :dim] for both in (xz.requires_grad_(), torch.full_like(xz, torch.nan)))
        weights, biases = ([one.requires_grad_() for one in both.unbind()] for both in (weights, biases))
        out = [
            causal_conv1d_fn(x, weights[way], biases[way], "silu", reverse=bool(way), backend="reference")
            for way in range(2)
        ]
        want = torch.autograd.grad(out, [xz, *weights, *biases], list(douts.mT))
        with torch.no_grad():
            got = bidirectional_conv1d_fwd(x, weights, biases)
            of_filters = bidirectional_conv1d_bwd(list(douts.mT), x, weights, biases, dx)
        torch.testing.assert_close(list(got.mT), out)
        torch.testing.assert_close([dx, *of_filters[0], *of_filters[1]], [want[0].mT[:, :dim], *want[1:]])


def test_a_graph_can_be_walked_again_and_gives_the_same_bits(device):
    inputs = make_inputs(device=device)
    results = inner(inputs, "triton")
    loss = sum(result.square().sum() for result in results)
    first, second = (torch.autograd.grad(loss, list(inputs.values()), retain_graph=True) for _ in range(2))
    again = torch.autograd.grad(sum(r.square().sum() for r in inner(inputs, "triton")), list(inputs.values()))
    for name, *three in zip(inputs, first, second, again, strict=True):
        assert all(torch.equal(three[0], one) for one in three), name


def test_parameters_of_16_bits_have_gradients_of_16_bits(device):
    inputs = {
        name: tensor.detach().to(device, torch.float16).requires_grad_() for name, tensor in make_inputs().items()
    }
    inputs["xz"] = inputs["xz"].detach().float().requires_grad_()
    for name, gradient in zip(inputs, gradients(inner(inputs, "triton"), inputs), strict=True):
        assert gradient.dtype == inputs[name].dtype, name


def test_input_of_other_strides(device):
    inputs = make_inputs(device=device)
    turned = inputs | {"xz": inputs["xz"].detach().mT.contiguous().mT.requires_grad_()}
    for got, want in zip(inner(turned, "triton"), inner(inputs, "triton"), strict=True):
        assert torch.equal(got, want)


def test_compiles_without_a_graph_break(device, monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: not torch.cuda.is_available())  # reads what dynamo cannot
    inputs = make_inputs(device=device)
    compiled = torch.compile(lambda given: inner(given, "triton"), fullgraph=True, backend="aot_eager")
    got, want = compiled(inputs), inner(inputs, "triton")
    for one, other in zip([*got, *gradients(got, inputs)], [*want, *gradients(want, inputs)], strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_the_op_keeps_the_rules_of_torch_library(device):
    from cab_kernels.inner.bidirectional_kernels import bidirectional_mamba_inner

    inputs = {name: tensor.detach() for name, tensor in make_inputs(device=device).items()}
    pairs = [[inputs[f"{name}_{way}"] for way in range(2)] for name in NAMES]
    torch.library.opcheck(bidirectional_mamba_inner, (inputs["xz"], *pairs, 32))


def refused(error: type[Exception], message: str, **changed: object) -> None:
    inputs = make_inputs()
    pairs = {name: [inputs[f"{name}_{way}"] for way in range(2)] for name in NAMES}
    with pytest.raises(error, match=message):
        bidirectional_mamba_inner_fn(**{"xz": inputs["xz"], **pairs, **changed})


def test_bad_arguments_are_named():
    function = "^bidirectional_mamba_inner_fn: expected"
    refused(ValueError, f"{function} xz of an even number of channels, got 13", xz=torch.zeros(2, 3, 13))
    refused(TypeError, f"{function} D to be a pair of tensors, got 1 of them", D=[torch.zeros(6)])
    refused(TypeError, f"{function} D to be a pair of tensors, got Tensor", D=torch.zeros(6))
    refused(ValueError, rf"{function} D\[1\] of shape \(dim\) = \(6,\), got \(5,\)", D=[torch.zeros(6), torch.zeros(5)])
    refused(TypeError, rf"{function} D\[1\] of dtype float32, got float64", D=[torch.zeros(6), torch.zeros(6).double()])
    refused(ValueError, rf"{function} x_proj with rank \+ 2 dstate = 11 rows, got 12", x_proj=[torch.zeros(12, 6)] * 2)
    refused(ValueError, f"{function} dstate .* from 1 to 256, got 0", A_log=[torch.zeros(6, 0)] * 2)


def test_compiles_for_sm_80_90_and_100(compile_offline):
    pair = ["*fp32", "*fp32"]
    sizes = dict.fromkeys(("rank", "padded", "dstate", "dim"), "i32")
    weights = {"x_weight_ptr": "*bf16", "dt_weight_ptr": "*bf16", "A_ptr": "*fp32"}
    given = {"x_proj": pair, "dt_proj": pair, "A_log": pair}
    gradients_ = {f"d{name}": kind for name, kind in (weights | given).items()} | {"A_ptr": "*fp32"}
    numbers = ("dim", "length", "groups", "blocks", "stride_x_batch", "stride_x_row", "stride_out_way")
    conv = dict.fromkeys((*numbers, "stride_dx_batch", "stride_dx_row"), "i32")
    conv |= {"x_ptr": "*bf16", "out_ptr": "*bf16", "dx_ptr": "*bf16", "douts": ["*bf16", "*bf16"]}
    conv |= dict.fromkeys(("weights", "biases", "partials"), pair)
    conv_constants = {"WIDTH": 4, "ALIGN": 8, "NATIVE": True, "BLOCK_DIM": 128}
    rows = {"out_ptr": "*bf16", "given": ["*bf16"] * 4, "rows": "i32", "columns": "i32"} | sizes
    kernels = [
        ("inner.bidirectional_kernels", "_add_projections_kernel", rows, {"BLOCK_ROWS": 64, "BLOCK_STATE": 16}),
        ("inner.bidirectional_kernels", "_weights_kernel", weights | given | sizes, {"BLOCK": 256}),
        ("inner.bidirectional_kernels", "_weights_grad_kernel", gradients_ | sizes, {"BLOCK": 256}),
        ("conv.bidirectional_kernels", "_bidirectional_conv1d_fwd_kernel", conv, conv_constants | {"BLOCK_RUNS": 4}),
        ("conv.bidirectional_kernels", "_bidirectional_conv1d_bwd_kernel", conv, conv_constants | {"BLOCK_RUNS": 2}),
    ]
    options = {"num_warps": 4, "enable_fp_fusion": True}
    specs = [
        {
            "module": f"cab_kernels.{module}",
            "kernel": kernel,
            "signature": signature,
            "constexprs": constants,
            "options": options,
        }
        for module, kernel, signature, constants in kernels
    ]
    assert len(compile_offline(specs).splitlines()) == 3 * len(specs)
