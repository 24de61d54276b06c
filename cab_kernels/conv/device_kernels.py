"""What the convolution's kernels do with a run, see ``kernels.py``: load and store it, apply the filter, go back."""

import triton
import triton.language as tl

RUN = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x, NATIVE: tl.constexpr):
    """1 / (1 + exp(-x)) in float32, to a few units in the last place; a result below 2**-126 is zero.

    Triton's own, which other GPUs and the interpreter run, takes eleven instructions where NVIDIA's do with four; the
    backward pass takes one a step and more for the context, and would be bound by them.
    """
    if NATIVE:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [-LOG2E * x], tl.float32, True, 1)
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], tl.float32, True, 1)
    else:
        result = tl.sigmoid(x)
    return result


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
def within(index, size):
    """Whether 0 <= index < size, by one comparison."""
    return index.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def _load_run(ptr, stride_row, start, offs_dim, dim, length, other, TIME_FAST: tl.constexpr):
    """The RUN steps from ``start`` (1, runs) on, of channels ``offs_dim`` (channels, 1); ``other`` outside."""
    if TIME_FAST:
        step = start[:, :, None] + tl.arange(0, RUN)[None, None, :]
        inside = (offs_dim < dim)[:, :, None] & within(step, length)
        offset = (offs_dim.to(tl.int64) * stride_row)[:, :, None] + step
        run = _split_run(tl.load(ptr + offset, mask=inside, other=other))
    else:
        run = ()
        for j in tl.static_range(RUN):
            inside = (offs_dim < dim) & within(start + j, length)
            offset = offs_dim + start.to(tl.int64) * stride_row + j * stride_row
            run = run + (tl.load(ptr + offset, mask=inside, other=other),)
    return run


@triton.jit
def store_run(ptr, run, stride_row, start, offs_dim, dim, length, TIME_FAST: tl.constexpr):
    if TIME_FAST:
        step = start[:, :, None] + tl.arange(0, RUN)[None, None, :]
        inside = (offs_dim < dim)[:, :, None] & within(step, length)
        offset = (offs_dim.to(tl.int64) * stride_row)[:, :, None] + step
        tl.store(ptr + offset, _join_run(run).to(ptr.dtype.element_ty), mask=inside)
    else:
        for j in tl.static_range(RUN):
            inside = (offs_dim < dim) & within(start + j, length)
            offset = offs_dim + start.to(tl.int64) * stride_row + j * stride_row
            tl.store(ptr + offset, run[j].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def initial_column(step, length, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """The column of the initial states that stands for ``step``; within 0 ... WIDTH - 2 just for steps outside."""
    return length + (WIDTH - 2) - step if REVERSE else step + (WIDTH - 1)


@triton.jit
def load_x(
    x_ptr, initial_ptr, stride_row, start, offs_dim, dim, length,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, TIME_FAST: tl.constexpr,
):  # fmt: skip
    """A run of ``x`` in float32, with the initial states, or zero, where there is no ``x``."""
    loaded = _load_run(x_ptr, stride_row, start, offs_dim, dim, length, 0.0, TIME_FAST)
    run = ()
    for j in tl.static_range(RUN):
        value = loaded[j].to(tl.float32)
        if HAS_INITIAL:
            column = initial_column(start + j, length, WIDTH, REVERSE)
            inside = (offs_dim < dim) & within(column, WIDTH - 1)
            value += tl.load(initial_ptr + offs_dim.to(tl.int64) * (WIDTH - 1) + column, mask=inside, other=0.0).to(
                tl.float32
            )
        run = run + (value,)
    return run


@triton.jit
def load_around(
    x_ptr, initial_ptr, stride_row, start, offs_dim, dim, length,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, TIME_FAST: tl.constexpr,
):  # fmt: skip
    """A run of ``x`` with WIDTH - 1 steps of context on either side, in float32."""
    before = load_x(
        x_ptr, initial_ptr, stride_row, start - RUN, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST
    )
    own = load_x(x_ptr, initial_ptr, stride_row, start, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST)
    after = load_x(
        x_ptr, initial_ptr, stride_row, start + RUN, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST
    )
    return before[RUN - (WIDTH - 1) :] + own + after[: WIDTH - 1]


@triton.jit
def load_filter(weight_ptr, bias_ptr, offs_dim, dim, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
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
def load_seq_idx(seq_idx_ptr, start, length):
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
def convolve(
    x, seq, weight, bias, i: tl.constexpr,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
):  # fmt: skip
    pre = bias
    for tap in tl.static_range(WIDTH):
        pre = weight[tap] * _seen(x, seq, i, tap, WIDTH, REVERSE, HAS_SEQ_IDX) + pre
    return pre


@triton.jit
def position(dim, groups, BLOCK_DIM: tl.constexpr):
    """This program's sequence, its channels (BLOCK_DIM, 1), and its number among the programs along time."""
    pid = tl.program_id(0)
    blocks_dim = tl.cdiv(dim, BLOCK_DIM)
    offs_dim = (pid % blocks_dim) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[:, None]
    pid_sequence = pid // blocks_dim
    return (pid_sequence // groups).to(tl.int64), offs_dim, pid_sequence % groups


@triton.jit
def multiple(size, ALIGN: tl.constexpr):
    """The size, which the launcher knows to be a multiple of ALIGN, in a form that tells the compiler so."""
    return size // ALIGN * ALIGN


@triton.jit
def load_dout(
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
def pre_gradients(
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
            pre = convolve(x, seq, weight, bias, i, WIDTH, REVERSE, HAS_SEQ_IDX)
            gate = sigmoid(pre, NATIVE)
            grad = grad * (gate * (1.0 + pre * (1.0 - gate)))
        dpre = dpre + (grad,)
    return dpre


@triton.jit
def x_gradient(
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
def filter_gradients(
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
def store_filter(partial_ptr, dfilter, offs_dim, dim, WIDTH: tl.constexpr):
    for tap in tl.static_range(WIDTH + 1):
        total = tl.sum(dfilter[tap], axis=1, keep_dims=True)
        tl.store(partial_ptr + tap * dim + offs_dim, total, mask=offs_dim < dim)
