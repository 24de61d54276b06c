"""One-token steps of the scan and the convolution: against whole sequences, and kernels against definitions."""

import math
import re

import pytest
import torch
from torch import Tensor

from cab_kernels import (
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('triton')")),
]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def scan_inputs(
    rows: tuple[int, ...], batch: int, dstate: int, groups: int | None, optional: bool, **kind
) -> dict[str, Tensor]:
    """Arguments of ``selective_state_update`` by name; ``rows`` is (dim,) or (nheads, headdim)."""
    projection = (batch, dstate) if groups is None else (batch, groups, dstate)
    inputs = {
        "state": normal(batch, *rows, dstate, seed=0, **kind),
        "x": normal(batch, *rows, seed=1, **kind),
        "dt": normal(batch, *rows, seed=2, **kind) * 3,
        "A": -normal(*rows, dstate, seed=3, **kind).exp(),
        "B": normal(*projection, seed=4, **kind),
        "C": normal(*projection, seed=5, **kind),
    }
    if optional:
        inputs["D"], inputs["dt_bias"] = normal(*rows, seed=6, **kind), normal(*rows, seed=7, **kind)
        inputs["z"] = normal(batch, *rows, seed=8, **kind)
    return inputs


def one_row_at_a_time(inputs: dict[str, Tensor], softplus: bool) -> tuple[Tensor, Tensor]:
    """The formula for one number after the other, in Python's own arithmetic; heads share B and C in order."""
    state, out = inputs["state"].clone(), torch.zeros_like(inputs["x"])
    for index in torch.cartesian_prod(*(torch.arange(size) for size in out.shape)).tolist():
        batch, row = index[0], tuple(index[1:])
        dt = inputs["dt"][tuple(index)].item() + (inputs["dt_bias"][row].item() if "dt_bias" in inputs else 0.0)
        dt = math.log1p(math.exp(dt)) if softplus else dt
        B, C = inputs["B"], inputs["C"]
        if B.dim() == 3:
            group = row[0] * B.shape[1] // out.shape[1] if len(row) == 2 else 0
            B, C = B[:, group], C[:, group]
        x, total = inputs["x"][tuple(index)].item(), 0.0
        for n in range(state.shape[-1]):
            h = state[(*index, n)].item() * math.exp(dt * inputs["A"][(*row, n)].item()) + dt * x * B[batch, n].item()
            state[(*index, n)] = h
            total += h * C[batch, n].item()
        total += x * inputs["D"][row].item() if "D" in inputs else 0.0
        z = inputs["z"][tuple(index)].item() if "z" in inputs else None
        out[tuple(index)] = total if z is None else total * z / (1 + math.exp(-z))
    return out, state


# Rows, groups of B and C, what is optional, softplus: Mamba's, Mamba-2's, and each default left at its default.
SCAN_CASES = {
    "bare": ((5,), 2, 3, None, False, False),
    "all": ((5,), 2, 3, None, True, True),
    "one-of-each": ((1,), 1, 1, 1, True, True),
    "heads": ((4, 3), 2, 5, 2, True, True),
    "heads-of-one-group": ((2, 3), 2, 4, None, False, True),
}


@pytest.mark.parametrize(
    ("rows", "batch", "dstate", "groups", "optional", "softplus"), SCAN_CASES.values(), ids=SCAN_CASES
)
def test_scan_definition_equals_the_formula(rows, batch, dstate, groups, optional, softplus):
    inputs = scan_inputs(rows, batch, dstate, groups, optional)
    expected_out, expected_state = one_row_at_a_time(inputs, softplus)
    out = selective_state_update_ref(**inputs, dt_softplus=softplus)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(inputs["state"], expected_state)


def test_steps_equal_the_scan_of_the_whole_sequence():
    length, inputs = 6, scan_inputs((5,), 2, 3, None, True)
    parameters = {name: inputs[name] for name in ("A", "D")}
    u, delta, z = (normal(2, 5, length, seed=seed) for seed in (10, 11, 12))
    B, C = (normal(2, 3, length, seed=seed) for seed in (13, 14))
    whole, last_state = selective_scan_ref(
        u, delta, inputs["A"], B, C, inputs["D"], z, inputs["dt_bias"], True, True, initial_state=inputs["state"]
    )
    state = inputs["state"].clone()
    for t in range(length):
        out = selective_state_update(
            state, u[..., t], delta[..., t], B=B[..., t], C=C[..., t], z=z[..., t], **parameters,
            dt_bias=inputs["dt_bias"], dt_softplus=True,
        )  # fmt: skip
        torch.testing.assert_close(out, whole[..., t])
    torch.testing.assert_close(state, last_state)


