"""Causal depthwise convolution with SiLU in Triton.

    pre[t]       = bias + sum_tap weight[tap] x[t - (width - 1) + tap]              out = silu(pre)
    dpre         = dout silu'(pre)
    dx[t]        = sum_tap weight[tap] dpre[t + (width - 1) - tap]
    dweight[tap] = sum over batch, t of dpre[t] x[t - (width - 1) + tap]            dbias = sum over batch, t of dpre[t]

With REVERSE every shift in time changes its sign: tap and width - 1 - tap change places, before and after change
places, and nothing else happens.

A *run* is RUN = 8 consecutive steps of one channel, held by one thread as a tuple of 8 tensors over the program's
(BLOCK_DIM, BLOCK_RUNS) channels and runs. A shift in time is then another index into the tuple and costs nothing. The
neighbouring steps that the filter reaches, a run's *context*, are read too; another thread of the program reads them as
its own, so they come from the cache. The two memory layouts differ in how a run is read and written, nowhere else:

* time contiguous, (batch, dim, length): 8 steps of bfloat16 are one 16-byte vector, taken apart in registers;
* channels contiguous, (batch, length, dim): 8 rows, along each of which neighbouring threads own neighbouring channels.

Forward: a program owns BLOCK_DIM channels and BLOCK_RUNS runs of one sequence. It reads its runs of ``x`` and the
context before them, and writes its runs of ``out``.

Backward: a program owns BLOCK_DIM channels and ``blocks`` x BLOCK_RUNS runs of one sequence. It reads ``x`` with
context on both sides and ``dout`` with the context after, recomputes ``pre``, and writes its runs of ``dx`` and one
row of ``partial``, (programs, width + 1, dim) in float32: its share of dweight and dbias. A second kernel adds the rows
in a fixed order, so two runs give the same bits. Only the inputs are kept between the two passes.

Sizes and strides are run-time values. What divides them, up to a run, is a constant (ALIGN), without which no load
would be a vector; so a new length compiles nothing, unless it is the first odd one, say, or the first short one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cab_kernels._backend import interpreting
from cab_kernels.conv.device_kernels import sigmoid

RUN = tl.constexpr(8)
# The context must fit into one neighbouring run.
MAX_WIDTH = RUN.value + 1


@triton.jit
def _split_run(vectors):
    """Take (channels, runs, RUN) apart into RUN tensors (channels, runs)."""
    halves = tl.reshape(vectors, [vectors.shape[0], vectors.shape[1], 2, 2, 2])
    even, odd = tl.split(halves)
    step04, step26 = tl.split(even)
    step15, step37 = tl.split(odd)
    step0, step4 = tl.split(step04)
    step2, step6 = tl.split(step26)
    step1, step5 = tl.split(step15)
    step3, step7 = tl.split(step37)
    return (step0, step1, step2, step3, step4, step5, step6, step7)


@triton.jit
def _join_run(run):
    """Undo :func:`_split_run`."""
    even = tl.join(tl.join(run[0], run[4]), tl.join(run[2], run[6]))
    odd = tl.join(tl.join(run[1], run[5]), tl.join(run[3], run[7]))
    vectors = tl.join(even, odd)
    return tl.reshape(vectors, [vectors.shape[0], vectors.shape[1], RUN])


@triton.jit
def _within(index, size):
    """Whether 0 <= index < size, by one comparison."""
    return index.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def _load_run(ptr, stride_row, start, offs_dim, dim, length, other, TIME_FAST: tl.constexpr):
    """The RUN steps from ``start`` (1, runs) on, of channels ``offs_dim`` (channels, 1); ``other`` outside."""
    if TIME_FAST:
        step = start[:, :, None] + tl.arange(0, RUN)[None, None, :]
        inside = (offs_dim < dim)[:, :, None] & _within(step, length)
        offset = (offs_dim.to(tl.int64) * stride_row)[:, :, None] + step
        run = _split_run(tl.load(ptr + offset, mask=inside, other=other))
    else:
        run = ()
        for j in tl.static_range(RUN):
            inside = (offs_dim < dim) & _within(start + j, length)
            offset = offs_dim + start.to(tl.int64) * stride_row + j * stride_row
            run = run + (tl.load(ptr + offset, mask=inside, other=other),)
    return run


@triton.jit
def _store_run(ptr, run, stride_row, start, offs_dim, dim, length, TIME_FAST: tl.constexpr):
    if TIME_FAST:
        step = start[:, :, None] + tl.arange(0, RUN)[None, None, :]
        inside = (offs_dim < dim)[:, :, None] & _within(step, length)
        offset = (offs_dim.to(tl.int64) * stride_row)[:, :, None] + step
        tl.store(ptr + offset, _join_run(run).to(ptr.dtype.element_ty), mask=inside)
    else:
        for j in tl.static_range(RUN):
            inside = (offs_dim < dim) & _within(start + j, length)
            offset = offs_dim + start.to(tl.int64) * stride_row + j * stride_row
            tl.store(ptr + offset, run[j].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _initial_column(step, length, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """The column of the initial states that stands for ``step``; within 0 ... WIDTH - 2 just for steps outside."""
    return length + (WIDTH - 2) - step if REVERSE else step + (WIDTH - 1)


@triton.jit
def _load_x(
    x_ptr, initial_ptr, stride_row, start, offs_dim, dim, length,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, TIME_FAST: tl.constexpr,
):  # fmt: skip
    """A run of ``x`` in float32, with the initial states, or zero, where there is no ``x``."""
    loaded = _load_run(x_ptr, stride_row, start, offs_dim, dim, length, 0.0, TIME_FAST)
    run = ()
    for j in tl.static_range(RUN):
        value = loaded[j].to(tl.float32)
        if HAS_INITIAL:
            column = _initial_column(start + j, length, WIDTH, REVERSE)
            inside = (offs_dim < dim) & _within(column, WIDTH - 1)
            value += tl.load(initial_ptr + offs_dim.to(tl.int64) * (WIDTH - 1) + column, mask=inside, other=0.0).to(
                tl.float32
            )
        run = run + (value,)
    return run


@triton.jit
def _load_filter(weight_ptr, bias_ptr, offs_dim, dim, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    weight = ()
    for tap in tl.static_range(WIDTH):
        value = tl.load(weight_ptr + offs_dim.to(tl.int64) * WIDTH + tap, mask=offs_dim < dim, other=0.0)
        weight = weight + (value.to(tl.float32),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_dim, mask=offs_dim < dim, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros_like(weight[0])
    return weight, bias


@triton.jit
def _load_seq_idx(seq_idx_ptr, start, length):
    """The sequences of the 3 RUN steps around each run, (1, runs) each; -1 outside."""
    one_row = tl.zeros([1, 1], tl.int32)
    before = _load_run(seq_idx_ptr, 1, start - RUN, one_row, 1, length, -1, False)
    own = _load_run(seq_idx_ptr, 1, start, one_row, 1, length, -1, False)
    after = _load_run(seq_idx_ptr, 1, start + RUN, one_row, 1, length, -1, False)
    return before + own + after


@triton.jit
def _seen(
    x, seq, i: tl.constexpr, tap: tl.constexpr,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
):  # fmt: skip
    """What ``tap`` sees from the i-th step whose filter lies within ``x``: zero in another sequence than its own."""
    value = x[i + (WIDTH - 1 - tap if REVERSE else tap)]
    if HAS_SEQ_IDX:
        same = seq[i + (WIDTH - 1 - tap if REVERSE else tap)] == seq[i + (0 if REVERSE else WIDTH - 1)]
        value = tl.where(same, value, 0.0)
    return value


@triton.jit
def _convolve(
    x, seq, weight, bias, i: tl.constexpr,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
):  # fmt: skip
    pre = bias
    for tap in tl.static_range(WIDTH):
        pre = weight[tap] * _seen(x, seq, i, tap, WIDTH, REVERSE, HAS_SEQ_IDX) + pre
    return pre


@triton.jit
def _position(dim, groups, BLOCK_DIM: tl.constexpr):
    """This program's sequence, its channels (BLOCK_DIM, 1), and its number among the programs along time."""
    pid = tl.program_id(0)
    blocks_dim = tl.cdiv(dim, BLOCK_DIM)
    offs_dim = (pid % blocks_dim) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[:, None]
    pid_sequence = pid // blocks_dim
    return (pid_sequence // groups).to(tl.int64), offs_dim, pid_sequence % groups


@triton.jit
def _multiple(size, ALIGN: tl.constexpr):
    """The size, which the launcher knows to be a multiple of ALIGN, in a form that tells the compiler so."""
    return size // ALIGN * ALIGN


@triton.jit(
    do_not_specialize=[
        "dim", "length", "groups", "stride_x_batch", "stride_x_row", "stride_out_batch", "stride_out_row",
    ]
)  # fmt: skip
def _causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_idx_ptr, out_ptr,
    dim, length, groups, stride_x_batch, stride_x_row, stride_out_batch, stride_out_row,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr,
    TIME_FAST: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    pid_batch, offs_dim, pid_time = _position(dim, groups, BLOCK_DIM)
    dim, length = _multiple(dim, 1 if TIME_FAST else ALIGN), _multiple(length, ALIGN if TIME_FAST else 1)
    stride_x_row = _multiple(stride_x_row, ALIGN).to(tl.int64)
    stride_out_row = _multiple(stride_out_row, ALIGN).to(tl.int64)
    x_ptr += pid_batch * _multiple(stride_x_batch, ALIGN)
    out_ptr += pid_batch * _multiple(stride_out_batch, ALIGN)
    if HAS_INITIAL:
        initial_ptr += pid_batch * dim * (WIDTH - 1)
    weight, bias = _load_filter(weight_ptr, bias_ptr, offs_dim, dim, WIDTH, HAS_BIAS)
    start = (pid_time * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :]) * RUN

    own = _load_x(
        x_ptr, initial_ptr, stride_x_row, start, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST
    )
    near = _load_x(
        x_ptr, initial_ptr, stride_x_row, start + RUN if REVERSE else start - RUN, offs_dim, dim, length,
        WIDTH, REVERSE, HAS_INITIAL, TIME_FAST,
    )  # fmt: skip
    x = own + near[: WIDTH - 1] if REVERSE else near[RUN - (WIDTH - 1) :] + own
    seq = ()
    if HAS_SEQ_IDX:
        seq = _load_seq_idx(seq_idx_ptr + pid_batch * length, start, length)
        seq = seq[RUN : 2 * RUN + WIDTH - 1] if REVERSE else seq[RUN - (WIDTH - 1) : 2 * RUN]

    out = ()
    for i in tl.static_range(RUN):
        value = _convolve(x, seq, weight, bias, i, WIDTH, REVERSE, HAS_SEQ_IDX)
        if SILU:
            value = value * sigmoid(value, NATIVE)
        if HAS_SEQ_IDX:
            value = tl.where(seq[i + (0 if REVERSE else WIDTH - 1)] >= 0, value, 0.0)
        out = out + (value,)
    _store_run(out_ptr, out, stride_out_row, start, offs_dim, dim, length, TIME_FAST)


