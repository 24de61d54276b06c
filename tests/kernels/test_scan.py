"""The Triton selective scan against its definition in float64: on a GPU, or through the interpreter in float32."""

import math

import pytest
import torch
from scan_cases import (
    ALL,
    CASES,
    CONSTANT,
    GROUPED,
    PLAIN,
    assert_within_budget,
    cast,
    make_inputs,
    results_and_gradients,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cab_kernels import _backend, selective_scan_fn, selective_scan_ref

pytest.importorskip("triton")

from cab_kernels.scan import launch_backward_kernels, launch_forward_kernels, launch_kernels, tilings
from cab_kernels.scan.kernels import selective_scan
from cab_kernels.scan.tilings import Tiling


def triton_scan(*args, **kwargs):
    return selective_scan_fn(*args, **kwargs, backend="triton")


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_matches_definition(sizes, options, device):
    assert_within_budget(triton_scan, make_inputs(**sizes, dtype=torch.float32, device=device), options)


SPLIT = {
    "odd": {"dim": 5, "length": 37},
    "in-pieces-of-several-spans": {"dim": 5, "length": 37, "fill": 1},
    "whole-blocks": {"dim": 32, "length": 48},
    "packed": {"dim": 5, "length": 37, "sequences": 3},
}


@pytest.mark.parametrize("sizes", SPLIT.values(), ids=SPLIT)
def test_sequences_are_split_in_time(sizes, device, monkeypatch):
    """Of spans so short that forward and backward each split a sequence into several."""
    sizes = {"batch": 1, "dstate": 4, "optional": ALL, **sizes}
    monkeypatch.setattr(launch_kernels, "SPANS", (16, 16))
    monkeypatch.setattr(launch_forward_kernels, "FILL_PIECES", sizes.pop("fill", launch_forward_kernels.FILL_PIECES))
    bounds = {"cu_seqlens": [0, 34, 34, 37]} if "sequences" in sizes else {}
    inputs = make_inputs(**sizes, dtype=torch.float32, device=device)
    assert_within_budget(triton_scan, inputs, {"delta_softplus": True, **bounds})


@pytest.mark.parametrize("layout", ["length-contiguous", "channel-contiguous"])
def test_a_model_s_states_are_shared_out_over_lanes(layout, device):
    """16 states: several lanes a channel, several channels a lane, and more than one block of channels."""
    inputs = make_inputs(batch=1, dim=19, length=11, dstate=16, optional=ALL, dtype=torch.float32, device=device)
    if layout == "channel-contiguous":
        inputs = as_in_a_model(inputs)
    assert_within_budget(triton_scan, inputs, {"delta_softplus": True})


def test_scratch_is_shared_by_slices_of_the_channels(device, monkeypatch):
    inputs = make_inputs(batch=1, dim=70, length=3, dstate=3, dtype=torch.float32, device=device)
    want = results_and_gradients(triton_scan, inputs, {})
    monkeypatch.setattr(launch_backward_kernels, "_blocks_at_once", lambda *_: 2)
    got = results_and_gradients(triton_scan, inputs, {})
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["all", "constant-B", "constant-C-grouped-B", "packed-reverse", "no-steps"])
def test_backward_takes_some_states_at_a_time(name, device, monkeypatch):
    monkeypatch.setattr(launch_backward_kernels, "MOST_STATES", 4)
    sizes, options = CASES[name]
    inputs = make_inputs(**{**sizes, "dstate": 6}, dtype=torch.float32, device=device)
    assert_within_budget(triton_scan, inputs, options)


@pytest.fixture
def short_iterations(monkeypatch):
    """Iterations of two steps: tests of what surrounds the kernels need not wait for steps that are not there."""
    short = Tiling(2, 2, 2, 2, 1)
    monkeypatch.setattr(tilings, "TILINGS", {4: short})
    monkeypatch.setattr(tilings, "BY_STEP", {4: short})
    monkeypatch.setattr(tilings, "IN_WORDS", {4: short})


