"""The bidirectional scan against two scans in float64: on a GPU, or through the interpreter in float32."""

from collections.abc import Callable

import pytest
import torch
from scan_cases import GROUPED, assert_within_budget, make_inputs, naive_scan, results_and_gradients
from torch import Tensor

from cab_kernels import _backend, bidirectional_selective_scan_fn, bidirectional_selective_scan_ref, selective_scan_fn

SINGLE = ("z", "delta_softplus")  # what both directions share


def both_inputs(channels_first: bool = False, **sizes) -> dict[str, Tensor]:
    """Inputs of two directions as ``u_0``, ``u_1``, ...; activations lie as in a model unless ``channels_first``."""
    inputs = {}
    for way in range(2):
        for name, tensor in make_inputs(**sizes, seed=way).items():
            if tensor.dim() == 3 and not channels_first:
                tensor = tensor.detach().mT.contiguous().mT.requires_grad_()
            if name not in SINGLE or way == 0:
                inputs[name if name in SINGLE else f"{name}_{way}"] = tensor
    return inputs


def bidirectional(scan: Callable) -> Callable:
    """``scan`` as one of ``both_inputs``, with an empty last state, as the tests of the selective scan want it."""

    def run(return_last_state: bool, **given) -> tuple[Tensor, Tensor]:
        names = {name.rsplit("_", 1)[0] for name in given if name not in SINGLE}
        pairs = {name: [given[f"{name}_{way}"] for way in range(2)] for name in names}
        out = scan(**pairs, **{name: given[name] for name in SINGLE if name in given})
        return out, out[..., :0]

    return run


def loop(exponential: Callable = torch.exp, **given) -> tuple[Tensor, Tensor]:
    def one_by_one(**pairs) -> Tensor:
        ways = ({name: given if name in SINGLE else given[way] for name, given in pairs.items()} for way in range(2))
        return sum(naive_scan(**way, reverse=bool(i), exponential=exponential)[0] for i, way in enumerate(ways))

    return bidirectional(one_by_one)(**given)


definition = bidirectional(bidirectional_selective_scan_ref)
triton_scan = bidirectional(lambda **given: bidirectional_selective_scan_fn(**given, backend="triton"))

# An odd number of channels and steps; a step; several groups; steps side by side in memory; a model's states, over
# more than one block of channels, and over whole blocks and iterations; and every option off.
CASES = {
    "odd": ({"dim": 5, "length": 11}, {"delta_softplus": True}),
    "one-step": ({"length": 1}, {"delta_softplus": True}),
    "grouped": ({"B": GROUPED, "C": GROUPED, "dstate": 4}, {"delta_softplus": True}),
    "length-contiguous": ({"channels_first": True, "length": 9}, {"delta_softplus": True}),
    "model": ({"batch": 1, "dim": 19, "length": 10, "dstate": 16}, {"delta_softplus": True}),
    "whole-blocks": ({"batch": 1, "dim": 16, "length": 16, "dstate": 16}, {"delta_softplus": True}),
    "bare": ({"optional": ()}, {}),
    "no-steps": ({"length": 0}, {"delta_softplus": True}),
    "no-batch": ({"batch": 0}, {"delta_softplus": True}),
}


def test_definition_is_two_scans_added_up():
    inputs = both_inputs(length=6)
    got = results_and_gradients(definition, inputs, {"delta_softplus": True})
    want = results_and_gradients(loop, inputs, {"delta_softplus": True})
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_matches_definition(sizes, options, device):
    pytest.importorskip("triton")
    inputs = both_inputs(**sizes, dtype=torch.float32, device=device)
    assert_within_budget(triton_scan, inputs, options, definition, loop)


def test_sequences_are_split_in_time(device, monkeypatch):
    """Of spans so short that forward and backward each split a sequence into several."""
    pytest.importorskip("triton")
    from cab_kernels.scan import launch_kernels

    monkeypatch.setattr(launch_kernels, "SPANS", (16, 16))
    inputs = both_inputs(batch=1, dim=5, length=37, dstate=4, dtype=torch.float32, device=device)
    assert_within_budget(triton_scan, inputs, {"delta_softplus": True}, definition, loop)


def test_backward_takes_some_states_at_a_time(device, monkeypatch):
    pytest.importorskip("triton")
    from cab_kernels.scan import launch_backward_kernels

    monkeypatch.setattr(launch_backward_kernels, "MOST_STATES", 4)
    inputs = both_inputs(dstate=6, dtype=torch.float32, device=device)
    assert_within_budget(triton_scan, inputs, {"delta_softplus": True}, definition, loop)


@pytest.mark.parametrize("name", ["odd", "grouped", "length-contiguous", "model", "whole-blocks", "bare"])
@pytest.mark.parametrize("at_once", [1, 100])
def test_directions_take_turns(name, at_once, device, monkeypatch):
    """One launch after the other, in backward also for each block of channels."""
    pytest.importorskip("triton")
    from cab_kernels.scan import launch_backward_kernels, launch_kernels

    monkeypatch.setattr(launch_kernels, "FILL_DIRECTION", 0)
    monkeypatch.setattr(launch_backward_kernels, "_blocks_at_once", lambda *_: at_once)
    sizes, options = CASES[name]
    inputs = both_inputs(**sizes, dtype=torch.float32, device=device)
    assert_within_budget(triton_scan, inputs, options, definition, loop)


