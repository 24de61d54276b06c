"""The backward kernel of the selective scan: see README.md for the derivation.

With ``a_t = exp(delta'_t A)`` and ``dh_t`` the gradient of the state::

    dy_t = dout_t silu(z_t)        dh_t = C_t dy_t + a_{t+1} dh_{t+1}        w_t = dh_t a_t h_{t-1}
    d(delta'_t) = <w_t, A> + <dh_t, B_t> u_t             du_t = <dh_t, B_t> delta'_t + D dy_t
    dA = sum of w_t delta'_t       dB_t = sum over channels of dh_t delta'_t u_t      dC_t = likewise of h_t dy_t

Work is shared out like forward's, with one twist: lanes of different channels hold their NT states in different orders
(``j ^ q`` for the q-th lane group), so that the sums over channels, too, fold without selects. They leave one number of
dB or dC a lane and step, which goes to a row of the block's own in ``drows``; ``_sum_rows_kernel`` adds the rows up.

The states of an iteration are computed again from the one before it, which ``_sweep_kernel`` has written down, and stay
in registers, with their decays, while the iteration is walked back.

Steps' sizes, and so dA until it is stored, come in the unit that ``power`` takes.
"""

import triton
import triton.language as tl

from cab_kernels.scan.device_kernels import (
    exponent,
    fold_halves,
    fold_permuted,
    fold_states,
    from_exponent,
    from_lane,
    jit,
    keep_touched,
    let_go,
    load_numbers,
    load_steps,
    log2_int,
    power,
    sigmoid,
    stay_before,
    store_one,
    store_steps,
    take_steps,
    touch,
    touch_rows,
    touches,
)
from cab_kernels.scan.forward_kernels import (
    channels_of,
    direction_of,
    load_matrix,
    one_of,
    place_in,
    row_of,
    sequence_of,
    source_lane,
    states_of,
    step_size,
    store_matrix,
)


