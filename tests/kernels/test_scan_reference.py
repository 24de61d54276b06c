"""The definition of the selective scan against a loop in float64 that autograd differentiates, and its checks."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cab_kernels import selective_scan_fn, selective_scan_ref

BATCH, DIM, DSTATE = 2, 6, 3
CONSTANT, PLAIN, GROUPED = "constant", "plain", "grouped"


def make_inputs(
    batch=BATCH,
    dim=DIM,
    length=7,
    dstate=DSTATE,
    *,
    B=PLAIN,
    C=PLAIN,
    optional=("D", "z", "delta_bias"),
    sequences=None,
    dtype=torch.float64,
    seed=0,
) -> dict[str, torch.Tensor]:
    """Inputs by name, all requiring gradients; ``sequences`` sizes the initial state of packed sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def projection(kind):
        return normal(
            *{CONSTANT: (dim, dstate), PLAIN: (batch, dstate, length), GROUPED: (batch, 2, dstate, length)}[kind]
        )

    inputs = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length) * 0.5,
        "A": -normal(dim, dstate).exp(),
        "B": projection(B),
        "C": projection(C),
    }
    rest = {
        "D": normal(dim),
        "z": normal(batch, dim, length),
        "delta_bias": normal(dim) * 0.1,
        "initial_state": normal(sequences or batch, dim, dstate),
    }
    inputs |= {name: rest[name] for name in optional}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def naive_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, reverse=False
):
    """The formula, one number of time at a time: no grouping by chunks, no function of its own for the gradient."""
    batch, dim, length = u.shape

    def at(matrix, t):
        if matrix.dim() == 2:
            return matrix
        if matrix.dim() == 3:
            return matrix[:, None, :, t]
        return matrix[..., t].repeat_interleave(dim // matrix.shape[1], dim=1)

    h = torch.zeros(batch, dim, A.shape[1], dtype=u.dtype) if initial_state is None else initial_state
    y = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        step = delta[:, :, t] if delta_bias is None else delta[:, :, t] + delta_bias
        step = F.softplus(step) if delta_softplus else step
        h = torch.exp(step[..., None] * A) * h + (step * u[:, :, t])[..., None] * at(B, t)
        y[t] = (h * at(C, t)).sum(-1)
        y[t] = y[t] if D is None else y[t] + D * u[:, :, t]
        y[t] = y[t] if z is None else y[t] * F.silu(z[:, :, t])
    return (torch.stack(y, -1) if length else u), h


def gradients(results, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True), strict=True))