@triton.jit
def _load_dout(
    dout_ptr, stride_row, start, offs_dim, dim, length,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, TIME_FAST: tl.constexpr,
):  # fmt: skip
    """A run of ``dout`` and what follows it; entry i is the step beside x[i] with REVERSE, else x[i + WIDTH - 1]."""
    own = _load_run(dout_ptr, stride_row, start, offs_dim, dim, length, 0.0, TIME_FAST)
    near = _load_run(
        dout_ptr, stride_row, start - RUN if REVERSE else start + RUN, offs_dim, dim, length, 0.0, TIME_FAST
    )
    return near[RUN - (WIDTH - 1) :] + own if REVERSE else own + near[: WIDTH - 1]


@triton.jit
def _pre_gradients(
    dout, x, seq, weight, bias,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, SILU: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """``dpre``, entry by entry of ``dout``; ``x`` has context on both sides."""
    dpre = ()
    for i in tl.static_range(RUN + WIDTH - 1):
        grad = dout[i].to(tl.float32)
        if HAS_SEQ_IDX:
            grad = tl.where(seq[i + (0 if REVERSE else WIDTH - 1)] >= 0, grad, 0.0)
        if SILU:
            pre = _convolve(x, seq, weight, bias, i, WIDTH, REVERSE, HAS_SEQ_IDX)
            gate = sigmoid(pre, NATIVE)
            grad = grad * (gate * (1.0 + pre * (1.0 - gate)))
        dpre = dpre + (grad,)
    return dpre


@triton.jit
def _x_gradient(
    value, dpre, seq, weight, i: tl.constexpr,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
):  # fmt: skip
    """``value`` plus the i-th step of ``dx``."""
    for tap in tl.static_range(WIDTH):
        grad = dpre[i + (tap if REVERSE else WIDTH - 1 - tap)]
        if HAS_SEQ_IDX:
            same = seq[i + (tap if REVERSE else 2 * (WIDTH - 1) - tap)] == seq[i + WIDTH - 1]
            grad = tl.where(same, grad, 0.0)
        value = weight[tap] * grad + value
    return value


@triton.jit
def _filter_gradients(
    dfilter, dpre, x, seq, WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_SEQ_IDX: tl.constexpr
):  # fmt: skip
    """``dfilter``, the sums for each tap and the bias, plus those of a run."""
    sums = ()
    for tap in tl.static_range(WIDTH):
        value = dfilter[tap]
        for i in tl.static_range(WIDTH - 1 if REVERSE else 0, RUN + (WIDTH - 1 if REVERSE else 0)):
            value = dpre[i] * _seen(x, seq, i, tap, WIDTH, REVERSE, HAS_SEQ_IDX) + value
        sums = sums + (value,)
    value = dfilter[WIDTH]
    for i in tl.static_range(WIDTH - 1 if REVERSE else 0, RUN + (WIDTH - 1 if REVERSE else 0)):
        value += dpre[i]
    return sums + (value,)


@triton.jit
def _store_filter(partial_ptr, dfilter, offs_dim, dim, WIDTH: tl.constexpr):
    for tap in tl.static_range(WIDTH + 1):
        total = tl.sum(dfilter[tap], axis=1, keep_dims=True)
        tl.store(partial_ptr + tap * dim + offs_dim, total, mask=offs_dim < dim)


@triton.jit(
    do_not_specialize=[
        "dim", "length", "groups", "blocks", "stride_x_batch", "stride_x_row", "stride_dout_batch", "stride_dout_row",
        "stride_dx_batch", "stride_dx_row",
    ]
)  # fmt: skip
def _causal_conv1d_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_idx_ptr, dout_ptr, dx_ptr, dinitial_ptr, partial_ptr,
    dim, length, groups, blocks,
    stride_x_batch, stride_x_row, stride_dout_batch, stride_dout_row, stride_dx_batch, stride_dx_row,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DWEIGHT: tl.constexpr,
    TIME_FAST: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    pid_batch, offs_dim, pid_time = _position(dim, groups, BLOCK_DIM)
    partial_ptr += (pid_batch * groups + pid_time) * (WIDTH + 1) * dim
    dim, length = _multiple(dim, 1 if TIME_FAST else ALIGN), _multiple(length, ALIGN if TIME_FAST else 1)
    stride_x_row = _multiple(stride_x_row, ALIGN).to(tl.int64)
    stride_dout_row = _multiple(stride_dout_row, ALIGN).to(tl.int64)
    stride_dx_row = _multiple(stride_dx_row, ALIGN).to(tl.int64)
    x_ptr += pid_batch * _multiple(stride_x_batch, ALIGN)
    dout_ptr += pid_batch * _multiple(stride_dout_batch, ALIGN)
    dx_ptr += pid_batch * _multiple(stride_dx_batch, ALIGN)
    if HAS_INITIAL:
        initial_ptr += pid_batch * dim * (WIDTH - 1)
        dinitial_ptr += pid_batch * dim * (WIDTH - 1)
    weight, bias = _load_filter(weight_ptr, bias_ptr, offs_dim, dim, WIDTH, HAS_BIAS)
    dfilter = ()
    for _ in tl.static_range(WIDTH + 1):
        dfilter = dfilter + (tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32),)

    # The initial states are the last steps of the run before the first one.
    origin = -RUN if HAS_INITIAL and not REVERSE else 0
    for block in range(pid_time * blocks, (pid_time + 1) * blocks):
        start = origin + (block * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :]) * RUN
        before = _load_x(
            x_ptr, initial_ptr, stride_x_row, start - RUN, offs_dim, dim, length,
            WIDTH, REVERSE, HAS_INITIAL, TIME_FAST,
        )  # fmt: skip
        own = _load_x(
            x_ptr, initial_ptr, stride_x_row, start, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST
        )
        after = _load_x(
            x_ptr, initial_ptr, stride_x_row, start + RUN, offs_dim, dim, length,
            WIDTH, REVERSE, HAS_INITIAL, TIME_FAST,
        )  # fmt: skip
        x = before[RUN - (WIDTH - 1) :] + own + after[: WIDTH - 1]
        seq = ()
        if HAS_SEQ_IDX:
            seq = _load_seq_idx(seq_idx_ptr + pid_batch * length, start, length)
            seq = seq[RUN - (WIDTH - 1) : 2 * RUN + WIDTH - 1]
        dout = _load_dout(dout_ptr, stride_dout_row, start, offs_dim, dim, length, WIDTH, REVERSE, TIME_FAST)
        dpre = _pre_gradients(dout, x, seq, weight, bias, WIDTH, REVERSE, HAS_SEQ_IDX, SILU, NATIVE)
        if NEEDS_DX:
            dx = ()
            for i in tl.static_range(RUN):
                nothing = tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32)
                dx = dx + (_x_gradient(nothing, dpre, seq, weight, i, WIDTH, REVERSE, HAS_SEQ_IDX),)
            _store_run(dx_ptr, dx, stride_dx_row, start, offs_dim, dim, length, TIME_FAST)
            if HAS_INITIAL:
                for i in tl.static_range(RUN):
                    column = _initial_column(start + i, length, WIDTH, REVERSE)
                    inside = (offs_dim < dim) & _within(column, WIDTH - 1)
                    offset = offs_dim.to(tl.int64) * (WIDTH - 1) + column
                    tl.store(dinitial_ptr + offset, dx[i].to(dinitial_ptr.dtype.element_ty), mask=inside)
        if NEEDS_DWEIGHT:
            dfilter = _filter_gradients(dfilter, dpre, x, seq, WIDTH, REVERSE, HAS_SEQ_IDX)

    if NEEDS_DWEIGHT:
        _store_filter(partial_ptr, dfilter, offs_dim, dim, WIDTH)


