"""What the selective scan's kernels do only on a GPU: low precision, large sizes, graphs, compilation."""

import pytest
import torch
from scan_cases import (
    ALL,
    CASES,
    GROUPED,
    assert_within_budget,
    cast,
    make_inputs,
    results_and_gradients,
)

from cab_kernels import selective_scan_fn

pytestmark = pytest.mark.gpu
triton = pytest.importorskip("triton")
launch_forward_kernels = pytest.importorskip("cab_kernels.scan.launch_forward_kernels")
launch_backward_kernels = pytest.importorskip("cab_kernels.scan.launch_backward_kernels")

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


# Lengths around warps and chunks, an image's tokens, and one long odd; N of VMamba, odd, Mamba, and the largest.
SHAPES = [
    *((length, 16, dtype) for length in (1, 2, 63, 64, 65, 197) for dtype in (HALF, BFLOAT, FLOAT)),
    *((197, dstate, BFLOAT) for dstate in (1, 3, 64, 256)),
    (2051, 16, BFLOAT),
    (2051, 3, FLOAT),
]


@pytest.mark.parametrize(("length", "dstate", "dtype"), SHAPES, ids=str)
def test_matches_definition(length, dstate, dtype):
    inputs = make_inputs(2, 96, length, dstate, optional=ALL, dtype=dtype, device="cuda")
    assert_within_budget(selective_scan_fn, inputs, {"delta_softplus": True})


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("no-steps", "no-batch")])
def test_every_option_matches_definition_in_bfloat16(name):
    sizes, options = CASES[name]
    assert_within_budget(selective_scan_fn, make_inputs(**sizes, dtype=BFLOAT, device="cuda"), options)


@pytest.mark.parametrize("reverse", [False, True])
def test_long_packed_sequences_match_definition(reverse):
    bounds = [0, 130, 130, 131, 260, 517]  # chunks of many sequences side by side
    inputs = make_inputs(1, 96, 517, 16, B=GROUPED, C=GROUPED, optional=ALL, sequences=5, dtype=FLOAT, device="cuda")
    assert_within_budget(selective_scan_fn, inputs, {"delta_softplus": True, "reverse": reverse, "cu_seqlens": bounds})


MIXES = {
    # what autocast makes of a block: projections in low precision, norms and parameters in float32
    "delta-wide": {"u": BFLOAT, "z": BFLOAT, "C": BFLOAT},
    "u-wide": {"delta": BFLOAT, "B": BFLOAT, "C": BFLOAT, "D": BFLOAT},
    "all-three": {"u": HALF, "delta": BFLOAT, "z": HALF, "initial_state": BFLOAT},
}


@pytest.mark.parametrize("dtypes", MIXES.values(), ids=MIXES)
def test_mixed_dtypes_match_definition(dtypes):
    inputs = cast(make_inputs(2, 40, 70, 16, optional=ALL, dtype=FLOAT, device="cuda"), **dtypes)
    with torch.autocast("cuda", BFLOAT):
        assert_within_budget(selective_scan_fn, inputs, {"delta_softplus": True})


def test_two_runs_give_the_same_bits():
    inputs = make_inputs(4, 320, 517, 16, B=GROUPED, C=GROUPED, optional=ALL, dtype=BFLOAT, device="cuda")
    first, second = (results_and_gradients(selective_scan_fn, inputs, {"delta_softplus": True}) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_inductor_compiles_without_a_graph_break():
    inputs = make_inputs(2, 64, 70, 16, optional=ALL, dtype=BFLOAT, device="cuda")

    def block(**given):
        given["u"] = given["u"].mT.contiguous().mT * 1.5  # so that there is something to fuse and a layout to keep
        return selective_scan_fn(**given)

    want = results_and_gradients(block, inputs, {"delta_softplus": True})
    got = results_and_gradients(torch.compile(block, fullgraph=True), inputs, {"delta_softplus": True})
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_graph_captures_forward_and_backward():
    inputs = make_inputs(2, 64, 70, 16, optional=ALL, dtype=BFLOAT, device="cuda")

    def run():
        out, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
        return out, *torch.autograd.grad(out.float().sum() + state.sum(), list(inputs.values()))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        inputs["u"].mul_(-0.5)
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


def test_more_programs_than_a_short_grid_axis_has():
    inputs = make_inputs(70_001, 1, 2, 1, dtype=FLOAT, device="cuda")
    out = selective_scan_fn(**inputs, delta_softplus=True)
    tail = {name: t[-3:] if t.dim() == 3 else t for name, t in inputs.items()}
    assert torch.equal(out[-3:], selective_scan_fn(**tail, delta_softplus=True))
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs.values())


def test_more_blocks_of_steps_than_a_short_grid_axis_has():
    """With states that forget within a hundred steps, the end of a scan is the scan of its end."""
    length, end, compared = 2**16 * 64 + 100, 300, 100
    inputs = make_inputs(1, 8, length, 16, dtype=FLOAT, device="cuda")
    inputs["A"].data.fill_(-4.0)
    tail = {name: t.detach()[..., -end:].clone() if t.dim() == 3 else t for name, t in inputs.items()}
    tail["B"].requires_grad_()
    out, want = (selective_scan_fn(**values, delta_softplus=True)[..., -compared:] for values in (inputs, tail))
    torch.testing.assert_close(out, want)
    out.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(inputs["B"].grad[..., -compared:], tail["B"].grad[..., -compared:])
    assert inputs["B"].grad.isfinite().all()


def test_new_lengths_do_not_compile_anew(monkeypatch):
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs))
    for length in (37, 1023, 39, 41, 171, 899):  # a short one, and one that is split in time
        inputs = make_inputs(2, 48, length, 5, dtype=FLOAT, device="cuda")
        results_and_gradients(selective_scan_fn, inputs, {})
        if length in (37, 1023):
            assert compiled
            compiled.clear()
    assert not compiled


def test_offsets_beyond_31_bits(monkeypatch):
    """Of tensors of more than 2^31 elements, stored (batch, length, dim), a scan of the end gives the same bits."""
    monkeypatch.setattr(launch_forward_kernels, "FILL", 0)  # nor is the end, of few channels, split in time
    monkeypatch.setattr(launch_backward_kernels, "FILL", 0)
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    batch, dim, length = 2, 32_768, 32_776
    assert batch * dim * length > 2**31

    def activation(scale: float) -> torch.Tensor:
        dense = torch.empty(batch, length, dim, dtype=BFLOAT, device="cuda").uniform_(-scale, scale)
        return dense.mT.requires_grad_()

    u, delta = activation(1.0), activation(0.5)
    A, BC = -torch.rand(dim, 1, device="cuda"), torch.randn(2, batch, 1, length, device="cuda")
    out = selective_scan_fn(u, delta, A, *BC, delta_softplus=True)
    end = {"u": u.detach()[1:, -64:], "delta": delta.detach()[1:, -64:]}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in end.items()}
    want = selective_scan_fn(**leaves, A=A[-64:], B=BC[0, 1:], C=BC[1, 1:], delta_softplus=True)
    assert torch.equal(out[1:, -64:], want)
    du, ddelta = torch.autograd.grad(out, (u, delta), u.detach())
    want.backward(end["u"])
    assert torch.equal(du[1:, -64:], leaves["u"].grad)
    assert torch.equal(ddelta[1:, -64:], leaves["delta"].grad)
