"""The bidirectional Mamba mixer of Vision Mamba, which returns what plays key and query in it: B and C."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab.students.student import Projections
from cab_kernels import bidirectional_mamba_inner_fn

AInit = Literal["s4d", "zero"]

# A = -exp(A_log): at -20 the decay exp(delta * A) rounds to 1, and the scan starts as linear attention.
A_LOG_OF_ZERO = -20.0


class BidirectionalMamba(nn.Module):
    """Mamba over a sequence of tokens in both directions, with one input projection and one gate (Vim's "v2" block).

    Each direction has its own convolution, projections and state; the two outputs are averaged. The backward direction
    scans from the last token to the first and so keeps the tokens' order: its B and C at position t belong to token t.
    Names and shapes of the parameters are those of the published Vision Mamba, ``_b`` marks the backward direction.

    Args:
        d_model: width of the tokens.
        d_state: states of a channel, N.
        d_conv: width of the causal convolution.
        expand: channels of the scan over ``d_model``.
        a_init: "s4d" starts at A_n = -n (real S4D); "zero" at A = -exp(-20), linear attention.

    Source: Vision Mamba (arXiv:2401.09417, section 3.3); the start at A ~ 0: arXiv:2510.19266.
    """

    def __init__(
        self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2, a_init: AInit = "s4d"
    ) -> None:
        super().__init__()
        if a_init not in ("s4d", "zero"):
            raise ValueError(f"BidirectionalMamba: expected a_init 's4d' or 'zero', got {a_init!r}")
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16)
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.conv1d, self.conv1d_b = (_depthwise_conv(d_inner, d_conv) for _ in range(2))
        x_width = self.dt_rank + 2 * d_state
        self.x_proj, self.x_proj_b = (nn.Linear(d_inner, x_width, bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (_dt_projection(self.dt_rank, d_inner) for _ in range(2))
        self.A_log, self.A_b_log = (nn.Parameter(_a_log(d_inner, d_state, a_init)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(d_inner)) for _ in range(2))

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Projections, Projections]]:
        """Mix tokens.

        Args:
            hidden: (batch, length, d_model).

        Returns:
            The mixed tokens (batch, length, d_model), and B and C of the forward and of the backward direction.
        """
        out, B, C = bidirectional_mamba_inner_fn(
            self.in_proj(hidden),
            [conv.weight.squeeze(1) for conv in (self.conv1d, self.conv1d_b)],
            [conv.get_parameter("bias") for conv in (self.conv1d, self.conv1d_b)],
            [self.x_proj.weight, self.x_proj_b.weight],
            [self.dt_proj.weight, self.dt_proj_b.weight],
            [self.dt_proj.bias, self.dt_proj_b.bias],
            [self.A_log, self.A_b_log],
            [self.D, self.D_b],
        )
        return F.linear(out, self.out_proj.weight / 2), (Projections(B[0], C[0]), Projections(B[1], C[1]))


def _depthwise_conv(channels: int, width: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1)


def _a_log(d_inner: int, d_state: int, a_init: AInit) -> Tensor:
    if a_init == "zero":
        return torch.full((d_inner, d_state), A_LOG_OF_ZERO)
    return torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1)


def _dt_projection(dt_rank: int, d_inner: int, dt_min: float = 1e-3, dt_max: float = 0.1) -> nn.Linear:
    """The projection of delta: softplus of its bias starts log-uniform in [dt_min, dt_max] (arXiv:2312.00752, 3.6)."""
    projection = nn.Linear(dt_rank, d_inner)
    nn.init.uniform_(projection.weight, -(dt_rank**-0.5), dt_rank**-0.5)
    with torch.no_grad():
        dt = torch.exp(torch.empty(d_inner).uniform_(math.log(dt_min), math.log(dt_max)))
        projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return projection