def assert_step_within_budget(inputs: dict[str, Tensor], function, reference, state: str, **options) -> None:
    """The kernel errs at most twice what the definition errs at these dtypes, plus one rounding, in out and state."""
    states = [inputs[state].clone() for _ in range(2)]
    out = function(**{**inputs, state: states[0]}, **options, backend="triton")
    definition = reference(**{**inputs, state: states[1]}, **options)
    double = {name: tensor.double() for name, tensor in inputs.items()}
    gold = reference(**double, **options)
    for kernel, other, exact in ((out, definition, gold), (states[0], states[1], double[state])):
        assert kernel.dtype == other.dtype
        error, allowed = ((result.double() - exact).norm().item() for result in (kernel, other))
        assert error <= 2 * allowed + torch.finfo(kernel.dtype).eps * exact.norm().item()


@pytest.mark.parametrize(
    ("rows", "batch", "dstate", "groups", "optional", "softplus"), SCAN_CASES.values(), ids=SCAN_CASES
)
def test_scan_kernel_matches_definition(rows, batch, dstate, groups, optional, softplus, device):
    pytest.importorskip("triton")
    inputs = scan_inputs(rows, batch, dstate, groups, optional, dtype=torch.float32, device=device)
    assert_step_within_budget(inputs, selective_state_update, selective_state_update_ref, "state", dt_softplus=softplus)


def test_scan_kernel_covers_blocks_strides_and_expanded_parameters(device):
    pytest.importorskip("triton")
    kind = {"dtype": torch.float32, "device": device}
    inputs = scan_inputs((2, 70), 2, 17, 2, True, **kind)
    inputs["A"] = inputs["A"][:, :1, :1].expand(2, 70, 17)  # one number a head, as Mamba-2 has it
    inputs["D"] = inputs["D"][:, :1].expand(2, 70)
    packed = normal(2, 2, 140, seed=20, **kind)
    inputs["x"] = packed[..., ::2]
    assert_step_within_budget(inputs, selective_state_update, selective_state_update_ref, "state", dt_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softplus_keeps_its_accuracy_far_from_zero(backend, device):
    dt = torch.tensor([[-80.0, -30.0, -16.7, -9.2, -1.0, 0.0, 1.0, 19.99, 20.01, 90.0]], device=device)
    ones = torch.ones(10, 1, device=device)
    out = selective_state_update(
        torch.zeros(1, 10, 1, device=device), ones.T, dt, -ones, ones[:1], ones[:1], dt_softplus=True, backend=backend
    )
    exact = torch.log1p(dt.double().exp())
    # The exponential of x is off by a rounding of x.
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_step_leaves_other_states_alone(backend, device):
    inputs = scan_inputs((5,), 4, 3, None, True, dtype=torch.float32, device=device)
    slots = normal(7, 5, 3, seed=30, dtype=torch.float32, device=device)
    rows = [6, -1, 0, 3]
    expected_state, expected = slots.clone(), torch.zeros_like(inputs["x"])
    for sequence, slot in enumerate(rows):
        if slot >= 0:
            one = {
                name: tensor[sequence : sequence + 1]
                for name, tensor in inputs.items()
                if name in ("x", "dt", "B", "C", "z")
            }
            shared = {name: inputs[name] for name in ("A", "D", "dt_bias")}
            expected[sequence] = selective_state_update_ref(expected_state[slot : slot + 1], **one, **shared)[0]
    inputs["state"] = slots
    out = selective_state_update(**inputs, state_batch_indices=torch.tensor(rows, device=device), backend=backend)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[1], torch.zeros(5, device=device))
    torch.testing.assert_close(slots, expected_state)
    untouched = [1, 2, 4, 5]
    assert torch.equal(slots[untouched], normal(7, 5, 3, seed=30, dtype=torch.float32, device=device)[untouched])


