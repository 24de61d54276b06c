"""A Mamba block between its projections against the block spelled out: on a GPU, or through the interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scan_cases import naive_scan
from torch import Tensor

from cab_kernels import _backend, mamba_inner_fn, mamba_inner_ref

FIXED = ("mask", "cu_seqlens", "norm_eps")  # what has no gradient


def make_inputs(
    batch: int = 2,
    length: int = 9,
    dim: int = 6,
    dstate: int = 3,
    rank: int = 2,
    *,
    bias: bool = True,
    padding: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **fixed: object,
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "xz": (batch, length, 2 * dim),
        "conv_weight": (dim, 4),
        "conv_bias": (dim,),
        "x_proj": (rank + 2 * dstate, dim),
        "dt_proj": (dim, rank),
        "dt_bias": (dim,),
        "A_log": (dim, dstate),
        "D": (dim,),
    }
    inputs: dict[str, object] = {
        name: (0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    if not bias:
        inputs["conv_bias"] = None
    if padding:
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        mask[-1, :2] = 0
        inputs["mask"] = mask
    if "cu_seqlens" in fixed:
        fixed["cu_seqlens"] = torch.tensor(fixed["cu_seqlens"], dtype=torch.int32, device=device)
    return inputs | fixed


def spelled_out(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, norm_eps=None, mask=None, **packed):
    x, z = xz.mT.chunk(2, dim=1)
    bounds = packed["cu_seqlens"].tolist() if packed else [0, x.shape[2]]
    pieces = [x[..., start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    taps = conv_weight.unsqueeze(1)
    u = [
        F.conv1d(F.pad(piece, (3, 0)), taps, conv_bias, groups=len(taps)) if piece.numel() else piece
        for piece in pieces
    ]
    u = F.silu(torch.cat(u, dim=-1))
    u = u if mask is None else u * mask.unsqueeze(1)
    parts = torch.einsum("pd,bdl->bpl", x_proj, u).split([dt_proj.shape[1], *[A_log.shape[1]] * 2], dim=1)
    if norm_eps is not None:
        parts = [part / (part.square().mean(1, keepdim=True) + norm_eps).sqrt() for part in parts]
    delta, B, C = torch.einsum("dr,brl->bdl", dt_proj, parts[0]), *parts[1:]
    out, _ = naive_scan(u, delta, -A_log.exp(), B, C, D, z, dt_bias, True, **packed)
    return out.mT, B.mT, C.mT


def results_and_gradients(block: Callable, inputs: dict, weights: tuple[float, ...] = (1, 1, 1)) -> dict[str, Tensor]:
    """out, B, C and all gradients, for directions that do not depend on ``block``."""
    results = dict(zip(("out", "B", "C"), block(**inputs), strict=True))
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for weight, result in zip(weights, results.values(), strict=True):
        direction = torch.randn(result.shape, generator=generator).to(result.device, result.dtype)
        loss = loss + (weight * result * direction).sum() if weight else loss
    wanted = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, Tensor) and tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return results | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def in_double(inputs: dict) -> dict:
    return {
        name: value.detach().double().requires_grad_() if isinstance(value, Tensor) and name not in FIXED else value
        for name, value in inputs.items()
    }


def triton_block(**inputs: object) -> tuple[Tensor, Tensor, Tensor]:
    pytest.importorskip("triton")
    return mamba_inner_fn(**inputs, backend="triton")


# Odd sizes; a step; more than a block of channels, and a model's states; each option; nothing.
CASES = {
    "odd": {},
    "one-step": {"length": 1},
    "one-channel": {"dim": 1},
    "model": {"batch": 1, "length": 10, "dim": 19, "dstate": 16},
    "no-bias": {"bias": False},
    "normed": {"norm_eps": 1e-3},
    "padded": {"padding": True, "norm_eps": 1e-3},
    "packed": {"batch": 1, "length": 11, "cu_seqlens": [0, 3, 3, 4, 11]},
    "no-steps": {"length": 0},
    "no-batch": {"batch": 0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_definition_is_the_block_spelled_out(options):
    inputs = make_inputs(**options)
    got, exact = (results_and_gradients(block, inputs) for block in (mamba_inner_fn, spelled_out))
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kernels_match_the_definition(options, device):
    """Within twice the error of the definition in float32, plus a rounding."""
    inputs = make_inputs(**options, dtype=torch.float32, device=device)
    exact = results_and_gradients(mamba_inner_ref, in_double(inputs))
    peer, got = (results_and_gradients(block, inputs) for block in (mamba_inner_ref, triton_block))
    assert all(got[name].is_contiguous() for name in ("out", "dxz"))  # as the products beside the block want them
    for name, value in exact.items():
        assert (got[name].dtype, got[name].shape) == (peer[name].dtype, value.shape), name
        if value.numel():
            budget = 2 * (peer[name] - value).abs().max() + 4 * torch.finfo(torch.float32).eps * value.abs().max()
            assert (got[name] - value).abs().max() <= budget, name


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0)], ids=["out", "B"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_each_result_has_its_gradient_alone(backend, weights, device):
    inputs = make_inputs(dtype=torch.float32, device=device)
    block = triton_block if backend == "triton" else mamba_inner_ref
    got, exact = (results_and_gradients(way, inputs, weights) for way in (block, spelled_out))
    for name in ("xz", "conv_weight", "conv_bias", "x_proj"):
        assert exact[f"d{name}"].any(), name
    for name, value in exact.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_keeps_neither_u_nor_delta(device):
    inputs, kept = make_inputs(dtype=torch.float32, device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        triton_block(**inputs)
    activations = [tuple(tensor.shape) for tensor in kept if tensor.shape[:2] == (2, 9)]
    assert activations == [(2, 9, 12), (2, 9, 8)]  # xz, and dt, B and C


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_changes_nothing(backend, device):
    inputs = make_inputs(length=2, dtype=torch.float32, device=device)
    block = triton_block if backend == "triton" else mamba_inner_ref

    def in_autocast(**inputs: object) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            return block(**inputs)

    expected, got = (results_and_gradients(way, inputs) for way in (block, in_autocast))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_once_differentiable(device):
    inputs = make_inputs(length=1, dtype=torch.float32, device=device)
    (gradient,) = torch.autograd.grad(triton_block(**inputs)[0].square().sum(), inputs["xz"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiles_in_one_graph(device, monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: not torch.cuda.is_available())  # reads what dynamo cannot

    def loss(xz: Tensor, *parameters: Tensor) -> Tensor:
        out, B, C = mamba_inner_fn(xz, *parameters, backend="triton")
        return out.square().sum() + B.sum() + C.square().sum()

    pytest.importorskip("triton")
    arguments = list(make_inputs(length=2, dtype=torch.float32, device=device).values())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(*(torch.autograd.grad(f(*arguments), arguments) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(traced, eager)


def test_the_ops_keep_the_rules_of_torch_library(device):
    pytest.importorskip("triton")
    from cab_kernels.inner.kernels import mamba_inner, mamba_inner_backward

    inputs = make_inputs(length=2, dtype=torch.float32, device=device)
    tensors = [tensor.detach() for tensor in inputs.values()]
    torch.library.opcheck(mamba_inner, (*tensors, None, None, 1e-3, 32))
    out, projected, states = mamba_inner(*tensors, None, None, 1e-3, 32)
    dB = torch.ones(2, 2, 3, device=device)
    torch.library.opcheck(mamba_inner_backward, (out, dB, None, *tensors, None, None, projected, states, 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
def test_half_precision_products_with_parameters_in_float32(dtype):
    """As autocast leaves them: activations of two bytes, every gradient in its input's dtype."""
    inputs = make_inputs(length=300, dim=64, dstate=16, rank=8, dtype=torch.float32, device="cuda")
    inputs["xz"] = inputs["xz"].detach().to(dtype).requires_grad_()
    exact = results_and_gradients(mamba_inner_ref, in_double(inputs))
    got = results_and_gradients(triton_block, inputs)
    for name, value in exact.items():
        assert got[name].dtype == (dtype if name in ("out", "B", "C", "dxz") else torch.float32), name
        error = (got[name] - value).norm() / value.norm()
        assert error <= 8 * torch.finfo(dtype).eps, (name, error)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"xz": torch.zeros(2, 9, 11)}, "mamba_inner_fn: expected xz of an even number of channels, got 11"),
        ({"x_proj": torch.zeros(9, 6)}, "expected x_proj with rank [+] 2 dstate = 8 rows, got 9"),
        ({"D": torch.zeros(7)}, r"expected D of shape \(dim\) = \(6,\), got \(7,\)"),
        ({"mask": torch.ones(2, 8)}, r"expected mask of shape \(batch, length\) = \(2, 9\), got \(2, 8\)"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "expected batch 1 with cu_seqlens, got 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changed, message):
    inputs = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn(**inputs | changed)


def test_reference_runs_where_no_gpu_is(monkeypatch):
    monkeypatch.setattr(_backend, "_HAS_TRITON", False)
    inputs = make_inputs()
    assert torch.equal(mamba_inner_fn(**inputs)[0], mamba_inner_ref(**inputs)[0])
    with pytest.raises(ImportError, match="mamba_inner_fn: expected Triton"):
        mamba_inner_fn(**inputs, backend="triton")
