"""The forward kernel of the selective scan, and what the other kernels share of it.

Per channel, a state ``h`` of ``dstate`` numbers (Mamba, arXiv:2312.00752, where h, x, B, C, Delta, A are h, u, B, C,
delta and A here)::

    delta'_t = softplus(delta_t + delta_bias)
    h_t      = exp(delta'_t A) h_{t-1} + delta'_t u_t B_t
    y_t      = <C_t, h_t> + D u_t,   out_t = y_t silu(z_t)

How a warp shares this out. ``S`` lanes share a channel and hold ``NT`` of its states each, in registers; each works on
``R`` neighbouring channels, so a warp has ``32 / S * R`` of them, and time is a plain loop. What is per channel and
step (softplus, gate, loads and stores) would be done S times over: so an iteration takes ``STEPS * PARTS`` steps, and
a lane owns ``STEPS`` of them of one of its R channels. It hands delta', in the unit that ``power`` takes, and
delta' u to the lanes of its channel by shuffles, and the lanes' parts of y come back to it by folds (``fold_states``).
The r-th channel of a lane is ``lane ^ r`` among its R, so that these folds need no selects.

B and C are read by step, all states side by side, in float32: ``_pack_kernel`` lays them out so, once a call, in the
order of the scan. The loads of an iteration are issued one iteration ahead: with a few warps a scheduler, latency
bounds this kernel, and then the exponentials.
"""

import triton
import triton.language as tl

from cab_kernels.scan.device_kernels import (
    exponent,
    fold_states,
    from_lane,
    jit,
    keep_touched,
    let_go,
    load_numbers,
    load_one,
    load_steps,
    power,
    sigmoid,
    softplus,
    stay_before,
    store_numbers,
    store_one,
    store_steps,
    take_steps,
    touch_rows,
    touches,
)


