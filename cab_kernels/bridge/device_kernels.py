"""The sigmoid, and tanh both portable and as one vendor's instruction: interchangeable up to their accuracy."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """Within two roundings of float32."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def _tanh_nvidia(u):
    """``tanh.approx.f32`` (sm_75 and up): one instruction, off by up to 5e-4.

    As (1 + tanh) / 2 that is a tenth of bfloat16's rounding of the result, which is what this is for.
    """
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh_like(u, NVIDIA_BF16: tl.constexpr):
    """tanh; the fast one where it is known to exist and to be accurate enough."""
    return _tanh_nvidia(u) if NVIDIA_BF16 else 2.0 * sigmoid(2.0 * u) - 1.0