def test_gradients_are_made_for_what_wants_them(device):
    pytest.importorskip("triton")
    inputs = both_inputs(dtype=torch.float32, device=device)
    want = results_and_gradients(triton_scan, inputs, {})
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in ("B_1", "z", "D_0"))
    out, _ = triton_scan(return_last_state=True, **inputs)
    generator = torch.Generator().manual_seed(1)  # as in results_and_gradients
    out.backward(torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype))
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == tensor.requires_grad, name
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, want[f"d{name}"])  # another kernel may fuse other products


def test_what_lies_around_views_is_not_read(device):
    """B and C as slices of a projection, u and delta of other strides than their partners'; NaN around all."""
    pytest.importorskip("triton")
    inputs = both_inputs(dtype=torch.float32, device=device)
    want = results_and_gradients(triton_scan, inputs, {"delta_softplus": True})
    views = {}
    for step, (name, tensor) in enumerate(inputs.items(), start=1):
        memory = torch.full([size + step for size in tensor.shape], float("nan"), device=device)
        view = memory[tuple(slice(1, 1 + size) for size in tensor.shape)]
        views[name] = view.copy_(tensor.detach()).requires_grad_()
    got = results_and_gradients(triton_scan, views, {"delta_softplus": True})
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def pairs(**changed) -> dict:
    batch, dim, dstate, length = 2, 4, 3, 5
    shapes = {
        "u": (batch, dim, length),
        "delta": (batch, dim, length),
        "A": (dim, dstate),
        "B": (batch, dstate, length),
        "C": (batch, dstate, length),
    }
    return {name: [torch.zeros(shape) for _ in range(2)] for name, shape in shapes.items()} | changed


REFUSED = {
    "no-pair": ({"u": torch.zeros(2, 4, 5)}, TypeError, "expected u to be a pair of tensors, got Tensor"),
    "three": ({"A": [torch.zeros(4, 3)] * 3}, TypeError, "expected A to be a pair of tensors, got 3 of them"),
    "shape": ({"delta": [torch.zeros(2, 4, 5), torch.zeros(2, 4, 6)]}, ValueError, r"delta\[1\]"),
    "constant-B": ({"B": [torch.zeros(4, 3)] * 2}, ValueError, r"B\[0\]"),
    "gate": ({"z": torch.zeros(2, 5, 5)}, ValueError, "expected z "),
}


@pytest.mark.parametrize(("changed", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(changed, error, text):
    with pytest.raises(error, match=f"bidirectional_selective_scan_fn: .*{text}"):
        bidirectional_selective_scan_fn(**pairs(**changed))


def test_a_pair_of_two_dtypes_is_refused_on_the_kernels(device):
    pytest.importorskip("triton")
    inputs = pairs(z=torch.zeros(2, 4, 5))
    inputs["delta"][1] = inputs["delta"][1].half()
    on_device = {
        name: [x.to(device) for x in given] if name != "z" else given.to(device) for name, given in inputs.items()
    }
    with pytest.raises(TypeError, match=r"bidirectional_selective_scan_fn: expected delta\[1\] .*float32"):
        bidirectional_selective_scan_fn(**on_device, backend="triton")


def test_complex_a_is_refused():
    with pytest.raises(NotImplementedError, match=r"bidirectional_selective_scan_fn: expected A\[0\] to be real"):
        bidirectional_selective_scan_fn(**pairs(A=[torch.zeros(4, 3, dtype=torch.complex64)] * 2))


def test_the_op_keeps_the_rules_of_torch_library(device):
    pytest.importorskip("triton")
    from cab_kernels.scan.bidirectional_kernels import bidirectional_selective_scan

    inputs = both_inputs(dim=2, length=3, dtype=torch.float32, device=device)
    u, delta, A, B, C, D, delta_bias = (
        [inputs[f"{name}_{way}"].detach() for way in range(2)]
        for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")
    )
    arguments = (u, delta, A, B, C, D, inputs["z"].detach(), delta_bias, True, 32)
    torch.library.opcheck(bidirectional_selective_scan, arguments)


def test_compiles_without_a_graph_break(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_backend, "interpreting", lambda: not torch.cuda.is_available())  # reads what dynamo cannot
    inputs = both_inputs(length=3, dtype=torch.float32, device=device)
    compiled = torch.compile(triton_scan, fullgraph=True, backend="aot_eager")
    want = results_and_gradients(triton_scan, inputs, {"delta_softplus": True})
    got = results_and_gradients(compiled, inputs, {"delta_softplus": True})
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert got[name].stride() == want[name].stride(), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [63, 197])
def test_low_precision_matches_definition(length, dtype):
    inputs = both_inputs(dim=96, length=length, dstate=16, dtype=dtype, device="cuda")
    assert_within_budget(triton_scan, inputs, {"delta_softplus": True}, definition, loop)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_and_agree_with_two_scans():
    inputs = both_inputs(batch=4, dim=96, length=197, dstate=16, dtype=torch.bfloat16, device="cuda")
    got, again = (results_and_gradients(triton_scan, inputs, {"delta_softplus": True}) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got)

    def one_by_one(**given) -> Tensor:
        ways = ({n: x if n in SINGLE else x[way] for n, x in given.items()} for way in range(2))
        return sum(selective_scan_fn(**way, reverse=bool(i)) for i, way in enumerate(ways))

    want = results_and_gradients(bidirectional(one_by_one), inputs, {"delta_softplus": True})
    for name in ("out", "du_0", "du_1", "ddelta_0", "ddelta_1"):
        torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=1e-2)