def conv_inputs(state_len: int, steps: int | None, **kind) -> dict[str, Tensor]:
    return {
        "x": normal(3, 40, *(() if steps is None else (steps,)), seed=0, **kind),
        "conv_state": normal(3, 40, state_len, seed=1, **kind),
        "weight": normal(40, 4, seed=2, **kind),
        "bias": normal(40, seed=3, **kind),
    }


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_conv_steps_equal_the_convolution_of_the_whole_sequence(state_len, ring):
    length, inputs = 10, conv_inputs(state_len, None)
    x, state = normal(3, 40, length, seed=4), inputs["conv_state"].clone()
    filters = inputs["weight"], inputs["bias"], "silu"
    window = state.roll(-2, dims=2) if ring else state  # the ring has seen two steps, so its oldest stands at 2
    whole = causal_conv1d_ref(x, *filters, initial_states=window[..., state_len - 3 :])
    seen = torch.full((3,), 2, dtype=torch.int32) if ring else None
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 10)):
        new = x[..., start] if stop == start + 1 else x[..., start:stop]
        out = causal_conv1d_update(new, state, *filters, cache_seqlens=seen)
        torch.testing.assert_close(out.reshape(3, 40, stop - start), whole[..., start:stop])
        seen = None if seen is None else seen + (stop - start)
    newest = torch.cat([window, x], dim=-1)[..., -state_len:]
    torch.testing.assert_close(state, newest.roll(2 + length, dims=2) if ring else newest)


@pytest.mark.parametrize("options", [{}, {"ring": True}, {"rows": True}, {"ring": True, "rows": True}], ids=str)
@pytest.mark.parametrize(("state_len", "steps"), [(3, None), (4, 1), (6, 3), (3, 9)])
def test_conv_kernel_matches_definition(state_len, steps, options, device):
    pytest.importorskip("triton")
    inputs = conv_inputs(state_len, steps, dtype=torch.float32, device=device)
    given = {"activation": "silu"}
    if "ring" in options:
        given["cache_seqlens"] = torch.tensor([0, 5, 11], device=device)
    if "rows" in options:
        given["conv_state_indices"] = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    assert_step_within_budget(inputs, causal_conv1d_update, causal_conv1d_update_ref, "conv_state", **given)
    out = causal_conv1d_update(**inputs, **given, backend="triton")
    assert not out[1].any() or "rows" not in options


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_never_lose_a_gradient_silently(backend, device):
    kind = {"dtype": torch.float32, "device": device}
    inputs = scan_inputs((5,), 2, 3, None, False, **kind)
    inputs["A"].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        selective_state_update(**inputs, backend=backend).sum().backward()
    inputs = conv_inputs(3, None, **kind)
    inputs["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        causal_conv1d_update(**inputs, backend=backend).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_truthfully(backend, device):
    kind = {"dtype": torch.float32, "device": device}
    scan = list(scan_inputs((5,), 2, 3, None, True, **kind).values())
    state, x, dt, A, B, C, D, dt_bias, z = scan
    step = torch.ops.cab_kernels.selective_state_update.default
    torch.library.opcheck(step, (state, x, dt, A, B, C, D, z, dt_bias, True, None, backend))
    update = torch.ops.cab_kernels.causal_conv1d_update.default
    x, state, weight, bias = conv_inputs(3, 2, **kind).values()
    torch.library.opcheck(update, (x, state, weight, bias, True, None, None, backend))


SCAN_ERRORS = {
    "another-batch": ("dt", lambda t: t[:1], "expected dt of shape (batch, dim) = (2, 5), got (1, 5)"),
    "states-of-A": ("A", lambda t: t[:, :2], "expected B of shape (batch, dstate) = (2, 2), got (2, 3)"),
    "state-without-rows": ("state", lambda t: t[0], "expected state of shape (batch, dim, dstate), got (5, 3)"),
    "B-of-a-group": ("B", lambda t: t[:, None], "expected C of shape (batch, groups, dstate), got (2, 3)"),
    "D-of-another-dim": ("D", lambda t: t[:3], "expected D of shape (dim) = (5,), got (3,)"),
}


@pytest.mark.parametrize(("name", "change", "text"), SCAN_ERRORS.values(), ids=SCAN_ERRORS)
def test_bad_arguments_of_the_scan_step_are_named(name, change, text):
    inputs = scan_inputs((5,), 2, 3, None, True)
    if name == "A":
        inputs["state"] = inputs["state"][..., :2]
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"^selective_state_update: {re.escape(text)}$"):
        selective_state_update(**inputs)