@triton.jit
def _fold_channels(values, NT: tl.constexpr, S: tl.constexpr, ORDERS: tl.constexpr, lane):
    """Add dB's NT values and dC's over the warp's channels."""
    for level in tl.static_range(log2_int(ORDERS)):
        values = fold_permuted(values, 2 * NT // ORDERS, ORDERS >> (level + 1), lane, S * (ORDERS >> (level + 1)))
    if 32 // S > NT:
        values = fold_halves(values, 1, lane, S * ORDERS)
    if 32 // S > 2 * NT:
        folded = values[0]
        for level in tl.static_range(log2_int(32 // S // (2 * NT))):
            folded += from_lane(folded, lane ^ (2 * S * ORDERS << level))
        values = (folded,)
    return values


@triton.jit
def _touch_befores(ptr, row, base, edge, lane, U: tl.constexpr, N: tl.constexpr):
    """Touch the 32 U states of the warp's channels, from ``base`` on."""
    touched = ()
    for i in tl.static_range(touches(32 * U)):
        at = (i * 32 + lane) * 8 % (32 * U)
        channel = tl.minimum(base + at // N, edge - 1)
        touched = touched + (touch(ptr + (row + channel) * N + at % N),)
    return touched


@jit
def _selective_scan_bwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, rows_ptr, D_ptr, z_ptr, delta_bias_ptr, dout_ptr, before_ptr,
    cu_seqlens_ptr, befores_ptr, adjoints_ptr, dlast_ptr,
    du_ptr, ddelta_ptr, dz_ptr, drows_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dinitial_ptr,
    strides_u, strides_delta, strides_z, strides_dout, strides_before, strides_du, strides_ddelta, strides_dz,
    length, channels, groups, dim, dstate, sequences, blocks, total_rows,
    first_block, first_channel, befores_dim, parts_width, size,
    STRIDE_U: tl.constexpr, STRIDE_DELTA: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_DOUT: tl.constexpr,
    STRIDE_BEFORE: tl.constexpr, STRIDE_DU: tl.constexpr, STRIDE_DDELTA: tl.constexpr, STRIDE_DZ: tl.constexpr,
    ALIGNED_U: tl.constexpr, ALIGNED_DELTA: tl.constexpr, ALIGNED_Z: tl.constexpr, ALIGNED_DOUT: tl.constexpr,
    ALIGNED_BEFORE: tl.constexpr, ALIGNED_DU: tl.constexpr, ALIGNED_DDELTA: tl.constexpr, ALIGNED_DZ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, NT: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr,
    ORDERS: tl.constexpr, SPLIT: tl.constexpr, PAD: tl.constexpr,
    BOTH: tl.constexpr, SECOND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Owns a span of ``size`` steps of a block of channels of a sequence, or all steps unless SPLIT; walks them back.

    Reads its inputs once and B and C twice; writes du, ddelta, dz, and its part of all sums. A gradient whose pointer
    is None is not wanted; what is before the gradient of z, if anything, is added to it.
    """
    N: tl.constexpr = S * NT
    U: tl.constexpr = R * NT
    T: tl.constexpr = STEPS * PARTS
    WIDTH: tl.constexpr = 2 * ORDERS * N
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    TOUCHED: tl.constexpr = touches(T * WIDTH) + touches(32 * U)
    pid = tl.program_id(0)
    task = (pid // blocks).to(tl.int64)
    if SPLIT:
        sequence, span, first, count = sequence_of(pid // blocks, length, cu_seqlens_ptr, sequences, size)
        begin = min(span * size, count)
        end = min(begin + size, count)
    else:
        sequence = task
        span = 0
        begin = 0
        if PACKED:
            first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            count = tl.load(cu_seqlens_ptr + sequence + 1) - first.to(tl.int32)
        else:
            first = sequence * length
            count = length
        end = count
    block = first_block + pid % blocks
    lane, base, own, edge, group = channels_of(block, channels, S, R)
    second, skip = direction_of(group, groups, dim, BOTH, SECOND)
    mask = own < edge
    row = tl.where(mask, own - skip, 0)
    part = lane % S // R * STEPS
    limit = tl.where(mask & (lane % S < R * PARTS), end, 0)
    state = states_of(lane, S, NT, ORDERS)
    A_ptr = one_of(A_ptr, second, BOTH)
    A = load_matrix(A_ptr, base - skip, edge - skip, 0, dstate, lane, state, R, NT, NATIVE)
    D = 0.0
    if D_ptr is not None:
        D = tl.load(one_of(D_ptr, second, BOTH) + row).to(tl.float32)
    bias = 0.0
    if delta_bias_ptr is not None:
        bias = tl.load(one_of(delta_bias_ptr, second, BOTH) + row).to(tl.float32)
    if B_ptr is not None:
        B_constant = load_matrix(B_ptr, base, edge, 0, dstate, lane, state, R, NT, NATIVE)
    if C_ptr is not None:
        C_constant = load_matrix(C_ptr, base, edge, 0, dstate, lane, state, R, NT, NATIVE)
    zeros = ()
    for _ in tl.static_range(U):
        zeros = zeros + (tl.zeros([1, 32], tl.float32),)
    dA = zeros
    dB = zeros
    dC = zeros
    dD = tl.zeros([1, 32], tl.float32)
    dbias = tl.zeros([1, 32], tl.float32)
    if SPLIT:
        carry = load_matrix(
            adjoints_ptr, base, edge, (first // size + sequence + span) * dim, N, lane, state, R, NT, NATIVE
        )
    elif dlast_ptr is not None:
        carry = load_matrix(dlast_ptr, base, edge, sequence * dim, dstate, lane, state, R, NT, NATIVE)
    else:
        carry = zeros

    u_ptr = one_of(u_ptr, second, BOTH)
    u_row = row_of(u_ptr, strides_u, sequence, first, count, row, second, STRIDE_U, STEPS, PACKED)
    delta_ptr = one_of(delta_ptr, second, BOTH)
    delta_row = row_of(delta_ptr, strides_delta, sequence, first, count, row, second, STRIDE_DELTA, STEPS, PACKED)
    dout_row = row_of(dout_ptr, strides_dout, sequence, first, count, row, second, STRIDE_DOUT, STEPS, PACKED)
    if du_ptr is not None:
        du_ptr = one_of(du_ptr, second, BOTH)
        du_row = row_of(du_ptr, strides_du, sequence, first, count, row, second, STRIDE_DU, STEPS, PACKED)
    if ddelta_ptr is not None:
        ddelta_ptr = one_of(ddelta_ptr, second, BOTH)
        ddelta_row = row_of(
            ddelta_ptr, strides_ddelta, sequence, first, count, row, second, STRIDE_DDELTA, STEPS, PACKED
        )
    if z_ptr is not None:
        z_row = row_of(z_ptr, strides_z, sequence, first, count, row, second, STRIDE_Z, STEPS, PACKED)
    if dz_ptr is not None:
        dz_ptr = one_of(dz_ptr, second, BOTH)
        dz_row = row_of(dz_ptr, strides_dz, sequence, first, count, row, second, STRIDE_DZ, STEPS, PACKED)
    if before_ptr is not None:
        before_row = row_of(
            before_ptr, strides_before, sequence, first, count, row, second, STRIDE_BEFORE, STEPS, PACKED
        )
    all_rows = rows_ptr + (group.to(tl.int64) * total_rows + first + sequence * PAD) * WIDTH
    rows = all_rows + (lane // S % ORDERS * N + lane % S * NT)
    # What the fold over channels leaves in each lane: which of (B, C), and which states.
    spare = lane // S // ORDERS
    if drows_ptr is not None:
        drows = drows_ptr + ((pid % blocks).to(tl.int64) * total_rows + first + sequence * PAD) * (2 * N)
    top = tl.maximum(begin + (tl.cdiv(end - begin, T) - 1) * T, begin)

    next_u = load_steps(u_row, part + top, limit, second, STRIDE_U, STEPS, ALIGNED_U, NATIVE)
    next_delta = load_steps(delta_row, part + top, limit, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, NATIVE)
    next_dout = load_steps(dout_row, part + top, limit, second, STRIDE_DOUT, STEPS, ALIGNED_DOUT, NATIVE)
    if z_ptr is not None:
        next_z = load_steps(z_row, part + top, limit, second, STRIDE_Z, STEPS, ALIGNED_Z, NATIVE)
    befores = (first // T + sequence) * befores_dim - first_channel
    kept = tl.zeros([1, 32], tl.int32)
    if NATIVE:
        touched = touch_rows(all_rows + top.to(tl.int64) * WIDTH, lane, T, WIDTH, ORDERS * N)
        touched = touched + _touch_befores(
            befores_ptr, befores + top // T * befores_dim, base - lane // S * R, edge, lane, U, N
        )
    for back in range(0, end - begin, T):
        t = top - back
        now = part + t
        then = tl.maximum(t - T, begin)
        u = take_steps(next_u, second, STRIDE_U, STEPS, ALIGNED_U, BOTH)
        x = take_steps(next_delta, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, BOTH)
        dout = take_steps(next_dout, second, STRIDE_DOUT, STEPS, ALIGNED_DOUT, BOTH)
        next_u = load_steps(u_row, part + then, limit, second, STRIDE_U, STEPS, ALIGNED_U, NATIVE)
        next_delta = load_steps(delta_row, part + then, limit, second, STRIDE_DELTA, STEPS, ALIGNED_DELTA, NATIVE)
        next_dout = load_steps(dout_row, part + then, limit, second, STRIDE_DOUT, STEPS, ALIGNED_DOUT, NATIVE)
        if z_ptr is not None:
            z = take_steps(next_z, second, STRIDE_Z, STEPS, ALIGNED_Z, BOTH)
            next_z = load_steps(z_row, part + then, limit, second, STRIDE_Z, STEPS, ALIGNED_Z, NATIVE)
        if before_ptr is not None:
            dz_before = load_steps(before_row, now, limit, second, STRIDE_BEFORE, STEPS, ALIGNED_BEFORE, NATIVE)
        rows_t = rows + t.to(tl.int64) * WIDTH
        if drows_ptr is not None:
            drows_t = drows + t.to(tl.int64) * (2 * N)
        if NATIVE:
            kept = let_go(kept, touched, TOUCHED)
            touched = touch_rows(all_rows + then.to(tl.int64) * WIDTH, lane, T, WIDTH, ORDERS * N)
            touched = touched + _touch_befores(
                befores_ptr, befores + then // T * befores_dim, base - lane // S * R, edge, lane, U, N
            )
            stay_before()
        before = befores + t // T * befores_dim
        h0 = ()
        for r in tl.static_range(R):
            # A channel that is not there reads another's: its steps are of size zero, and nothing of it is stored.
            channel = tl.minimum(base + ((lane % R) ^ r), edge - 1)
            h0 = h0 + load_numbers(befores_ptr + (before + channel) * N + lane % S * NT, NT, False, NATIVE)
        dt = ()
        dtu = ()
        dy = ()
        for i in tl.static_range(STEPS):
            d = step_size(x[i], bias, now + i < limit, SOFTPLUS, NATIVE)
            dt = dt + (exponent(d, NATIVE),)
            dtu = dtu + (d * u[i],)
            g = dout[i]
            if z_ptr is not None:
                g *= z[i] * sigmoid(z[i], NATIVE)
            dy = dy + (g,)
            dD += g * u[i]

        # The states of these steps once more.
        a = ()
        h = h0
        ys = ()
        for k in tl.static_range(T):
            if B_ptr is None:
                B = load_numbers(rows_t + k * WIDTH, NT, False, NATIVE)
            if dz_ptr is not None and C_ptr is None:
                C = load_numbers(rows_t + (k * WIDTH + ORDERS * N), NT, False, NATIVE)
            for r in tl.static_range(R):
                if B_ptr is not None:
                    B = B_constant[r * NT : (r + 1) * NT]
                if C_ptr is not None:
                    C = C_constant[r * NT : (r + 1) * NT]
                source = source_lane(lane, k, r, S, R, STEPS)
                dt_r = from_lane(dt[k % STEPS], source)
                dtu_r = from_lane(dtu[k % STEPS], source)
                for j in tl.static_range(NT):
                    decay = power(dt_r * A[r * NT + j], NATIVE)
                    x_new = decay * h[k * U + r * NT + j] + dtu_r * B[j]
                    a = a + (decay,)
                    h = h + (x_new,)
                    if dz_ptr is not None:
                        if j == 0:
                            y = x_new * C[0]
                        else:
                            y += x_new * C[j]
                if dz_ptr is not None:
                    ys = ys + (y,)
        if dz_ptr is not None:
            ys = fold_states(ys, S, R, STEPS, PARTS, lane)
            dzs = ()
            for i in tl.static_range(STEPS):
                gate = sigmoid(z[i], NATIVE)
                slope = gate + z[i] * gate * (1.0 - gate)
                dzs = dzs + (dout[i] * (ys[i] + D * u[i]) * slope,)
            if before_ptr is not None:
                dz_before = take_steps(dz_before, second, STRIDE_BEFORE, STEPS, ALIGNED_BEFORE, BOTH)
                summed = ()
                for i in tl.static_range(STEPS):
                    summed = summed + (dzs[i] + dz_before[i],)
                dzs = summed
            store_steps(dz_row, now, limit, dzs, second, STRIDE_DZ, STEPS, ALIGNED_DZ, BOTH, NATIVE)

        # And back.
        dxs = ()
        dexps = ()
        for back_k in tl.static_range(T):
            if B_ptr is None:
                B = load_numbers(rows_t + (T - 1 - back_k) * WIDTH, NT, True, NATIVE)
            if C_ptr is None:
                C = load_numbers(rows_t + ((T - 1 - back_k) * WIDTH + ORDERS * N), NT, True, NATIVE)
            products_B = ()
            products_C = ()
            carried = ()
            dA_after = ()
            dB_after = ()
            dC_after = ()
            step_dx = ()
            step_dexp = ()
            for r in tl.static_range(R):
                if B_ptr is not None:
                    B = B_constant[r * NT : (r + 1) * NT]
                if C_ptr is not None:
                    C = C_constant[r * NT : (r + 1) * NT]
                source = source_lane(lane, (T - 1 - back_k), r, S, R, STEPS)
                dt_r = from_lane(dt[(T - 1 - back_k) % STEPS], source)
                dtu_r = from_lane(dtu[(T - 1 - back_k) % STEPS], source)
                dy_r = from_lane(dy[(T - 1 - back_k) % STEPS], source)
                for j in tl.static_range(NT):
                    i = r * NT + j
                    dh = carry[r * NT + j] + dy_r * C[j]
                    product_C = dy_r * h[(T - back_k) * U + r * NT + j]
                    product_B = dtu_r * dh
                    through = a[(T - 1 - back_k) * U + r * NT + j] * dh
                    w = through * h[(T - 1 - back_k) * U + r * NT + j]
                    carried = carried + (through,)
                    dA_after = dA_after + (dA[r * NT + j] + w * dt_r,)
                    if j == 0:
                        dx = dh * B[0]
                        dexp = w * A[r * NT]
                    else:
                        dx += dh * B[j]
                        dexp += w * A[r * NT + j]
                    if B_ptr is not None:
                        dB_after = dB_after + (dB[r * NT + j] + product_B,)
                    elif r == 0:
                        products_B = products_B + (product_B,)
                    else:
                        products_B = products_B[:j] + (products_B[j] + product_B,) + products_B[j + 1 :]
                    if C_ptr is not None:
                        dC_after = dC_after + (dC[r * NT + j] + product_C,)
                    elif r == 0:
                        products_C = products_C + (product_C,)
                    else:
                        products_C = products_C[:j] + (products_C[j] + product_C,) + products_C[j + 1 :]
                step_dx = step_dx + (dx,)
                step_dexp = step_dexp + (dexp,)
            carry = carried
            dA = dA_after
            dxs = step_dx + dxs
            dexps = step_dexp + dexps
            if B_ptr is not None:
                dB = dB_after
                products_B = zeros[:NT]
            if C_ptr is not None:
                dC = dC_after
                products_C = zeros[:NT]
            if drows_ptr is not None:
                sums = _fold_channels(products_B + products_C, NT, S, ORDERS, lane)
                at = drows_t + (T - 1 - back_k) * (2 * N)
                if 32 // S > NT:
                    keep = spare < 2
                    store_one(at + (spare % 2 * N + state[0]), sums[0], keep, NATIVE)
                else:
                    for i in tl.static_range(NT // ORDERS):
                        store_one(at + state[i * ORDERS], sums[i], lane >= 0, NATIVE)
                        store_one(at + (N + state[i * ORDERS]), sums[NT // ORDERS + i], lane >= 0, NATIVE)
        dxs = fold_states(dxs, S, R, STEPS, PARTS, lane)
        dexps = fold_states(dexps, S, R, STEPS, PARTS, lane)
        dus = ()
        ddeltas = ()
        for i in tl.static_range(STEPS):
            dus = dus + (dxs[i] * from_exponent(dt[i], NATIVE) + D * dy[i],)
            g = dexps[i] + dxs[i] * u[i]
            if SOFTPLUS:
                g *= sigmoid(x[i] + bias, NATIVE)
            g = tl.where(now + i < limit, g, 0.0)
            dbias += g
            ddeltas = ddeltas + (g,)
        if du_ptr is not None:
            store_steps(du_row, now, limit, dus, second, STRIDE_DU, STEPS, ALIGNED_DU, BOTH, NATIVE)
        if ddelta_ptr is not None:
            store_steps(ddelta_row, now, limit, ddeltas, second, STRIDE_DDELTA, STEPS, ALIGNED_DDELTA, BOTH, NATIVE)

    if NATIVE:
        keep_touched(kept, total_rows >> 31)
    parts = task * parts_width
    if dA_ptr is not None:
        dA_values = ()
        for i in tl.static_range(U):
            dA_values = dA_values + (from_exponent(dA[i], NATIVE),)
        store_matrix(dA_ptr + parts, base, edge, 0, dstate, lane, state, dA_values, R, NT, NATIVE)
    if B_ptr is not None and dB_ptr is not None:
        store_matrix(dB_ptr + parts, base, edge, 0, dstate, lane, state, dB, R, NT, NATIVE)
    if C_ptr is not None and dC_ptr is not None:
        store_matrix(dC_ptr + parts, base, edge, 0, dstate, lane, state, dC, R, NT, NATIVE)
    if dinitial_ptr is not None:
        if span == 0:
            store_matrix(dinitial_ptr, base, edge, sequence * dim, dstate, lane, state, carry, R, NT, NATIVE)
    for level in tl.static_range(log2_int(PARTS)):
        dD += from_lane(dD, lane ^ (R << level))
        dbias += from_lane(dbias, lane ^ (R << level))
    first_part = mask & (lane % S < R)
    if dD_ptr is not None:
        tl.store(dD_ptr + parts + own, dD, mask=first_part)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + parts + own, dbias, mask=first_part)


@jit
def _sum_parts_kernel(
    parts_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, end_dA, end_dB, end_dC, end_dD, end_dbias, tasks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK of the parameters' gradients, side by side: adds up what the tasks gave them, in a fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for task in range(0, tasks, ROWS):
        at = parts_ptr + (task + row).to(tl.int64) * end_dbias + column
        total += tl.load(at, mask=(task + row < tasks) & (column < end_dbias), other=0.0)
    total = tl.sum(total, 0)
    if dA_ptr is not None:
        tl.store(dA_ptr + column, total, mask=column < end_dA)
    if dB_ptr is not None:
        tl.store(dB_ptr + (column - end_dA), total, mask=(column >= end_dA) & (column < end_dB))
    if dC_ptr is not None:
        tl.store(dC_ptr + (column - end_dB), total, mask=(column >= end_dB) & (column < end_dC))
    if dD_ptr is not None:
        tl.store(dD_ptr + (column - end_dC), total, mask=(column >= end_dC) & (column < end_dD))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + (column - end_dD), total, mask=(column >= end_dD) & (column < end_dbias))


@triton.jit
def _store_rows_to(ptr, strides, batch, group, state, time, inside, dstate, tile, BY_STEP: tl.constexpr):
    at = place_in(ptr, strides, batch, group, state, time, BY_STEP)
    if BY_STEP:
        tile = tl.trans(tile)
        mask = (state < dstate)[:, None] & inside[None, :]
    else:
        mask = inside[:, None] & (state < dstate)[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=mask)


@jit
def _sum_rows_kernel(
    drows_ptr,
    sums_ptr,
    dB_ptr,
    dC_ptr,
    cu_seqlens_ptr,
    sequences,
    length,
    total_rows,
    dstate,
    groups,
    blocks,
    first_block,
    end_block,
    strides_dB,
    strides_dC,
    N: tl.constexpr,
    PAD: tl.constexpr,
    REVERSE: tl.constexpr,
    dB_BY_STEP: tl.constexpr,
    dC_BY_STEP: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Owns BLOCK steps of a sequence and group: adds up what the group's blocks of channels, ROWS at a time, gave dB
    and dC.

    Of its ``blocks``, those from first_block to end_block, which share drows_ptr and have the groups of the grid; if
    the blocks of a group take turns, sums_ptr, (groups, rows, 2 N), carries the sum from one slice of them to the next.
    """
    steps = tl.program_id(0) // sequences * BLOCK + tl.arange(0, BLOCK)
    sequence = (tl.program_id(0) % sequences).to(tl.int64)
    group = (first_block // blocks + tl.program_id(1)).to(tl.int64)
    first = sequence * length
    count = length
    batch = sequence
    time = 0
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        count = tl.load(cu_seqlens_ptr + sequence + 1) - first.to(tl.int32)
        batch = sequence * 0
        time = first
    inside = (steps < count)[:, None]
    state = tl.arange(0, N)
    row = (first + sequence * PAD + steps[:, None]) * (2 * N) + state[None, :]
    low = tl.maximum(group * blocks, first_block)
    high = tl.minimum((group + 1) * blocks, end_block)
    total_B = tl.zeros([ROWS, BLOCK, N], tl.float32)
    total_C = tl.zeros([ROWS, BLOCK, N], tl.float32)
    width = total_rows.to(tl.int64) * (2 * N)
    of_block = tl.arange(0, ROWS)[:, None, None]
    at = drows_ptr + (low - first_block + of_block) * width + row[None, :, :]
    for block in tl.range(low, high, ROWS, loop_unroll_factor=4):
        mask = (block + of_block < high) & inside[None, :, :]
        total_B += tl.load(at, mask=mask, other=0.0)
        total_C += tl.load(at + N, mask=mask, other=0.0)
        at += ROWS * width
    total_B = tl.sum(total_B, 0)
    total_C = tl.sum(total_C, 0)
    if sums_ptr is not None:
        sums_ptr += group * total_rows * (2 * N) + row
        earlier = inside & (first_block > group * blocks)
        total_B += tl.load(sums_ptr, mask=earlier, other=0.0)
        total_C += tl.load(sums_ptr + N, mask=earlier, other=0.0)
        tl.store(sums_ptr, total_B, mask=inside)
        tl.store(sums_ptr + N, total_C, mask=inside)
    second, _ = direction_of(group, groups, 0, BOTH, False)
    time = (time + tl.where(second != REVERSE, count - 1 - steps, steps)).to(tl.int64)
    of_direction = group - tl.where(second, groups // 2, 0)
    if dB_ptr is not None:
        dB_ptr = one_of(dB_ptr, second, BOTH)
        _store_rows_to(dB_ptr, strides_dB, batch, of_direction, state, time, steps < count, dstate, total_B, dB_BY_STEP)
    if dC_ptr is not None:
        dC_ptr = one_of(dC_ptr, second, BOTH)
        _store_rows_to(dC_ptr, strides_dC, batch, of_direction, state, time, steps < count, dstate, total_C, dC_BY_STEP)