@triton.jit
def sequence_of(task, length, cu_seqlens_ptr, sequences, size):
    """The sequence and the chunk of ``size`` steps that a task is, and where the sequence begins and how long it is.

    Without cu_seqlens the first chunks of all sequences come first and the last ones, which may be short, last: so the
    GPU's multiprocessors end at about the same time. With it, the chunks of sequence i are numbered from
    ``cu_seqlens[i] // size + i`` on, which leaves some numbers without one: their first step is beyond the end.
    """
    if cu_seqlens_ptr is None:
        sequence = (task % sequences).to(tl.int64)
        return sequence, task // sequences, sequence * length, length
    else:
        sequence = task * 0
        for bit in range(0, 31):
            step = 1 << (30 - bit)
            if step < sequences - sequence:
                after = sequence + step
                if tl.load(cu_seqlens_ptr + after) // size + after <= task:
                    sequence = after
        first = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        return sequence.to(tl.int64), task - (first // size + sequence), first.to(tl.int64), end - first


@triton.jit
def channels_of(block, channels, S: tl.constexpr, R: tl.constexpr):
    """Which channel each lane owns, and which R it works on: the r-th is ``base + ((lane % R) ^ r)``.

    Blocks never straddle two groups, of ``channels`` channels each. Returns lane, base, own, the end of the group, and
    the group.
    """
    SIZE: tl.constexpr = 32 // S * R
    blocks = tl.cdiv(channels, SIZE)
    group = block // blocks
    lane = tl.arange(0, 32)[None, :]
    base = group * channels + block % blocks * SIZE + lane // S * R
    return lane, base, base + lane % R, (group + 1) * channels, group


@triton.jit
def direction_of(group, groups, dim, BOTH: tl.constexpr, SECOND: tl.constexpr):
    """Where BOTH directions of a bidirectional scan share a launch, the second half of the groups runs from the end.

    Returns whether the group does, and how many channels come before those of its direction: scratch has both
    directions' channels side by side, what the caller gave, or gets, comes in pairs (see ``one_of``). A launch of the
    SECOND direction alone has its tensors alone, and reversed strides.
    """
    second = (group >= groups // 2) & BOTH
    return second, tl.where(second | SECOND, dim // 2, 0)


@triton.jit
def one_of(pair, second, BOTH: tl.constexpr):
    """The direction's pointer of a pair; without BOTH, the only one."""
    if BOTH:
        return tl.where(second, pair[1], pair[0])
    else:
        return pair


@triton.jit
def row_of(
    ptr,
    strides,
    sequence,
    first,
    end,
    channel,
    second,
    STRIDE: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Pointer to a channel's first step in the order of the scan; STRIDE is negative for a reversed one.

    In the second of two directions, it points to the last of a lane's STEPS steps, which then comes first in memory.
    """
    if PACKED:
        row = ptr + first * (STRIDE if STRIDE > 0 else -STRIDE)
    else:
        row = ptr + sequence * strides[0]
    if STRIDE < 0:
        row += (end - 1).to(tl.int64) * -STRIDE
    row += tl.where(second, (end - STEPS).to(tl.int64) * STRIDE, 0)
    return row + channel.to(tl.int64) * strides[1]


@triton.jit
def states_of(lane, S: tl.constexpr, NT: tl.constexpr, ORDERS: tl.constexpr):
    """Which states a lane holds: NT neighbours, in one of ORDERS orders, see ``backward_kernels.py``."""
    states = ()
    for j in tl.static_range(NT):
        states = states + (lane % S * NT + (j ^ (lane // S % ORDERS)),)
    return states


@triton.jit
def load_matrix(ptr, base, edge, row, width, lane, states, R: tl.constexpr, NT: tl.constexpr, NATIVE: tl.constexpr):
    """A lane's part of a (channels, width) matrix: R x NT numbers, zero beyond its edges."""
    values = ()
    for r in tl.static_range(R):
        channel = base + ((lane % R) ^ r)
        for j in tl.static_range(NT):
            at = ptr + (row + channel) * width + states[j]
            values = values + (load_one(at, (channel < edge) & (states[j] < width), NATIVE).to(tl.float32),)
    return values


@triton.jit
def store_matrix(
    ptr,
    base,
    edge,
    row,
    width,
    lane,
    states,
    values,
    R: tl.constexpr,
    NT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The reverse of ``load_matrix``."""
    for r in tl.static_range(R):
        channel = base + ((lane % R) ^ r)
        for j in tl.static_range(NT):
            at = ptr + (row + channel) * width + states[j]
            store_one(at, values[r * NT + j], (channel < edge) & (states[j] < width), NATIVE)


@triton.jit
def step_size(x, bias, valid, SOFTPLUS: tl.constexpr, NATIVE: tl.constexpr):
    """delta', zero where there is no step: such a step changes no state."""
    x += bias
    if SOFTPLUS:
        x = softplus(x, NATIVE)
    return tl.where(valid, x, 0.0)


@triton.jit
def source_lane(lane, k, r, S: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr):
    """Which lane owns step k of the r-th channel."""
    return lane // S * S + k // STEPS * R + ((lane % R) ^ r)


@jit
def _selective_scan_fwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, rows_ptr, D_ptr, z_ptr, delta_bias_ptr, initial_ptr, cu_seqlens_ptr,
    before_ptr, out_ptr, starts_ptr, states_ptr, last_ptr,
    strides_u, strides_delta, strides_z, strides_before, strides_out,
    length, channels, groups, dim, dstate, sequences, chunk, size, blocks, first_block, total_rows,
    STRIDE_U: tl.constexpr, STRIDE_DELTA: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_BEFORE: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    ALIGNED_U: tl.constexpr, ALIGNED_DELTA: tl.constexpr, ALIGNED_Z: tl.constexpr, ALIGNED_BEFORE: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
    SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, NT: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr,
    PAD: tl.constexpr, BOTH: tl.constexpr, SECOND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Owns a block of channels of a sequence, or of one chunk of it if SPLIT.

    Reads its inputs once and writes the output and the last state; and for backward to states_ptr, (spans, dim, N), the
    state before every ``size`` steps. If SPLIT, a chunk starts from the state in starts_ptr, (chunks, dim, N).
    """
    N: tl.constexpr = S * NT
    T: tl.constexpr = STEPS * PARTS
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    TOUCHED: tl.constexpr = touches(T * 2 * N)
    pid = tl.program_id(0)
    if SPLIT:
        sequence, index, first, count = sequence_of(pid // blocks, length, cu_seqlens_ptr, sequences, chunk)
        begin = index * chunk
        end = min(begin + chunk, count)
    else:
        sequence = (pid // blocks).to(tl.int64)
        begin = 0
        if PACKED:
            first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            count = tl.load(cu_seqlens_ptr + sequence + 1) - first.to(tl.int32)
        else:
            first = sequence * length
            count = length
        end = count
    lane, base, own, edge, group = channels_of(first_block + pid % blocks, channels, S, R)
    second, skip = direction_of(group, groups, dim, BOTH, SECOND)
    mask = own < edge
    row = tl.where(mask, own - skip, 0)
    part = lane % S // R * STEPS
    limit = tl.where(mask & (lane % S < R * PARTS), end, 0)
    states = states_of(lane, S, NT, 1)
    A_ptr = one_of(A_ptr, second, BOTH)
    A = load_matrix(A_ptr, base - skip, edge - skip, 0, dstate, lane, states, R, NT, NATIVE)
    slot = first // size + sequence
    if SPLIT:
        start = (first // chunk + sequence + index) * dim
        h = load_matrix(starts_ptr, base, edge, start, N, lane, states, R, NT, NATIVE)
    elif initial_ptr is not None:
        h = load_matrix(initial_ptr, base, edge, sequence * dim, dstate, lane, states, R, NT, NATIVE)
    else:
        h = ()
        for _ in tl.static_range(R * NT):
            h = h + (tl.zeros([1, 32], tl.float32),)
    D = 0.0
    if D_ptr is not None:
        D = tl.load(one_of(D_ptr, second, BOTH) + row).to(tl.float32)
    bias = 0.0
    if delta_bias_ptr is not None:
        bias = tl.load(one_of(delta_bias_ptr, second, BOTH) + row).to(tl.float32)
    if B_ptr is not None:
        B_constant = load_matrix(B_ptr, base, edge, 0, dstate, lane, states, R, NT, NATIVE)
    if C_ptr is not None:
        C_constant = load_matrix(C_ptr, base, edge, 0, dstate, lane, states, R, NT, NATIVE)
    u_ptr = one_of(u_ptr, second, BOTH)
    u_row = row_of(u_ptr, strides_u, sequence, first, count, row, second, STRIDE_U, STEPS, PACKED)
    delta_ptr = one_of(delta_ptr, second, BOTH)
    delta_row = row_of(delta_ptr, strides_delta, sequence, first, count, row, second, STRIDE_DELTA, STEPS, PACKED)
    out_ptr = one_of(out_ptr, second, BOTH)
    out_row = row_of(out_ptr, strides_out, sequence, first, count, row, second, STRIDE_OUT, STEPS, PACKED)
    rows = rows_ptr + (group.to(tl.int64) * total_rows + first + sequence * PAD + begin) * (2 * N)
    mine = lane % S * NT
    kept = tl.zeros([1, 32], tl.int32)
    if NATIVE:
        touched = touch_rows(rows, lane, T, 2 * N, N)

    next_u = load_steps(u_row, part + begin, limit, second, STRIDE_U, STEPS, ALIGNED_U, NATIVE)
    next_delta = load_steps(delta_row, part + begin, limit, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, NATIVE)
    if z_ptr is not None:
        z_row = row_of(z_ptr, strides_z, sequence, first, count, row, second, STRIDE_Z, STEPS, PACKED)
        next_z = load_steps(z_row, part + begin, limit, second, STRIDE_Z, STEPS, ALIGNED_Z, NATIVE)
    if before_ptr is not None:
        before_row = row_of(
            before_ptr, strides_before, sequence, first, count, row, second, STRIDE_BEFORE, STEPS, PACKED
        )
        next_before = load_steps(before_row, part + begin, limit, second, STRIDE_BEFORE, STEPS, ALIGNED_BEFORE, NATIVE)
    for span in range(begin, end, size):
        if states_ptr is not None:
            for r in tl.static_range(R):
                channel = base + ((lane % R) ^ r)
                at = states_ptr + ((slot + span // size) * dim + channel) * N + lane % S * NT
                values = ()
                for j in tl.static_range(NT):
                    values = values + (h[r * NT + j],)
                store_numbers(at, values, channel < edge, NT, NATIVE)
        for t in range(span, min(span + size, end), T):
            now = part + t
            u = take_steps(next_u, second, STRIDE_U, STEPS, ALIGNED_U, BOTH)
            x = take_steps(next_delta, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, BOTH)
            next_u = load_steps(u_row, now + T, limit, second, STRIDE_U, STEPS, ALIGNED_U, NATIVE)
            next_delta = load_steps(delta_row, now + T, limit, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, NATIVE)
            if z_ptr is not None:
                z = take_steps(next_z, second, STRIDE_Z, STEPS, ALIGNED_Z, BOTH)
                next_z = load_steps(z_row, now + T, limit, second, STRIDE_Z, STEPS, ALIGNED_Z, NATIVE)
            if before_ptr is not None:
                before = take_steps(next_before, second, STRIDE_BEFORE, STEPS, ALIGNED_BEFORE, BOTH)
                next_before = load_steps(
                    before_row, now + T, limit, second, STRIDE_BEFORE, STEPS, ALIGNED_BEFORE, NATIVE
                )
            if NATIVE:
                kept = let_go(kept, touched, TOUCHED)
                touched = touch_rows(rows + T * 2 * N, lane, T, 2 * N, N)
                stay_before()
            dt = ()
            dtu = ()
            for i in tl.static_range(STEPS):
                d = step_size(x[i], bias, now + i < limit, SOFTPLUS, NATIVE)
                dt = dt + (exponent(d, NATIVE),)
                dtu = dtu + (d * u[i],)
            ys = ()
            for k in tl.static_range(T):
                B = load_numbers(rows + (k * 2 * N + mine), NT, False, NATIVE)
                C = load_numbers(rows + ((k * 2 + 1) * N + mine), NT, False, NATIVE)
                after = ()
                for r in tl.static_range(R):
                    if B_ptr is not None:
                        B = B_constant[r * NT : (r + 1) * NT]
                    if C_ptr is not None:
                        C = C_constant[r * NT : (r + 1) * NT]
                    if S == R and r == 0:
                        dt_r = dt[k % STEPS]
                        dtu_r = dtu[k % STEPS]
                    else:
                        source = source_lane(lane, k, r, S, R, STEPS)
                        dt_r = from_lane(dt[k % STEPS], source)
                        dtu_r = from_lane(dtu[k % STEPS], source)
                    for j in tl.static_range(NT):
                        decay = power(dt_r * A[r * NT + j], NATIVE)
                        state = decay * h[r * NT + j] + dtu_r * B[j]
                        after = after + (state,)
                        if j == 0:
                            y = state * C[0]
                        else:
                            y += state * C[j]
                    ys = ys + (y,)
                h = after
            ys = fold_states(ys, S, R, STEPS, PARTS, lane)
            outs = ()
            for i in tl.static_range(STEPS):
                y = ys[i] + D * u[i]
                if z_ptr is not None:
                    y *= z[i] * sigmoid(z[i], NATIVE)
                if before_ptr is not None:
                    y += before[i]
                outs = outs + (y,)
            store_steps(out_row, now, limit, outs, second, STRIDE_OUT, STEPS, ALIGNED_OUT, BOTH, NATIVE)
            rows += T * 2 * N
    if NATIVE:
        keep_touched(kept, total_rows >> 31)
    if last_ptr is not None and end == count:
        store_matrix(last_ptr, base, edge, sequence * dim, dstate, lane, states, h, R, NT, NATIVE)


@triton.jit
def place_in(ptr, strides, batch, group, state, time, BY_STEP: tl.constexpr):
    """Pointers into a (batch, groups, dstate, length) tensor: a (steps, states) tile, or (states, steps) if BY_STEP.

    BY_STEP says that steps lie side by side in memory: neighbouring threads must have the tile's last axis.
    """
    ptr += batch * strides[0] + group * strides[1]
    state = state.to(tl.int64) * strides[2]
    time *= strides[3]
    if BY_STEP:
        return ptr + state[:, None] + time[None, :]
    else:
        return ptr + time[:, None] + state[None, :]


@triton.jit
def _load_rows_of(ptr, strides, batch, group, state, time, inside, dstate, BY_STEP: tl.constexpr):
    at = place_in(ptr, strides, batch, group, state, time, BY_STEP)
    if BY_STEP:
        tile = tl.trans(tl.load(at, mask=(state < dstate)[:, None] & inside[None, :], other=0.0))
    else:
        tile = tl.load(at, mask=inside[:, None] & (state < dstate)[None, :], other=0.0)
    return tile.to(tl.float32)


@jit
def _pack_kernel(
    B_ptr,
    C_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    sequences,
    length,
    total_rows,
    dstate,
    strides_B,
    strides_C,
    N: tl.constexpr,
    ORDERS: tl.constexpr,
    PAD: tl.constexpr,
    REVERSE: tl.constexpr,
    B_BY_STEP: tl.constexpr,
    C_BY_STEP: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns BLOCK steps of a sequence and group: lays B and C side by side, in the order of the scan, then zeros.

    Each comes in ORDERS orders: in the q-th, state n stands at ``n ^ q``.
    """
    steps = tl.program_id(0) // sequences * BLOCK + tl.arange(0, BLOCK)
    sequence = (tl.program_id(0) % sequences).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    first = sequence * length
    count = length
    batch = sequence
    time = 0
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        count = tl.load(cu_seqlens_ptr + sequence + 1) - first.to(tl.int32)
        batch = sequence * 0
        time = first
    groups = tl.num_programs(1)
    second, _ = direction_of(group, groups, 0, BOTH, False)
    time = (time + tl.where(second != REVERSE, count - 1 - steps, steps)).to(tl.int64)
    of_direction = group - tl.where(second, groups // 2, 0)
    at = rows_ptr + (group * total_rows + first + sequence * PAD + steps[:, None]) * (2 * ORDERS * N)
    padded = (steps < count + PAD)[:, None]
    state = tl.arange(0, N)
    # Neighbouring threads are to store neighbouring numbers, so it is the loads that go out of order.
    if B_ptr is not None:
        B_ptr = one_of(B_ptr, second, BOTH)
        for order in tl.static_range(ORDERS):
            from_state = state ^ order
            B = _load_rows_of(B_ptr, strides_B, batch, of_direction, from_state, time, steps < count, dstate, B_BY_STEP)
            tl.store(at + (order * N + state)[None, :], B, mask=padded)
    if C_ptr is not None:
        C_ptr = one_of(C_ptr, second, BOTH)
        for order in tl.static_range(ORDERS):
            from_state = state ^ order
            C = _load_rows_of(C_ptr, strides_C, batch, of_direction, from_state, time, steps < count, dstate, C_BY_STEP)
            tl.store(at + ((ORDERS + order) * N + state)[None, :], C, mask=padded)
