"""Ops on tensors of a GPU that is not the current one: they run where their tensors are, and the current one stays."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cab_kernels import (
    bidirectional_selective_scan_fn,
    bridge_mse_grouped,
    causal_conv1d_fn,
    causal_conv1d_update,
    extract_qk,
    rms_norm_fn,
    selective_scan_fn,
    selective_state_update,
)

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


def _bidirectional(u: Tensor, delta: Tensor, a_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    A = -a_log.exp()
    return bidirectional_selective_scan_fn(
        (u, u), (delta, delta), [A, A], [B, B], [C, C], [D, D], z, delta_softplus=True
    )


def _step(state: Tensor, x: Tensor, a_log: Tensor, B: Tensor, D: Tensor) -> Tensor:
    with torch.no_grad():
        return selective_state_update(state, x, x, -a_log.exp(), B, B, D, dt_softplus=True)


def _conv_step(x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return causal_conv1d_update(x, state, weight, activation="silu")


def _bridges(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, target: Tensor) -> Tensor:
    return bridge_mse_grouped([x, 2 * x], w1, b1, w2, b2, target.detach())


# The op and the sizes of what it takes.
OPS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "scan": (
        lambda u, delta, a_log, B, C, D: selective_scan_fn(u, delta, -a_log.exp(), B, C, D, delta_softplus=True),
        [(2, 24, 33), (2, 24, 33), (24, 4), (2, 4, 33), (2, 4, 33), (24,)],
    ),
    "bidirectional scan": (
        _bidirectional,
        [(2, 24, 33), (2, 24, 33), (24, 4), (2, 4, 33), (2, 4, 33), (24,), (2, 24, 33)],
    ),
    "scan step": (_step, [(2, 24, 4), (2, 24), (24, 4), (2, 4), (24,)]),
    "conv": (lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, "silu"), [(2, 24, 33), (24, 4), (24,)]),
    "conv step": (_conv_step, [(2, 24), (2, 24, 3), (24, 4)]),
    "norm": (lambda x, weight, residual: rms_norm_fn(x, weight, residual=residual), [(2, 33, 64), (64,), (2, 33, 64)]),
    "bridge": (_bridges, [(2, 33, 16), (2, 32, 16), (2, 32), (2, 64, 32), (2, 64), (2, 33, 64)]),
    "qk": (lambda qkv: torch.cat(extract_qk(qkv.detach(), num_heads=4)), [(2, 33, 192)]),
}


def results(op: Callable[..., Tensor], inputs: Sequence[Tensor], device: int) -> list[Tensor]:
    leaves = [value.clone().to(f"cuda:{device}").requires_grad_() for value in inputs]
    out = op(*leaves)
    if out.requires_grad:
        out.square().sum().backward()
    assert out.device.index == device
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("op", "sizes"), OPS.values(), ids=OPS)
def test_an_op_runs_where_its_tensors_are(op: Callable[..., Tensor], sizes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator) for size in sizes]
    first, second = (results(op, inputs, device) for device in (0, 1))
    assert torch.cuda.current_device() == 0
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.cpu(), other.cpu())
