"""The states of the selective scan without its outputs: what splits a sequence in time, and starts backward.

Over a span of steps the state goes from ``h`` to ``decay h + part``: decay is the product of the steps' decays, part
what the span makes from zero. The gradient ``g`` of the state goes the other way, by the same decay, from what the span
hands on to ``decay g + adjoint``, adjoint being the sum over the span's steps of the decays so far times ``C_t dy_t``.
All spans are swept at once, and ``_chain_kernel`` puts their parts together, one multiply-add a span.
"""

import triton.language as tl

from cab_kernels.scan.device_kernels import (
    exponent,
    from_lane,
    jit,
    keep_touched,
    let_go,
    load_numbers,
    load_steps,
    log2_int,
    permute,
    power,
    sigmoid,
    stay_before,
    store_numbers,
    take_steps,
    touch_rows,
    touches,
)
from cab_kernels.scan.forward_kernels import (
    channels_of,
    direction_of,
    load_matrix,
    one_of,
    row_of,
    sequence_of,
    source_lane,
    states_of,
    step_size,
    store_matrix,
)


@jit
def _sweep_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, rows_ptr, z_ptr, delta_bias_ptr, dout_ptr, cu_seqlens_ptr,
    states_ptr, befores_ptr, decays_ptr, adjoints_ptr,
    strides_u, strides_delta, strides_z, strides_dout,
    length, channels, groups, dim, dstate, sequences, blocks, total_rows,
    first_block, first_channel, befores_dim, size,
    STRIDE_U: tl.constexpr, STRIDE_DELTA: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_DOUT: tl.constexpr,
    ALIGNED_U: tl.constexpr, ALIGNED_DELTA: tl.constexpr, ALIGNED_Z: tl.constexpr, ALIGNED_DOUT: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOCAL: tl.constexpr, ADJOINT: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, NT: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr,
    ORDERS: tl.constexpr, PAD: tl.constexpr,
    BOTH: tl.constexpr, SECOND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Owns a span of ``size`` steps of a block of channels of a sequence; shared out like the forward kernel.

    LOCAL: starts from zero, and writes the part and the decay of its span. Otherwise starts from the state that forward
    kept, and writes the state before each iteration to befores_ptr, (iterations, befores_dim, N), in the order that
    backward's lanes hold states in; and if ADJOINT also the span's adjoint and decay.
    """
    N: tl.constexpr = S * NT
    T: tl.constexpr = STEPS * PARTS
    WIDTH: tl.constexpr = 2 * ORDERS * N
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    TOUCHED: tl.constexpr = touches(T * 2 * N)
    pid = tl.program_id(0)
    sequence, span, first, count = sequence_of(pid // blocks, length, cu_seqlens_ptr, sequences, size)
    begin = min(span * size, count)
    end = min(begin + size, count)
    lane, base, own, edge, group = channels_of(first_block + pid % blocks, channels, S, R)
    second, skip = direction_of(group, groups, dim, BOTH, SECOND)
    mask = own < edge
    row = tl.where(mask, own - skip, 0)
    part = lane % S // R * STEPS
    limit = tl.where(mask & (lane % S < R * PARTS), end, 0)
    slot = first // size + sequence + span
    states = states_of(lane, S, NT, 1)
    A_ptr = one_of(A_ptr, second, BOTH)
    A = load_matrix(A_ptr, base - skip, edge - skip, 0, dstate, lane, states, R, NT, NATIVE)
    bias = 0.0
    if delta_bias_ptr is not None:
        bias = tl.load(one_of(delta_bias_ptr, second, BOTH) + row).to(tl.float32)
    if B_ptr is not None:
        B_constant = load_matrix(B_ptr, base, edge, 0, dstate, lane, states, R, NT, NATIVE)
    if C_ptr is not None:
        C_constant = load_matrix(C_ptr, base, edge, 0, dstate, lane, states, R, NT, NATIVE)
    zeros = ()
    ones = ()
    for _ in tl.static_range(R * NT):
        zeros = zeros + (tl.zeros([1, 32], tl.float32),)
        ones = ones + (tl.full([1, 32], 1.0, tl.float32),)
    if LOCAL:
        h = zeros
    else:
        h = load_matrix(states_ptr, base, edge, slot * dim, N, lane, states, R, NT, NATIVE)
    decay = ones
    adjoint = zeros
    elapsed = tl.zeros([1, 32], tl.float32)

    u_ptr = one_of(u_ptr, second, BOTH)
    u_row = row_of(u_ptr, strides_u, sequence, first, count, row, second, STRIDE_U, STEPS, PACKED)
    delta_ptr = one_of(delta_ptr, second, BOTH)
    delta_row = row_of(delta_ptr, strides_delta, sequence, first, count, row, second, STRIDE_DELTA, STEPS, PACKED)
    rows = rows_ptr + (group.to(tl.int64) * total_rows + first + sequence * PAD + begin) * WIDTH
    mine = lane % S * NT
    kept = tl.zeros([1, 32], tl.int32)
    if NATIVE:
        touched = touch_rows(rows, lane, T, WIDTH, N)
    next_u = load_steps(u_row, part + begin, limit, second, STRIDE_U, STEPS, ALIGNED_U, NATIVE)
    next_delta = load_steps(delta_row, part + begin, limit, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, NATIVE)
    if ADJOINT:
        dout_row = row_of(dout_ptr, strides_dout, sequence, first, count, row, second, STRIDE_DOUT, STEPS, PACKED)
        next_dout = load_steps(dout_row, part + begin, limit, second, STRIDE_DOUT, STEPS, ALIGNED_DOUT, NATIVE)
        if z_ptr is not None:
            z_row = row_of(z_ptr, strides_z, sequence, first, count, row, second, STRIDE_Z, STEPS, PACKED)
            next_z = load_steps(z_row, part + begin, limit, second, STRIDE_Z, STEPS, ALIGNED_Z, NATIVE)
    for t in range(begin, end, T):
        now = part + t
        u = take_steps(next_u, second, STRIDE_U, STEPS, ALIGNED_U, BOTH)
        x = take_steps(next_delta, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, BOTH)
        next_u = load_steps(u_row, now + T, limit, second, STRIDE_U, STEPS, ALIGNED_U, NATIVE)
        next_delta = load_steps(delta_row, now + T, limit, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, NATIVE)
        if ADJOINT:
            dout = take_steps(next_dout, second, STRIDE_DOUT, STEPS, ALIGNED_DOUT, BOTH)
            next_dout = load_steps(dout_row, now + T, limit, second, STRIDE_DOUT, STEPS, ALIGNED_DOUT, NATIVE)
            if z_ptr is not None:
                z = take_steps(next_z, second, STRIDE_Z, STEPS, ALIGNED_Z, BOTH)
                next_z = load_steps(z_row, now + T, limit, second, STRIDE_Z, STEPS, ALIGNED_Z, NATIVE)
        if NATIVE:
            kept = let_go(kept, touched, TOUCHED)
            touched = touch_rows(rows + T * WIDTH, lane, T, WIDTH, N)
            stay_before()
        dt = ()
        dtu = ()
        dy = ()
        for i in tl.static_range(STEPS):
            d = step_size(x[i], bias, now + i < limit, SOFTPLUS, NATIVE)
            dt = dt + (exponent(d, NATIVE),)
            elapsed += dt[i]
            dtu = dtu + (d * u[i],)
            if ADJOINT:
                g = dout[i]
                if z_ptr is not None:
                    g *= z[i] * sigmoid(z[i], NATIVE)
                dy = dy + (g,)
        if not LOCAL:
            before = ((first // T + sequence) + t // T) * befores_dim - first_channel
            for r in tl.static_range(R):
                channel = base + ((lane % R) ^ r)
                at = befores_ptr + (before + channel) * N + lane % S * NT
                ordered = permute(h[r * NT : (r + 1) * NT], NT, ORDERS, lane // S)
                store_numbers(at, ordered, channel < edge, NT, NATIVE)
        for k in tl.static_range(T):
            B = load_numbers(rows + (k * WIDTH + mine), NT, False, NATIVE)
            if ADJOINT:
                C = load_numbers(rows + (k * WIDTH + ORDERS * N + mine), NT, False, NATIVE)
            after = ()
            decay_after = ()
            adjoint_after = ()
            for r in tl.static_range(R):
                if B_ptr is not None:
                    B = B_constant[r * NT : (r + 1) * NT]
                if ADJOINT and C_ptr is not None:
                    C = C_constant[r * NT : (r + 1) * NT]
                if S == R and r == 0:
                    dt_r = dt[k % STEPS]
                    dtu_r = dtu[k % STEPS]
                    if ADJOINT:
                        dy_r = dy[k % STEPS]
                else:
                    source = source_lane(lane, k, r, S, R, STEPS)
                    dt_r = from_lane(dt[k % STEPS], source)
                    dtu_r = from_lane(dtu[k % STEPS], source)
                    if ADJOINT:
                        dy_r = from_lane(dy[k % STEPS], source)
                for j in tl.static_range(NT):
                    a = power(dt_r * A[r * NT + j], NATIVE)
                    after = after + (a * h[r * NT + j] + dtu_r * B[j],)
                    if ADJOINT:
                        p = decay[r * NT + j] * a
                        decay_after = decay_after + (p,)
                        adjoint_after = adjoint_after + (adjoint[r * NT + j] + p * (dy_r * C[j]),)
            h = after
            if ADJOINT:
                decay = decay_after
                adjoint = adjoint_after
        rows += T * WIDTH
    if NATIVE:
        keep_touched(kept, total_rows >> 31)
    if count > begin:
        if LOCAL:
            for level in tl.static_range(log2_int(PARTS)):
                elapsed += from_lane(elapsed, lane ^ (R << level))
            decay = ()
            for r in tl.static_range(R):
                total = from_lane(elapsed, lane // S * S + ((lane % R) ^ r))
                for j in tl.static_range(NT):
                    decay = decay + (power(total * A[r * NT + j], NATIVE),)
            store_matrix(states_ptr, base, edge, slot * dim, N, lane, states, h, R, NT, NATIVE)
        if LOCAL or ADJOINT:
            store_matrix(decays_ptr, base, edge, slot * dim, N, lane, states, decay, R, NT, NATIVE)
        if ADJOINT:
            store_matrix(adjoints_ptr, base, edge, slot * dim, N, lane, states, adjoint, R, NT, NATIVE)


@jit
def _chain_kernel(
    parts_ptr,
    decays_ptr,
    start_ptr,
    cu_seqlens_ptr,
    length,
    dim,
    dstate,
    first_channel,
    last_channel,
    size,
    N: tl.constexpr,
    BACKWARD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns BLOCK states of a sequence, and replaces what each span of ``size`` steps adds by what it starts from.

    The state that a span ends with is ``decay * start + part``; BACKWARD, spans are met from the last to the first.
    """
    offs = first_channel * N + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence * length
    count = length
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        count = tl.load(cu_seqlens_ptr + sequence + 1) - first.to(tl.int32)
    mask = offs < last_channel * N
    state = tl.zeros([BLOCK], tl.float32)
    if start_ptr is not None:
        inside = mask & (offs % N < dstate)
        at = start_ptr + (sequence * dim + offs // N) * dstate + offs % N
        state = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    spans = tl.maximum(tl.cdiv(count, size), 1)  # an empty sequence has a slot, which hands on
    step = dim.to(tl.int64) * N
    start = (first // size + sequence) * step
    if BACKWARD:
        start += (spans - 1) * step
        step = -step
    part_at = parts_ptr + start + offs
    decay_at = decays_ptr + start + offs
    for span in range(0, spans, AT_ONCE):
        parts = ()
        decays = ()
        for i in tl.static_range(AT_ONCE):
            inside = mask & (span + i < spans)
            parts = parts + (tl.load(part_at + i * step, mask=inside, other=0.0),)
            decays = decays + (tl.load(decay_at + i * step, mask=inside, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            tl.store(part_at + i * step, state, mask=mask & (span + i < spans))
            state = state * decays[i] + parts[i]
        part_at += AT_ONCE * step
        decay_at += AT_ONCE * step