ALL = ("D", "z", "delta_bias", "initial_state")
CASES = {
    # every option on and off at least once, B and C each of three kinds, lengths around one chunk of the definition
    "all": {"inputs": {"optional": ALL}, "delta_softplus": True},
    "bare": {"inputs": {"optional": ()}},
    "reverse": {"inputs": {"optional": ALL, "length": 10}, "delta_softplus": True, "reverse": True},
    "constant-B": {"inputs": {"B": CONSTANT, "optional": ("initial_state",)}, "delta_softplus": True},
    "constant-C-grouped-B": {"inputs": {"B": GROUPED, "C": CONSTANT}, "reverse": True},
    "constant-both": {"inputs": {"B": CONSTANT, "C": CONSTANT, "optional": ("z",)}, "delta_softplus": True},
    "grouped": {"inputs": {"B": GROUPED, "C": GROUPED, "optional": ALL}, "delta_softplus": True},
    "one-step": {"inputs": {"length": 1, "optional": ALL}, "delta_softplus": True, "reverse": True},
    "size-one-axes": {"inputs": {"batch": 1, "dim": 1, "dstate": 1, "length": 5}},
    "empty": {"inputs": {"length": 0, "optional": ALL}, "delta_softplus": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_definition_and_its_gradients_match_a_naive_loop(case):
    options = {name: value for name, value in case.items() if name != "inputs"}
    inputs = make_inputs(**case["inputs"])
    got = selective_scan_ref(**inputs, **options, return_last_state=True)
    want = naive_scan(**inputs, **options)
    for name, g, w in zip(("out", "last_state"), got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    got_grads, want_grads = gradients(got, inputs), gradients(want, inputs)
    for name in inputs:
        want_grad = torch.zeros_like(inputs[name]) if want_grads[name] is None else want_grads[name]
        torch.testing.assert_close(
            got_grads[name], want_grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"d{name}: {m}"
        )


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_scanned_each_by_itself(reverse):
    bounds = [0, 3, 3, 4, 11]  # one empty, one of a single step
    inputs = make_inputs(batch=1, length=11, B=GROUPED, C=CONSTANT, optional=ALL, sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = selective_scan_ref(
        **inputs, delta_softplus=True, return_last_state=True, reverse=reverse, cu_seqlens=cu_seqlens
    )
    outs, states = [], []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        along_time = {name: inputs[name][..., start:end] for name in ("u", "delta", "B", "z")}
        part = {**inputs, **along_time, "initial_state": inputs["initial_state"][i : i + 1]}
        out, state = naive_scan(**part, delta_softplus=True, reverse=reverse)
        outs.append(out)
        states.append(state)
    want = torch.cat(outs, -1), torch.cat(states)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    got_grads, want_grads = gradients(got, inputs), gradients(want, inputs)
    for name in inputs:
        torch.testing.assert_close(got_grads[name], want_grads[name], rtol=1e-9, atol=1e-11)


GRADCHECKS = {
    "all": {"inputs": {"optional": ALL}, "delta_softplus": True},
    "reverse-grouped": {
        "inputs": {"B": GROUPED, "C": GROUPED, "optional": ALL},
        "delta_softplus": True,
        "reverse": True,
    },
    "constant": {"inputs": {"B": CONSTANT, "C": CONSTANT, "optional": ALL}},
    "packed": {
        "inputs": {"batch": 1, "length": 5, "optional": ALL, "sequences": 3},
        "cu_seqlens": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("case", GRADCHECKS.values(), ids=GRADCHECKS)
def test_gradcheck(case):
    options = {name: value for name, value in case.items() if name != "inputs"}
    inputs = make_inputs(**{"length": 5, "dim": 2, "dstate": 2, **case["inputs"]})

    def scan(*tensors):
        return selective_scan_ref(**dict(zip(inputs, tensors, strict=True)), **options, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_second_derivative_raises():
    inputs = make_inputs()
    grad = torch.autograd.grad(selective_scan_ref(**inputs).sum(), inputs["A"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_keeps_less_than_a_state_in_each_step():
    inputs = make_inputs(batch=1, dim=32, dstate=64, length=100)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan_ref(**inputs, delta_softplus=True)
    assert sum(kept) < inputs["u"].numel() * 64 / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    wide = make_inputs(length=33, dtype=torch.float32, optional=ALL)
    mixed = {name: t.detach().to(dtype) if name in ("u", "B", "z") else t.detach() for name, t in wide.items()}
    out, state = selective_scan_ref(**mixed, delta_softplus=True, return_last_state=True)
    exact, exact_state = selective_scan_ref(
        **{name: t.float() for name, t in mixed.items()}, delta_softplus=True, return_last_state=True
    )
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(out, exact.to(dtype))
    assert torch.equal(state, exact_state)


def test_autocast_does_not_touch_the_arithmetic():
    inputs = make_inputs(dtype=torch.float32)
    plain = selective_scan_fn(**inputs, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = selective_scan_fn(**inputs, delta_softplus=True)
        grads = gradients([autocast], inputs)
    assert torch.equal(autocast, plain)
    for name, grad in gradients([plain], inputs).items():
        assert torch.equal(grads[name], grad), name


def test_softplus_is_exact_far_from_zero_and_linear_past_the_threshold():
    delta = torch.tensor([-80.0, -30.0, -9.2, 0.0, 20.0, 20.1, 90.0])[None, None]
    ones = torch.ones(1, 1, 7)
    # With A = 0, u = B = 1 and C = 1, the output is the running sum of softplus(delta).
    out = selective_scan_ref(ones, delta, torch.zeros(1, 1), ones, ones, delta_softplus=True)
    exact = torch.log1p(torch.exp(delta.double())).cumsum(-1)
    torch.testing.assert_close(out.double(), exact, rtol=3e-7, atol=0)
    assert selective_scan_ref(
        ones[..., :1], delta[..., 1:2], torch.zeros(1, 1), ones[..., :1], ones[..., :1], delta_softplus=True
    ).item() == pytest.approx(9.357623e-14, rel=1e-5)


LAYOUTS = {
    "length-last": lambda t: t.contiguous(),
    "channels-last": lambda t: t.mT.contiguous().mT,
    "half-of-xz": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "half-of-channels-last-xz": lambda t: (
        torch.cat([t, t], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : t.shape[1]]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_output_takes_the_layout_of_u(layout, packed):
    batch = 1 if packed else 2
    inputs = {name: t.detach() for name, t in make_inputs(batch=batch).items()}
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32) if packed else None
    want = selective_scan_ref(**inputs, cu_seqlens=cu_seqlens)
    inputs["u"] = layout(inputs["u"])
    got = selective_scan_ref(**inputs, cu_seqlens=cu_seqlens)
    assert got.stride() == torch.empty_like(inputs["u"]).stride()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", ["batch", "length"])
def test_empty_inputs_give_empty_results_and_zero_gradients(empty):
    inputs = make_inputs(**{empty: 0}, optional=ALL)
    out, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    assert out.shape == inputs["u"].shape
    assert torch.equal(state, inputs["initial_state"])
    (out.sum() + 0 * state.sum()).backward()
    for name, tensor in inputs.items():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor)), name


def test_constant_b_has_the_right_last_state():
    inputs = make_inputs(B=CONSTANT)
    constant = selective_scan_ref(**inputs, return_last_state=True)[1]
    spelled_out = inputs["B"].reshape(1, DIM, DSTATE, 1).expand(BATCH, DIM, DSTATE, 7)  # one group a channel
    variable = selective_scan_ref(
        **{**inputs, "B": spelled_out, "C": inputs["C"][:, None].expand(BATCH, DIM, DSTATE, 7)},
        return_last_state=True,
    )[1]
    torch.testing.assert_close(constant, variable)


BAD = {
    "not-a-tensor": ({"delta": 3.0}, TypeError, "expected delta to be a tensor, got float"),
    "shape-of-delta": (
        {"delta": torch.zeros(2, 6, 8)},
        ValueError,
        r"expected delta of shape \(batch, dim, length\) = \(2, 6, 7\), got \(2, 6, 8\)",
    ),
    "axes-of-u": ({"u": torch.zeros(2, 6)}, ValueError, r"expected u of shape \(batch, dim, length\), got \(2, 6\)"),
    "integer-u": ({"u": torch.zeros(2, 6, 7).int()}, TypeError, "expected u of dtype float32 or .*, got int32"),
    "half-A": ({"A": torch.zeros(6, 3).half()}, TypeError, "expected A of dtype float32 or float64, got float16"),
    "complex-A": ({"A": torch.zeros(6, 3) * 1j}, NotImplementedError, "expected A to be real, got complex"),
    "no-states": ({"A": torch.zeros(6, 0)}, ValueError, r"expected dstate \(A's second axis\) from 1 to 256, got 0"),
    "many-states": (
        {"A": torch.zeros(6, 257)},
        ValueError,
        r"expected dstate \(A's second axis\) from 1 to 256, got 257",
    ),
    "shape-of-B": (
        {"B": torch.zeros(2, 4, 7)},
        ValueError,
        r"expected B of shape \(batch, dstate, length\) = \(2, 3, 7\), got \(2, 4, 7\)",
    ),
    "groups-of-C": (
        {"B": torch.zeros(2, 2, 3, 7), "C": torch.zeros(2, 3, 3, 7)},
        ValueError,
        r"expected C of shape \(batch, groups, dstate, length\) = \(2, 2, 3, 7\), got \(2, 3, 3, 7\)",
    ),
    "groups-of-3d-C": (
        {"B": torch.zeros(2, 2, 3, 7)},
        ValueError,
        r"expected C to have 2 groups like B, got shape \(2, 3, 7\), one group",
    ),
    "groups-of-4d-C": (
        {"C": torch.zeros(2, 2, 3, 7)},
        ValueError,
        r"expected C of shape \(batch, groups, dstate, length\) = \(2, 1, 3, 7\), got \(2, 2, 3, 7\)",
    ),
    "groups-that-do-not-divide": (
        {"B": torch.zeros(2, 4, 3, 7), "C": torch.zeros(2, 4, 3, 7)},
        ValueError,
        "expected dim to be a multiple of groups, got dim 6 and groups 4",
    ),
    "shape-of-D": ({"D": torch.zeros(5)}, ValueError, r"expected D of shape \(dim\) = \(6,\), got \(5,\)"),
    "shape-of-z": ({"z": torch.zeros(1, 6, 7)}, ValueError, "expected z of shape"),
    "shape-of-bias": ({"delta_bias": torch.zeros(6, 1)}, ValueError, r"expected delta_bias of shape \(dim\), got"),
    "shape-of-state": (
        {"initial_state": torch.zeros(2, 3, 6)},
        ValueError,
        r"expected initial_state of shape \(batch, dim, dstate\) = \(2, 6, 3\), got \(2, 3, 6\)",
    ),
    "other-device": (
        {"z": torch.zeros(2, 6, 7, device="meta")},
        ValueError,
        "expected z on cpu like the rest, got meta",
    ),
    "batch-of-packed": (
        {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
        ValueError,
        "expected batch 1 with cu_seqlens, got 2",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "expected backend None, 'triton' or 'reference', got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, error, message):
    arguments = {**make_inputs(dtype=torch.float32), **change}
    with pytest.raises(error, match=f"^selective_scan_fn: {message}"):
        selective_scan_fn(**arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 7], TypeError, "expected cu_seqlens of dtype int32, got int64"),
        ([[0, 7]], ValueError, r"expected cu_seqlens of shape \(sequences\+1\), got \(1, 2\)"),
        ([0], ValueError, "expected cu_seqlens of at least two entries, got 1"),
        ([0, 6], ValueError, r"expected cu_seqlens to rise from 0 to length 7, got \[0, 6\]"),
        ([1, 7], ValueError, "expected cu_seqlens to rise from 0 to length 7"),
        ([0, 5, 3, 7], ValueError, "expected cu_seqlens to rise from 0 to length 7"),
    ],
    ids=["int64", "two-axes", "no-sequence", "too-short", "late", "falls"],
)
def test_bad_packing_is_named(cu_seqlens, error, message):
    dtype = torch.int64 if error is TypeError else torch.int32
    with pytest.raises(error, match=f"^selective_scan_fn: {message}"):
        selective_scan_fn(**make_inputs(batch=1), cu_seqlens=torch.tensor(cu_seqlens, dtype=dtype))


def test_initial_state_of_packed_sequences_is_checked_against_their_number():
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
    inputs = make_inputs(batch=1, optional=("initial_state",))
    message = r"expected initial_state of shape \(sequences, dim, dstate\) = \(2, 6, 3\), got \(1, 6, 3\)"
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**inputs, cu_seqlens=cu_seqlens)


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, cab_kernels\n"
        "one = torch.ones(1, 1, 1)\n"
        "print(cab_kernels.selective_scan_fn(one, one, one[0], one, one).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("1.0", 0), done.stderr