@triton.jit(do_not_specialize=["programs", "dim"])
def _causal_conv1d_reduce_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, programs, dim,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Add the rows of ``partial``; a program owns one tap, or the bias, of BLOCK_DIM channels."""
    tap = tl.program_id(0) % (WIDTH + 1)
    offs_dim = (tl.program_id(0) // (WIDTH + 1)) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_DIM], tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        row = first + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        offset = (row.to(tl.int64) * (WIDTH + 1) + tap) * dim + offs_dim[None, :]
        total += tl.load(partial_ptr + offset, mask=(row < programs) & (offs_dim < dim)[None, :], other=0.0)
    grad = tl.sum(total, axis=0)
    tl.store(
        dweight_ptr + offs_dim.to(tl.int64) * WIDTH + tap,
        grad.to(dweight_ptr.dtype.element_ty),
        mask=(offs_dim < dim) & (tap < WIDTH),
    )
    if HAS_BIAS:
        tl.store(dbias_ptr + offs_dim, grad.to(dbias_ptr.dtype.element_ty), mask=(offs_dim < dim) & (tap == WIDTH))


class Tiling(NamedTuple):
    """How the programs of a launch divide the work."""

    block_dim: int
    block_runs: int
    blocks: int  # of runs that a program of the backward pass takes one after another
    num_warps: int = 4


# The choices for short rows, long rows, and channels contiguous. Milliseconds forward / backward on an H100, bfloat16,
# width 4, SiLU, Triton 3.6, beside those of the other tilings tried:
#   128 x 384 x 197     short    8 x 32: 0.035 / 0.080     32 x 4: 0.039 / 0.122      32 x 1: 0.045 / 0.100
#   8 x 1536 x 2048     long     2 x 64: 0.040 / 0.067     4 x 32: 0.040 / 0.071      8 x 16: 0.043 / 0.106
#   8 x 1536 x 2048  channels   64 x 4: 0.044 / 0.082    128 x 4: 0.039 forward     128 x 2: 0.039 / 0.088
_SHORT = Tiling(8, 32, 1)
_LONG = Tiling(2, 64, 4)
_CHANNELS_FWD = Tiling(128, 4, 1)
_CHANNELS_BWD = Tiling(64, 4, 8)


def _tiling(time_fast: bool, length: int, backward: bool) -> Tiling:
    if time_fast:
        return _SHORT if length <= _SHORT.block_runs * RUN.value else _LONG
    return _CHANNELS_BWD if backward else _CHANNELS_FWD


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    """``x``, or a copy, with time or channels contiguous, and whether it is time."""
    time_fast = x.stride(1) != 1 or (x.shape[1] == 1 and x.stride(2) == 1)
    return _with_contiguous(x, time_fast), time_fast


def _with_contiguous(tensor: Tensor, time_fast: bool) -> Tensor:
    """The tensor itself if time, or else channels, are contiguous in it as asked; if not, a copy."""
    fast = 2 if time_fast else 1
    if tensor.stride(fast) == 1 or tensor.shape[fast] == 1:
        return tensor
    return tensor.contiguous() if time_fast else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def alignment(slow: int, *tensors: Tensor) -> int:
    """The most elements, up to a run, that divide the contiguous axis and the place of every row of every tensor."""
    places = [tensors[0].shape[3 - slow]]
    for tensor in tensors:
        places += [tensor.stride(axis) for axis in (0, slow) if tensor.shape[axis] > 1]
        places.append(tensor.data_ptr() // tensor.element_size())
    return math.gcd(RUN.value, *places)


def native(tensor: Tensor) -> bool:
    """Whether kernels on ``tensor`` may use the instructions of NVIDIA GPUs."""
    return tensor.is_cuda and torch.version.hip is None and not interpreting()


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """Launch the forward kernel: ``out`` is dense, with the same axis contiguous as ``x``."""
    x, time_fast = _readable(x)
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    batch, dim, length = x.shape
    slow = 1 if time_fast else 2
    tiling = _tiling(time_fast, length, backward=False)
    groups = triton.cdiv(length, RUN.value * tiling.block_runs)
    with torch.cuda.device_of(x):
        _causal_conv1d_fwd_kernel[(triton.cdiv(dim, tiling.block_dim) * batch * groups,)](
            x_ptr=x,
            weight_ptr=weight.contiguous(),
            bias_ptr=_contiguous(bias),
            initial_ptr=_contiguous(initial_states),
            seq_idx_ptr=_contiguous(seq_idx),
            out_ptr=out,
            dim=dim,
            length=length,
            groups=groups,
            stride_x_batch=x.stride(0),
            stride_x_row=x.stride(slow),
            stride_out_batch=out.stride(0),
            stride_out_row=out.stride(slow),
            WIDTH=weight.shape[1],
            HAS_BIAS=bias is not None,
            HAS_INITIAL=initial_states is not None,
            HAS_SEQ_IDX=seq_idx is not None,
            SILU=silu,
            REVERSE=reverse,
            TIME_FAST=time_fast,
            ALIGN=alignment(slow, x, out),
            NATIVE=native(x),
            BLOCK_DIM=tiling.block_dim,
            BLOCK_RUNS=tiling.block_runs,
            num_warps=tiling.num_warps,
            enable_fp_fusion=True,
        )
    return out


def causal_conv1d_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    needs_dx: bool,
    needs_dweight: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels: dx, dweight, dbias, dinitial_states, of no elements where one is not needed.

    ``needs_dx`` stands for ``x`` and ``initial_states``, ``needs_dweight`` for ``weight`` and ``bias``: the kernel
    computes each pair together. A ``dx`` that is given, with the same axis contiguous as ``x``, is written.
    """
    x, time_fast = _readable(x)
    dout = _with_contiguous(dout, time_fast)
    dx, dweight, dbias, dinitial = _empty_gradients(x, weight, bias, initial_states, needs_dx, needs_dweight, dx)
    batch, dim, length = x.shape
    width = weight.shape[1]
    slow = 1 if time_fast else 2
    tiling = _tiling(time_fast, length, backward=True)
    # Where there are initial states, the run that holds them is swept too.
    runs = triton.cdiv(length + (RUN.value if initial_states is not None else 0), RUN.value)
    blocks = max(1, min(tiling.blocks, triton.cdiv(runs, tiling.block_runs)))
    groups = triton.cdiv(runs, blocks * tiling.block_runs)
    programs = batch * groups
    partial = x.new_empty(programs if needs_dweight else 0, width + 1, dim, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if programs * dim > 0:
            _causal_conv1d_bwd_kernel[(triton.cdiv(dim, tiling.block_dim) * programs,)](
                x_ptr=x,
                weight_ptr=weight.contiguous(),
                bias_ptr=_contiguous(bias),
                initial_ptr=_contiguous(initial_states),
                seq_idx_ptr=_contiguous(seq_idx),
                dout_ptr=dout,
                dx_ptr=dx,
                dinitial_ptr=dinitial,
                partial_ptr=partial,
                dim=dim,
                length=length,
                groups=groups,
                blocks=blocks,
                stride_x_batch=x.stride(0),
                stride_x_row=x.stride(slow),
                stride_dout_batch=dout.stride(0),
                stride_dout_row=dout.stride(slow),
                stride_dx_batch=dx.stride(0) if needs_dx else 0,
                stride_dx_row=dx.stride(slow) if needs_dx else 0,
                WIDTH=width,
                HAS_BIAS=bias is not None,
                HAS_INITIAL=initial_states is not None,
                HAS_SEQ_IDX=seq_idx is not None,
                SILU=silu,
                REVERSE=reverse,
                NEEDS_DX=needs_dx,
                NEEDS_DWEIGHT=needs_dweight,
                TIME_FAST=time_fast,
                ALIGN=alignment(slow, x, dout, dx) if needs_dx else alignment(slow, x, dout),
                NATIVE=native(x),
                BLOCK_DIM=tiling.block_dim,
                BLOCK_RUNS=tiling.block_runs,
                num_warps=tiling.num_warps,
                enable_fp_fusion=True,
            )
        if needs_dweight:
            reduce_partials(partial, dweight, dbias)
    return dx, dweight, dbias, dinitial


def reduce_partials(partial: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """Add up what the programs, (programs, width + 1, dim), gave dweight and dbias, of no elements if not needed."""
    programs, taps, dim = partial.shape
    if dim > 0:
        _causal_conv1d_reduce_kernel[(taps * triton.cdiv(dim, 32),)](
            partial_ptr=partial,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            programs=programs,
            dim=dim,
            WIDTH=taps - 1,
            HAS_BIAS=dbias.numel() > 0,
            BLOCK_PROGRAMS=64,
            BLOCK_DIM=32,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _empty_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    needs_dx: bool,
    needs_dweight: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients that are needed; ``dx`` may be there already."""
    if dx is None:
        dx = torch.empty_like(_readable(x)[0]) if needs_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0)
    dbias = x.new_empty(0) if bias is None or not needs_dweight else bias.new_empty(bias.shape)
    dinitial = (
        x.new_empty(0) if initial_states is None or not needs_dx else initial_states.new_empty(initial_states.shape)
    )
    return dx, dweight, dbias, dinitial


@torch.library.custom_op("cab_kernels::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    return causal_conv1d_fwd(x, weight, bias, initial_states, seq_idx, silu, reverse)


@causal_conv1d.register_fake
def _(x, weight, bias, initial_states, seq_idx, silu, reverse):
    return torch.empty_like(_readable(x)[0])


@torch.library.custom_op("cab_kernels::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return causal_conv1d_bwd(dout, x, weight, bias, initial_states, seq_idx, silu, reverse, needs_dx, needs_dweight)


@causal_conv1d_backward.register_fake
def _(dout, x, weight, bias, initial_states, seq_idx, silu, reverse, needs_dx, needs_dweight):
    return _empty_gradients(x, weight, bias, initial_states, needs_dx, needs_dweight)


class CausalConv1d(torch.autograd.Function):
    """``causal_conv1d`` with its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.silu, ctx.reverse = arguments
        ctx.save_for_backward(*tensors)
        return causal_conv1d(*arguments)

    @staticmethod
    def backward(ctx, dout):
        needs_x, needs_weight, needs_bias, needs_initial, *_ = ctx.needs_input_grad
        dx, dweight, dbias, dinitial = causal_conv1d_backward(
            dout, *ctx.saved_tensors, ctx.silu, ctx.reverse, needs_x or needs_initial, needs_weight or needs_bias
        )
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dinitial if needs_initial else None,
            None,
            None,
            None,
        )
