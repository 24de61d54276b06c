"""Inputs, options, a loop to compare with and the error budget that the tests of the selective scan share."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels import selective_scan_ref

CONSTANT, PLAIN, GROUPED = "constant", "plain", "grouped"
ALL = ("D", "z", "delta_bias", "initial_state")

# (arguments of make_inputs, options of the scan). Every option is on and off at least once, and so is each kind of B
# and of C; lengths lie around the definition's chunks; the last ones exceed two of any block a kernel would use.
CASES: dict[str, tuple[dict, dict]] = {
    "all": ({"optional": ALL}, {"delta_softplus": True}),
    "bare": ({"optional": ()}, {}),
    "reverse": ({"length": 10, "optional": ALL}, {"delta_softplus": True, "reverse": True}),
    "constant-B": ({"B": CONSTANT, "optional": ("initial_state",)}, {"delta_softplus": True}),
    "constant-C-grouped-B": ({"B": GROUPED, "C": CONSTANT}, {"reverse": True}),
    "constant-both": ({"B": CONSTANT, "C": CONSTANT, "optional": ("z",)}, {"delta_softplus": True}),
    "grouped": ({"B": GROUPED, "C": GROUPED, "optional": ALL}, {"delta_softplus": True}),
    "one-step": ({"length": 1, "optional": ALL}, {"delta_softplus": True, "reverse": True}),
    "size-one-axes": ({"batch": 1, "dim": 1, "dstate": 1, "length": 5}, {}),
    "no-steps": ({"length": 0, "optional": ALL}, {"delta_softplus": True}),
    "no-batch": ({"batch": 0, "optional": ALL}, {"delta_softplus": True}),
    "packed": (
        {"batch": 1, "length": 11, "B": GROUPED, "C": CONSTANT, "optional": ALL, "sequences": 4},
        {"delta_softplus": True, "cu_seqlens": [0, 3, 3, 4, 11]},
    ),
    "packed-reverse": (
        {"batch": 1, "length": 11, "optional": ALL, "sequences": 4},
        {"delta_softplus": True, "reverse": True, "cu_seqlens": [0, 0, 6, 7, 11]},
    ),
    "many-steps": ({"batch": 1, "dim": 2, "dstate": 1, "length": 131, "optional": ()}, {"delta_softplus": True}),
    "one-state-in-words": (
        {"batch": 1, "dim": 19, "dstate": 1, "length": 24, "optional": ALL},
        {"delta_softplus": True, "reverse": True},
    ),
    "many-channels": (
        {"batch": 1, "dim": 34, "dstate": 32, "B": GROUPED, "C": GROUPED, "length": 2},
        {"delta_softplus": True},
    ),
    "many-states-and-steps": ({"batch": 1, "dim": 3, "dstate": 256, "length": 8, "optional": ALL}, {}),
    "many-states": ({"batch": 1, "dim": 5, "dstate": 256, "length": 2, "optional": ALL}, {}),
}


def make_inputs(
    batch: int = 2,
    dim: int = 6,
    length: int = 7,
    dstate: int = 3,
    *,
    B: str = PLAIN,
    C: str = PLAIN,
    optional: tuple[str, ...] = ("D", "z", "delta_bias"),
    sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs by name, all requiring gradients, A in float32 at least; ``sequences`` sizes a packed initial state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def projection(kind: str) -> Tensor:
        shapes = {CONSTANT: (dim, dstate), PLAIN: (batch, dstate, length), GROUPED: (batch, 2, dstate, length)}
        return normal(*shapes[kind])

    inputs = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length) * 0.5,
        "A": -normal(dim, dstate).exp(),
        "B": projection(B),
        "C": projection(C),
        "D": normal(dim),
        "z": normal(batch, dim, length),
        "delta_bias": normal(dim) * 0.1,
        "initial_state": normal(batch if sequences is None else sequences, dim, dstate),
    }
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.to(device, wide if name == "A" else dtype).requires_grad_()
        for name, tensor in inputs.items()
        if name in optional or name not in ALL
    }


def cast(inputs: dict[str, Tensor], **dtypes: torch.dtype) -> dict[str, Tensor]:
    """New leaves: those named in their new dtype, all others in ``others`` if it is given."""
    others = dtypes.get("others")
    return {
        name: tensor.detach().to(dtypes.get(name, others or tensor.dtype)).requires_grad_()
        for name, tensor in inputs.items()
    }


def naive_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=True,
    *,
    initial_state=None,
    reverse=False,
    cu_seqlens=None,
    exponential=torch.exp,
):
    """The formula, one step of time at a time, differentiated by autograd."""
    batch, dim, length = u.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = u.new_zeros(batch if cu_seqlens is None else len(bounds) - 1, dim, A.shape[1])
    initial_states = [initial_state] if cu_seqlens is None else initial_state.split(1)

    def at(matrix, t):
        if matrix.dim() == 2:
            return matrix
        if matrix.dim() == 3:
            return matrix[:, None, :, t]
        return matrix[..., t].repeat_interleave(dim // matrix.shape[1], dim=1)

    y, last_states = [None] * length, []
    for h, start, end in zip(initial_states, bounds, bounds[1:], strict=False):
        for t in reversed(range(start, end)) if reverse else range(start, end):
            step = delta[:, :, t] if delta_bias is None else delta[:, :, t] + delta_bias
            step = F.softplus(step) if delta_softplus else step
            h = exponential(step[..., None] * A) * h + (step * u[:, :, t])[..., None] * at(B, t)
            y[t] = (h * at(C, t)).sum(-1)
            y[t] = y[t] if D is None else y[t] + D * u[:, :, t]
            y[t] = y[t] if z is None else y[t] * F.silu(z[:, :, t])
        last_states.append(h)
    # So that no step, too, is a step of the graph
    nothing = 0 * sum(x.sum() for x in (u, delta, A, B, C, D, z, delta_bias) if x is not None)
    return (torch.stack(y, -1) if length else u) + nothing, torch.cat(last_states)


def results_and_gradients(scan: Callable, inputs: dict[str, Tensor], options: dict, seed: int = 1) -> dict[str, Tensor]:
    """``out``, ``last_state`` and the gradients ``du``, ... for random directions that do not depend on ``scan``."""
    options = dict(options)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device=inputs["u"].device)
    results = scan(**inputs, **options, return_last_state=True)
    generator = torch.Generator().manual_seed(seed)
    # Random numbers that every dtype can hold
    directions = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), directions)
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"out": results[0], "last_state": results[1], **named}


def assert_within_budget(
    scan: Callable,
    inputs: dict[str, Tensor],
    options: dict,
    definition: Callable = selective_scan_ref,
    loop: Callable = naive_scan,
) -> None:
    """At most twice the error of the definition at the same dtypes plus one rounding, on average and at the worst.

    The definition's relative error is the largest among its results of one dtype: a small tensor may be right by luck.
    On a GPU it is also that of a float64 loop whose exponentials come from the hardware's instruction, as those of
    mamba_ssm's CUDA kernels do: where little is forgotten, its errors, alike from step to step, add up.
    """
    wide = cast(inputs, others=torch.float64)
    gold = results_and_gradients(definition, wide, options)
    got = results_and_gradients(scan, inputs, options)
    yardsticks = [results_and_gradients(definition, inputs, options)]
    dtypes = {name: result.dtype for name, result in yardsticks[0].items()}
    if next(iter(inputs.values())).is_cuda:
        from hardware import hardware_exp

        yardsticks.append(results_and_gradients(partial(loop, exponential=hardware_exp), wide, options))
    for order in (2, float("inf")):

        def norm(tensor: Tensor, order: float = order) -> float:
            return torch.linalg.vector_norm(tensor.detach().double(), order).item() if tensor.numel() else 0.0

        scale = {name: norm(exact) or 1.0 for name, exact in gold.items()}
        budget = {dtype: torch.finfo(dtype).eps for dtype in dtypes.values()}
        for name, dtype in dtypes.items():
            error = max(norm(results[name] - gold[name]) for results in yardsticks) / scale[name]
            budget[dtype] = max(budget[dtype], 2 * error + torch.finfo(dtype).eps)
        for name, dtype in dtypes.items():
            assert (got[name].dtype, got[name].shape) == (dtype, gold[name].shape), name
            error = norm(got[name] - gold[name]) / scale[name]
            assert error <= budget[dtype], (
                f"{name}: relative error {error:.3g} in norm {order}, over {budget[dtype]:.3g}"
            )
