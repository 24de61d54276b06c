"""Layer norm of frozen models: the definition against PyTorch's own, the kernel against the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels import frozen_layer_norm_fn, frozen_layer_norm_ref


def make_inputs(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """x, whose mean is far from 0, weight and bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) + 3
    return [x.to(device, dtype), *(torch.randn(shape[-1:], generator=generator).to(device) for _ in range(2))]


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 33), (0, 7)], ids=str)
def test_definition_is_pytorchs(shape):
    x, weight, bias = (tensor.double() for tensor in make_inputs(*shape))
    torch.testing.assert_close(
        frozen_layer_norm_ref(x, weight, bias, 1e-3), F.layer_norm(x, shape[-1:], weight, bias, 1e-3)
    )
    torch.testing.assert_close(frozen_layer_norm_ref(x, weight), F.layer_norm(x, shape[-1:], weight))


# One number; one row; an odd width over several tiles; a power of two; rows of one number; none.
SHAPES = [(1,), (3,), (5, 13, 33), (2, 64), (7, 1), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_matches_definition(shape, with_bias, device):
    pytest.importorskip("triton")
    x, weight, bias = make_inputs(*shape, device=device)
    bias = bias if with_bias else None
    gold = frozen_layer_norm_ref(x.double(), weight.double(), None if bias is None else bias.double(), 1e-3)
    got, definition = (frozen_layer_norm_fn(x, weight, bias, 1e-3, backend=way) for way in ("triton", "reference"))
    error, allowed = ((one.double() - gold).norm().item() for one in (got, definition))
    assert error <= 2 * allowed + torch.finfo(x.dtype).eps * gold.norm().item()


def test_strides_and_dtypes(device):
    pytest.importorskip("triton")
    x, weight, bias = make_inputs(6, 4, 33, device=device)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(*(frozen_layer_norm_fn(one, weight, bias, backend="triton") for one in (x, turned)))
    for backend in ("triton", "reference"):
        assert frozen_layer_norm_fn(x.half(), weight, bias, backend=backend).dtype == torch.float16
        with torch.autocast(device, torch.float16):
            got = frozen_layer_norm_fn(x, weight, bias, backend=backend)
        assert torch.equal(got, frozen_layer_norm_fn(x, weight, bias, backend=backend).half())


def test_refuses_a_gradient_and_a_long_row():
    x, weight, bias = make_inputs(2, 5)
    message = "^frozen_layer_norm_fn: expected no_grad or frozen tensors, got one that wants a gradient$"
    with pytest.raises(RuntimeError, match=message):
        frozen_layer_norm_fn(x.requires_grad_(), weight, bias)
    with torch.no_grad():
        frozen_layer_norm_fn(x, weight, bias)
    with pytest.raises(ValueError, match=r"expected weight of shape \(width\) = \(5,\), got \(4,\)"):
        frozen_layer_norm_fn(x.detach(), torch.ones(4))
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(ValueError, match="expected x of width at most 8192 for backend 'triton', got 8193"):
        frozen_layer_norm_fn(torch.ones(1, 8193, device=device), torch.ones(8193, device=device), backend="triton")


def test_compiles_for_sm_80_90_and_100(compile_offline):
    pytest.importorskip("triton")
    spec = {
        "module": "cab_kernels.norm.layer_kernels",
        "kernel": "_layer_norm_kernel",
        "signature": {"x_ptr": "*fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
        | {"rows": "i32", "width": "i32", "eps": "fp32"},
        "constexprs": {"BLOCK_ROWS": 8, "BLOCK_WIDTH": 256},
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }
    assert len(compile_offline([spec]).splitlines()) == 3
