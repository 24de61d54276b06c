"""The sigmoid in the instructions of NVIDIA GPUs, and its portable twin, which other GPUs and the interpreter run.

Triton's own is right as well, at eleven instructions where four do; the backward pass takes one a step and more for
the context, and would be bound by them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x, NATIVE: tl.constexpr):
    """1 / (1 + exp(-x)) in float32, to a few units in the last place; a result below 2**-126 is zero."""
    if NATIVE:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [-LOG2E * x], tl.float32, True, 1)
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], tl.float32, True, 1)
    else:
        result = tl.sigmoid(x)
    return result