def test_groups_must_divide_heads():
    inputs = scan_inputs((3, 2), 2, 3, 2, False)
    with pytest.raises(ValueError, match="expected nheads to be a multiple of groups, got 3 and 2"):
        selective_state_update(**inputs)


def test_a_state_shorter_than_the_filter_is_named():
    inputs = conv_inputs(2, None)
    text = "causal_conv1d_update: expected conv_state with a state_len of width - 1 = 3 or more, got (3, 40, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        causal_conv1d_update(**inputs)


def test_step_kernels_compile_for_sm_80_90_and_100(compile_offline):
    pytest.importorskip("triton")
    low = ("x", "dt", "B", "C", "z", "out")
    wide = ("state", "A", "D", "dt_bias")
    signature = {f"{name}_ptr": "*bf16" if name in low else "*fp32" for name in (*low, *wide)}
    signature |= {"indices_ptr": "*i32"} | dict.fromkeys(("headdim", "dstate", "heads_per_group"), "i32")
    axes = {"state": 4, "D": 2, "dt_bias": 2}
    signature |= {f"stride_{name}": ["i32"] * axes.get(name, 3) for name in (*low, *wide)}
    flags = dict.fromkeys(("HAS_D", "HAS_Z", "HAS_DT_BIAS", "HAS_INDICES", "DT_SOFTPLUS"), True)
    scan = {
        "module": "cab_kernels.scan.step_kernels",
        "kernel": "_selective_state_update_kernel",
        "signature": signature,
        "constexprs": flags | {"BLOCK_DIM": 64, "BLOCK_DSTATE": 16},
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }
    pointers = {"x_ptr": "*bf16", "state_ptr": "*bf16", "out_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32"}
    pointers |= {"seqlens_ptr": "*i32", "indices_ptr": "*i64", "dim": "i32", "length": "i32"}
    conv = {
        "module": "cab_kernels.conv.step_kernels",
        "kernel": "_causal_conv1d_update_kernel",
        "signature": pointers | {f"stride_{name}": ["i32"] * 3 for name in ("x", "state", "out")},
        "constexprs": dict.fromkeys(("SILU", "HAS_BIAS", "IS_RING", "HAS_INDICES"), True)
        | {"WIDTH": 4, "STATE_LEN": 4, "BLOCK_DIM": 128},
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }
    assert len(compile_offline([scan, conv]).splitlines()) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_match_definition_at_models_sizes(state_dtype):
    for rows, groups, dstate in (((1536,), None, 16), ((80, 64), 2, 128), ((100,), None, 200)):
        inputs = scan_inputs(rows, 3, dstate, groups, True, dtype=torch.bfloat16, device="cuda")
        inputs |= {name: inputs[name].float() for name in ("A", "D", "dt_bias")}
        inputs["state"] = inputs["state"].to(state_dtype)
        assert_step_within_budget(inputs, selective_state_update, selective_state_update_ref, "state", dt_softplus=True)


@pytest.mark.gpu
def test_steps_are_captured_and_compiled():
    kind = {"dtype": torch.float32, "device": "cuda"}
    inputs, conv = scan_inputs((64,), 2, 16, None, True, **kind), conv_inputs(4, None, **kind)

    def step(inputs: dict[str, Tensor], conv: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return selective_state_update(**inputs, dt_softplus=True), causal_conv1d_update(**conv, activation="silu")

    def copies() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {n: t.clone() for n, t in inputs.items()}, {n: t.clone() for n, t in conv.items()}

    expected = copies()
    outs = step(*expected)
    for function in (torch.compile(step, fullgraph=True), torch.compile(step, fullgraph=True, mode="reduce-overhead")):
        given = copies()
        for value, exact in zip((*function(*given), given[0]["state"], given[1]["conv_state"]),
                                (*outs, expected[0]["state"], expected[1]["conv_state"]), strict=True):  # fmt: skip
            torch.testing.assert_close(value, exact, rtol=0, atol=0)
    given, graph = copies(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    graph.replay()
    for value, exact in zip((*captured, given[0]["state"]), (*outs, expected[0]["state"]), strict=True):
        assert torch.equal(value, exact)