def test_empty_inputs_give_zero_gradients(device):
    inputs = make_inputs(batch=0, optional=ALL, dtype=torch.float32, device=device)
    results = results_and_gradients(triton_scan, inputs, {"delta_softplus": True})
    for name in ("dA", "dD", "ddelta_bias"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def test_constant_b_has_the_last_state_of_b_spelled_out(device):
    inputs = make_inputs(B=CONSTANT, dtype=torch.float32, device=device)
    constant = triton_scan(**inputs, return_last_state=True)[1]
    every_step = {  # one group a channel
        "B": inputs["B"][None, :, :, None].expand(2, 6, 3, 7),
        "C": inputs["C"][:, None].expand(2, 6, 3, 7),
    }
    variable = triton_scan(**{**inputs, **every_step}, return_last_state=True)[1]
    torch.testing.assert_close(constant, variable, rtol=1e-6, atol=1e-6)


def test_softplus_is_exact_far_from_zero(device):
    delta = torch.tensor([-80.0, -30.0, -16.7, -9.2, -1.0, 0.0, 1.0, 19.99, 20.01, 90.0], device=device)
    delta = delta[:, None, None].requires_grad_()
    ones = torch.ones_like(delta)
    # After one step, with all else 1, the output is softplus(delta) and its gradient the sigmoid. The hardware's
    # exponential of x is off by a rounding of x: 80 * 2^-24 at worst here.
    out = triton_scan(ones, delta, -ones[0], ones, ones, delta_softplus=True)
    out.sum().backward()
    exact = delta.detach().double()
    torch.testing.assert_close(out.double(), torch.log1p(torch.exp(exact)), rtol=1e-5, atol=0)
    torch.testing.assert_close(delta.grad.double(), torch.sigmoid(exact), rtol=1e-5, atol=0)


HOSTILE = {
    # steps that vanish, that are past softplus, and on both sides of where it ends
    "delta": lambda x: x["delta"].copy_(torch.tensor([-80.0, -16.7, -9.2, 19.99, 20.01, 40.0, 0.0])),
    # states that vanish at once
    "very-negative-A": lambda x: x["A"].fill_(-1e4),
    # states that grow
    "positive-A": lambda x: x["A"].abs_().mul_(0.1),
    # a running sum: exp(delta A) rounds to 1
    "A-near-zero": lambda x: x["A"].fill_(-2e-9),
    "zero-u": lambda x: x["u"].zero_(),
    "huge-u": lambda x: x["u"].mul_(1e18),
    # a gate that is shut, or open, and has no slope
    "large-z": lambda x: x["z"].copy_(torch.tensor([-90.0, -30.0, -5.0, 0.0, 5.0, 30.0, 90.0])),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_stay_within_the_budget(spoil, device):
    inputs = make_inputs(dtype=torch.float32, device=device, optional=ALL)
    with torch.no_grad():
        spoil(inputs)
    assert_within_budget(triton_scan, inputs, {"delta_softplus": True})


def surround_with_nan(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Equal views into memory that is NaN everywhere else, no two of them with the same strides."""
    views = {}
    for step, (name, tensor) in enumerate(inputs.items(), start=2):
        sizes = [step * size + 2 for size in tensor.shape]
        memory = torch.full(sizes, float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = memory[tuple(slice(1, 1 + step * size, step) for size in tensor.shape)]
        views[name] = view.copy_(tensor.detach()).requires_grad_()
    return views


def as_in_a_model(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Activations stored (batch, length, channels); u and z halves of one tensor, B and C slices of another."""
    batch, dim, length = inputs["u"].shape
    dstate, rank = inputs["A"].shape[1], 2
    new = dict(inputs)
    new["delta"] = inputs["delta"].detach().mT.contiguous().mT
    xz = torch.cat([inputs["u"], inputs["z"]], dim=1).detach().mT.contiguous().mT
    new["u"], new["z"] = xz.split(dim, dim=1)
    projected = torch.full((batch, length, rank + 2 * dstate), float("nan"), device=xz.device, dtype=xz.dtype)
    _, new["B"], new["C"] = projected.mT.split([rank, dstate, dstate], dim=1)
    new["B"].copy_(inputs["B"].detach())
    new["C"].copy_(inputs["C"].detach())
    return {name: tensor.detach().requires_grad_() for name, tensor in new.items()}


LAYOUTS = {
    "surrounded-by-nan": surround_with_nan,
    "as-in-a-model": as_in_a_model,
    "expanded": lambda x: {**x, "delta": x["delta"].detach()[:1, :1].expand(2, 6, 7).requires_grad_()},
}


@pytest.fixture
def uninitialized_memory_is_nan():
    """Under deterministic algorithms, torch fills what ``torch.empty`` and its like return with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("constant", [False, True], ids=["variable", "constant"])
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_strides_are_read_in_place_and_handed_on(layout, constant, device):
    if constant and layout is as_in_a_model:
        pytest.skip("slices of a projection vary in time")
    kind = CONSTANT if constant else PLAIN
    given = layout(make_inputs(B=kind, C=kind, optional=ALL, dtype=torch.float32, device=device))
    assert_within_budget(triton_scan, given, {"delta_softplus": True})
    got = results_and_gradients(triton_scan, given, {"delta_softplus": True})
    assert got["out"].stride() == torch.empty_like(given["u"]).stride()
    for name, tensor in given.items():
        assert got[f"d{name}"].stride() == torch.empty_like(tensor).stride(), name


@pytest.mark.usefixtures("uninitialized_memory_is_nan", "short_iterations")
@pytest.mark.parametrize("sizes", [{"optional": ALL}, {"B": CONSTANT, "C": CONSTANT, "optional": ALL}], ids=str)
def test_each_gradient_alone_is_the_same_and_the_others_are_none(sizes, device):
    inputs = {n: t.detach() for n, t in make_inputs(**sizes, length=2, dtype=torch.float32, device=device).items()}
    every = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    triton_scan(**every, delta_softplus=True).sum().backward()
    for wanted in inputs:
        one = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in inputs.items()}
        triton_scan(**one, delta_softplus=True).sum().backward()
        torch.testing.assert_close(one[wanted].grad, every[wanted].grad, rtol=1e-5, atol=1e-5)
        assert all(tensor.grad is None for name, tensor in one.items() if name != wanted)


@pytest.mark.parametrize("through", [0, 1], ids=["out", "last_state"])
def test_gradient_through_one_result_alone(through, device):
    inputs = make_inputs(optional=ALL, dtype=torch.float32, device=device)
    gradients = []
    for scan, wide in ((triton_scan, inputs), (selective_scan_ref, cast(inputs, others=torch.float64))):
        result = scan(**wide, return_last_state=True)[through]
        gradients.append(torch.autograd.grad(result.sum(), list(wide.values()), allow_unused=True))
    for name, got, want in zip(inputs, *gradients, strict=True):
        want = torch.zeros_like(inputs[name]) if want is None else want.float()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_second_derivative_raises(device):
    inputs = make_inputs(dtype=torch.float32, device=device)
    grad = torch.autograd.grad(triton_scan(**inputs).sum(), inputs["A"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dstate", [1, 16, 64, 256])
@pytest.mark.parametrize("length", [31, 197, 2048, 65_537])
@pytest.mark.parametrize("dim", [16, 384, 5120])
def test_no_more_is_kept_than_the_cuda_extension_keeps(dim, length, dstate):
    """It keeps the ungated output, and two numbers for each state in every 2,048 steps."""
    u = torch.empty(1, dim, length, dtype=torch.bfloat16, device="meta")
    A = torch.empty(dim, dstate, device="meta")
    *_, states = launch_forward_kernels.new_results(u, A, None, False, launch_kernels.span_for(u, A))
    assert launch_kernels.span_kept(states, length, 1) == launch_kernels.span_for(u, A) or length < 128
    assert states.nbytes <= 1.1 * (u.nbytes + math.ceil(length / 2048) * 2 * A.nbytes)


def test_spans_shorten_until_they_fill_a_gpu_with_programs():
    spans = [launch_kernels.span_of(numbers, 16) for numbers in (2**21, 2**22 - 1, 2**22, 2**30)]
    assert spans == [64, 64, 128, 128]
    assert launch_kernels.span_of(1, 16) == 32
    assert launch_kernels.span_of(1, 256) == 512


def test_rounding_up_an_odd_length_slices_no_scratch(device):
    inputs = make_inputs(batch=1, dim=384, length=197, dstate=16, dtype=torch.bfloat16, device=device)
    call = launch_kernels.Call(*(inputs[name] for name in "uABC"), None, True, False)
    assert launch_backward_kernels._blocks_at_once(call, tilings.TILINGS[16], 24) == 24


def test_states_are_kept_for_a_backward_pass_alone(device, monkeypatch):
    kept, new_results = [], launch_forward_kernels.new_results
    monkeypatch.setattr(
        launch_forward_kernels, "new_results", lambda *given: kept.append(given[-1]) or new_results(*given)
    )
    inputs = make_inputs(dtype=torch.float32, device=device)
    triton_scan(**inputs)
    triton_scan(**{name: tensor.detach() for name, tensor in inputs.items()})
    with torch.no_grad():
        triton_scan(**inputs)
    assert kept == [32, 0, 0]


def positional(inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None) -> list[Tensor | None]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    return [*(inputs.get(name) for name in names), cu_seqlens]


@pytest.mark.usefixtures("short_iterations")
@pytest.mark.parametrize("last_state", [False, True])
@pytest.mark.parametrize(
    "inputs",
    [
        make_inputs(length=2, optional=ALL, dtype=torch.float32),
        as_in_a_model(make_inputs(length=2, B=PLAIN, dtype=torch.float32)),
        make_inputs(length=2, B=CONSTANT, C=GROUPED, optional=(), dtype=torch.float32),
    ],
    ids=["all", "as-in-a-model", "constant-B"],
)
def test_the_op_keeps_the_rules_of_torch_library(inputs, last_state, device):
    inputs = {name: tensor.detach().to(device) for name, tensor in inputs.items()}
    torch.library.opcheck(selective_scan, (*positional(inputs), True, True, last_state, 32))


@pytest.mark.usefixtures("short_iterations")
def test_the_op_keeps_the_rules_of_torch_library_for_packed_sequences(device):
    inputs = make_inputs(batch=1, sequences=2, optional=ALL, dtype=torch.float32, device=device)
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    torch.library.opcheck(selective_scan, (*positional(inputs, cu_seqlens), True, False, True, 0))


@pytest.mark.usefixtures("short_iterations")
def test_compiles_without_a_graph_break(device, monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: not torch.cuda.is_available())  # reads what dynamo cannot
    inputs = as_in_a_model(make_inputs(dtype=torch.float32, device=device))
    compiled = torch.compile(triton_scan, fullgraph=True, backend="aot_eager")
    want = results_and_gradients(triton_scan, inputs, {"delta_softplus": True})
    got = results_and_gradients(compiled, inputs, {"delta_softplus": True})
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert got[name].stride() == want[name].stride(), name


@pytest.mark.usefixtures("short_iterations")
def test_compiles_once_for_all_lengths(device, monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: not torch.cuda.is_available())
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(triton_scan, fullgraph=True, dynamic=True, backend=compiler)
    for length in (7, 11, 16):  # no other size, which would be taken for the same
        inputs = as_in_a_model(make_inputs(length=length, dtype=torch.float32, device=device))
        want = results_and_gradients(triton_scan, inputs, {"delta_softplus": True})
        got = results_and_gradients(compiled, inputs, {"delta_softplus": True})
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")
    assert compiler.frame_count == 1


@pytest.mark.usefixtures("short_iterations")
def test_compiles_where_only_the_data_tell_the_length(device, monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: not torch.cuda.is_available())
    monkeypatch.setattr(launch_kernels, "interpreting", lambda: not torch.cuda.is_available())
    monkeypatch.setattr(launch_kernels, "FEW_STATES", 1)  # so that the longest length there could be is beyond it

    def pack(which, **given):
        steps = which.nonzero().squeeze(1)
        return triton_scan(**{name: t[..., steps] if t.dim() == 3 else t for name, t in given.items()})

    inputs = make_inputs(length=9, dtype=torch.float32, device=device)
    which = torch.arange(9, device=device) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = torch.compile(pack, fullgraph=True, backend="aot_eager")(which, **inputs)
    got.sum().backward()
    gradients = {name: tensor.grad.clone() for name, tensor in inputs.items()}
    for tensor in inputs.values():
        tensor.grad = None
    want = pack(which, **inputs)
    torch.testing.assert_close(got, want)
    want.sum().backward()
    for name, tensor in inputs.items():
        torch.testing.assert_close(gradients[name], tensor.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_float64_is_for_the_reference(device):
    inputs = make_inputs(device=device)
    with pytest.raises(TypeError, match="^selective_scan_fn: expected u of dtype float32 or float16 or bfloat16, got"):
        triton_scan(**inputs)


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: False)
    message = "^selective_scan_fn: expected CUDA tensors for backend 'triton', got a tensor on cpu$"
    with pytest.raises(ValueError, match=message):
        triton_scan(**make_inputs(dtype=torch.float32))
