"""The definition of the selective scan against a loop in float64 that autograd differentiates, and its checks."""

import subprocess
import sys

import pytest
import torch
from scan_cases import ALL, CASES, CONSTANT, GROUPED, cast, make_inputs, naive_scan, results_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cab_kernels import selective_scan_fn, selective_scan_ref


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_definition_and_its_gradients_match_a_naive_loop(sizes, options):
    inputs = make_inputs(**sizes)
    got = results_and_gradients(selective_scan_ref, inputs, options)
    want = results_and_gradients(naive_scan, inputs, options)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


GRADCHECKS = {
    "all": ({"optional": ALL}, {"delta_softplus": True}),
    "reverse-grouped": ({"B": GROUPED, "C": GROUPED, "optional": ALL}, {"delta_softplus": True, "reverse": True}),
    "constant": ({"B": CONSTANT, "C": CONSTANT, "optional": ALL}, {}),
    "packed": ({"batch": 1, "optional": ALL, "sequences": 3}, {"cu_seqlens": torch.tensor([0, 2, 2, 5]).int()}),
}


@pytest.mark.parametrize(("sizes", "options"), GRADCHECKS.values(), ids=GRADCHECKS)
def test_gradcheck(sizes, options):
    inputs = make_inputs(**{"length": 5, "dim": 2, "dstate": 2, **sizes})

    def scan(*tensors):
        return selective_scan_ref(**dict(zip(inputs, tensors, strict=True)), **options, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("optional", [(), ("z",)], ids=["bare", "gated"])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_second_derivative_raises(name, optional):
    inputs = make_inputs(optional=optional)
    grad = torch.autograd.grad(selective_scan_ref(**inputs).sum(), inputs[name], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="^selective_scan_ref: expected first derivatives, got a second one"):
        torch.autograd.grad(grad.sum(), list(inputs.values()), allow_unused=True)


class LargestResult(TorchDispatchMode):
    """Sees every operation, backward's too, and notes the size of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return result


def test_the_states_of_all_steps_never_exist_together():
    inputs = make_inputs(batch=1, dim=32, dstate=32, length=400)
    with LargestResult() as largest:
        selective_scan_ref(**inputs, delta_softplus=True).sum().backward()
    assert largest.numel < 32 * 32 * 400 / 4


def test_backward_keeps_less_than_a_state_in_each_step():
    inputs = make_inputs(batch=1, dim=32, dstate=64, length=100)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan_ref(**inputs, delta_softplus=True)
    assert sum(kept) < 32 * 64 * 100 / 2


@pytest.mark.parametrize("narrow", [("u", "B", "z"), ("u", "delta", "A", "B", "C", "D", "z")], ids=["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype, narrow):
    inputs = make_inputs(length=33, dtype=torch.float32, optional=("D", "z"))
    low = cast(inputs, **dict.fromkeys(narrow, dtype))
    got = results_and_gradients(selective_scan_ref, low, {"delta_softplus": True})
    wide = results_and_gradients(selective_scan_ref, cast(low, others=torch.float32), {"delta_softplus": True})
    for name in wide:
        expected = dtype if name == "out" or name.removeprefix("d") in narrow else torch.float32
        assert got[name].dtype == expected, name
        assert torch.equal(got[name], wide[name].to(expected)), name


def test_autocast_does_not_touch_the_arithmetic():
    inputs = make_inputs(dtype=torch.float32)
    plain = results_and_gradients(selective_scan_fn, inputs, {"delta_softplus": True})
    with torch.autocast("cpu", torch.bfloat16):
        autocast = results_and_gradients(selective_scan_fn, inputs, {"delta_softplus": True})
    for name in plain:
        assert torch.equal(autocast[name], plain[name]), name


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
