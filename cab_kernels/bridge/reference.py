"""The definition of the bridge loss in plain PyTorch; also what a CPU runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def bridge_mse_ref(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    target: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
    target_mean: torch.Tensor | None = None,
    target_rstd: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of ``w2 @ silu(w1 @ x + b1) + b2`` to ``target``; see :func:`bridge_mse`.

    Everything is computed in at least float32, whatever the inputs' dtype and whatever autocast says.
    """
    target = _rows(target).detach()
    if x.dim() == 2:
        x, target = x.unsqueeze(0), target.unsqueeze(0)
    compute = torch.promote_types(torch.promote_types(x.dtype, w1.dtype), torch.float32)
    counted = mask if mask is None else mask.reshape(x.shape[:2])
    if token_index is not None:
        matched = token_index >= 0
        counted = matched.expand(x.shape[:2]) if counted is None else counted & matched
        target = target.index_select(1, token_index.clamp(min=0))
    with torch.autocast(x.device.type, enabled=False):
        target = target.to(compute)
        if target_mean is not None and target_rstd is not None:
            target = (target - target_mean.to(compute)) * target_rstd.to(compute)
        x = x.to(compute)
        if counted is not None:
            # Selected, not multiplied, and before the products: what is left out may be NaN.
            x = x.masked_fill(~counted.unsqueeze(-1), 0)
        hidden = F.silu(F.linear(x, w1.to(compute), b1.to(compute)))
        residual = F.linear(hidden, w2.to(compute), b2.to(compute)) - target
        if counted is None:
            return residual.square().sum() / max(residual.numel(), 1)
        residual = residual.masked_fill(~counted.unsqueeze(-1), 0)
        return residual.square().sum() / (counted.sum().clamp(min=1) * residual.shape[-1])


def bridge_mse_grouped_ref(
    xs: Sequence[torch.Tensor],
    w1: torch.Tensor | Sequence[torch.Tensor],
    b1: torch.Tensor | Sequence[torch.Tensor],
    w2: torch.Tensor | Sequence[torch.Tensor],
    b2: torch.Tensor | Sequence[torch.Tensor],
    target: torch.Tensor | Sequence[torch.Tensor],
    *,
    mask: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
    target_mean: torch.Tensor | None = None,
    target_rstd: torch.Tensor | None = None,
) -> torch.Tensor:
    """The losses of several bridges, one :func:`bridge_mse_ref` each; see :func:`bridge_mse_grouped`."""
    targets = [target] if isinstance(target, torch.Tensor) else list(target)
    share = len(xs) // len(targets)
    losses = []
    for i, weights in enumerate(zip(_bridges(w1), _bridges(b1), _bridges(w2), _bridges(b2), strict=True)):
        losses.append(
            bridge_mse_ref(
                xs[i],
                *weights,
                targets[i // share],
                mask=_of_bridge(mask, i, xs[i].dim() - 1),
                token_index=_of_bridge(token_index, i, 1),
                target_mean=_of_bridge(target_mean, i // share, 1),
                target_rstd=_of_bridge(target_rstd, i // share, 1),
            )
        )
    return torch.stack(losses)


def _bridges(stacks: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One weight of each bridge."""
    stacks = [stacks] if isinstance(stacks, torch.Tensor) else stacks
    # unbind, not indexing: its backward stacks once, that of an index fills a whole stack with zeros each time.
    return [weight for stack in stacks for weight in stack.unbind()]


def _rows(target: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) as (batch, length, heads * head_dim); anything else as it is."""
    return target.transpose(1, 2).flatten(2) if target.dim() == 4 else target


def _of_bridge(value: torch.Tensor | None, index: int, dim: int) -> torch.Tensor | None:
    """``value`` itself where all bridges share it (it has ``dim`` axes), else its part for one bridge."""
    return value if value is None or value.dim() == dim else value[index]
