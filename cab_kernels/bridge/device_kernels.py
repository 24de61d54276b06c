"""The sigmoid, portable and as one vendor's instruction: the two are interchangeable up to their accuracy."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """Within two roundings of float32."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def sigmoid_nvidia(z):
    """Through ``tanh.approx.f32`` (sm_75 and up): a third of the instructions, off by up to 2.5e-4.

    That is a tenth of bfloat16's rounding of the result, which is what this is for.
    """
    half = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], dtype=tl.float32, is_pure=True, pack=1
    )
    return 0.5 * half + 0.5


@triton.jit
def sigmoid_like(z, NVIDIA_BF16: tl.constexpr):
    """The fast one where it is known to exist and to be accurate enough."""
    return sigmoid_nvidia(z) if NVIDIA_BF16 else sigmoid(z)
