"""What the scan's kernels do within one thread or one warp: elementary functions, and exchanges between lanes.

Every tensor here is (1, 32), one number a lane, and a tuple of them is what a lane holds in its registers. The
instructions of NVIDIA GPUs stand here alone, each with its portable twin, which other GPUs and the interpreter run
(``NATIVE`` chooses). Triton's own functions would be right too, at two to eight instructions where one will do.
"""

import inspect

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def jit(function):
    """``triton.jit`` of a kernel that is compiled once for all values of its arguments but the constexprs."""
    parameters = inspect.signature(function).parameters.items()
    names = [name for name, p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names)


@triton.constexpr_function
def log2_int(count):
    return count.bit_length() - 1


@triton.jit
def exponent(x, NATIVE: tl.constexpr):
    """x in the unit that ``power`` takes: NVIDIA's instruction is a power of two."""
    return x * LOG2E if NATIVE else x


@triton.jit
def from_exponent(x, NATIVE: tl.constexpr):
    return x * LN2 if NATIVE else x


@triton.jit
def power(x, NATIVE: tl.constexpr):
    """exp of what ``exponent`` made x of; on NVIDIA to 2 units in the last place, and zero below 2**-126."""
    if NATIVE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return tl.exp(tl.minimum(x, 88.0))  # so that nothing overflows, which the interpreter minds


@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def softplus(x, NATIVE: tl.constexpr):
    """log(1 + exp(x)) to a few units in the last place for every x, however negative.

    max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = e + e * e * series(e), to 5e-9 of its value.
    """
    e = power(-tl.abs(exponent(x, NATIVE)), NATIVE)
    series = -0.0033184717 * e + 0.020204582
    series = series * e - 0.057664435
    series = series * e + 0.10680554
    series = series * e - 0.15355395
    series = series * e + 0.196954
    series = series * e - 0.24958587
    series = series * e + 0.3333051
    series = series * e - 0.49999933
    return (series * e) * e + e + tl.maximum(x, 0.0)


@triton.jit
def sigmoid(x, NATIVE: tl.constexpr):
    return reciprocal(1.0 + power(exponent(-x, NATIVE), NATIVE), NATIVE)


@triton.jit
def from_lane(x, lane):
    """The value of x in another lane of the same warp: one shuffle."""
    return tl.gather(x, lane, 1)


@triton.jit
def permute(values, COUNT: tl.constexpr, ORDERS: tl.constexpr, order):
    """The values of a lane so that the j-th is the ``j ^ (order % ORDERS)``-th of before."""
    for level in tl.static_range(log2_int(ORDERS)):
        swap = (order & (1 << level)) != 0
        permuted = ()
        for j in tl.static_range(COUNT):
            permuted = permuted + (tl.where(swap, values[j ^ (1 << level)], values[j]),)
        values = permuted
    return values


@triton.jit
def fold_permuted(values, GROUPS: tl.constexpr, HALF: tl.constexpr, lane, DISTANCE: tl.constexpr):
    """Add pairs of lanes; of each group of 2 HALF values a lane keeps the first half.

    Value i of a lane whose bit DISTANCE is set must stand for what value i ^ HALF stands for in its partner. Then
    both keep their own first half, and nothing needs to be selected.
    """
    folded = ()
    for group in tl.static_range(GROUPS):
        for i in tl.static_range(HALF):
            theirs = from_lane(values[(2 * group + 1) * HALF + i], lane ^ DISTANCE)
            folded = folded + (values[2 * group * HALF + i] + theirs,)
    return folded


@triton.jit
def fold_halves(values, HALF: tl.constexpr, lane, DISTANCE: tl.constexpr):
    """Add pairs of lanes; one whose bit DISTANCE is set keeps the second half of the values, its partner the first."""
    high = (lane & DISTANCE) != 0
    folded = ()
    for i in tl.static_range(HALF):
        keep = tl.where(high, values[HALF + i], values[i])
        send = tl.where(high, values[i], values[HALF + i])
        folded = folded + (keep + from_lane(send, lane ^ DISTANCE),)
    return folded


@triton.jit
def fold_states(values, S: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, lane):
    """Add over the S lanes of a channel: values[step * R + r] of all steps become the STEPS values a lane owns."""
    for level in tl.static_range(log2_int(S // (R * PARTS))):
        summed = ()
        for i in tl.static_range(STEPS * PARTS * R):
            summed = summed + (values[i] + from_lane(values[i], lane ^ (R * PARTS << level)),)
        values = summed
    for level in tl.static_range(log2_int(R)):
        values = fold_permuted(values, STEPS * PARTS, R >> (level + 1), lane, R >> (level + 1))
    for level in tl.static_range(log2_int(PARTS)):
        values = fold_halves(values, STEPS * PARTS >> (level + 1), lane, R * PARTS >> (level + 1))
    return values


@triton.jit
def unstack(tile, COUNT: tl.constexpr):
    """A (1, 32, COUNT) tile as a tuple of COUNT tensors."""
    parts = (tile,)
    for level in tl.static_range(1, log2_int(COUNT) + 1):
        halves = ()
        for part in tl.static_range(1 << (level - 1)):
            wide = tl.reshape(parts[part], [1, 32, 2, COUNT >> level])
            low, high = tl.split(tl.permute(wide, [0, 1, 3, 2]))
            halves = halves + (low, high)
        parts = halves
    flat = ()
    for part in tl.static_range(COUNT):
        flat = flat + (tl.reshape(parts[part], [1, 32]),)
    return flat


@triton.jit
def stack(parts, COUNT: tl.constexpr):
    """A tuple of COUNT tensors as a (1, 32, COUNT) tile: the reverse of ``unstack``."""
    for level in tl.static_range(1, log2_int(COUNT) + 1):
        joined = ()
        for part in tl.static_range(COUNT >> level):
            joined = joined + (tl.join(parts[part], parts[part + (COUNT >> level)]),)
        parts = joined
    return tl.reshape(parts[0], [1, 32, COUNT])


@triton.jit
def _tile(row, first, count, STRIDE: tl.constexpr, STEPS: tl.constexpr):
    """Pointers to a lane's STEPS neighbouring and aligned numbers, in the order of memory, and whether they exist."""
    at = row + (first if STRIDE == 1 else -(first + (STEPS - 1)))
    at = at[:, :, None] + tl.arange(0, STEPS)[None, None, :]
    at = tl.multiple_of(at, [1, 1, STEPS * row.dtype.element_ty.primitive_bitwidth // 8])
    return tl.max_contiguous(at, [1, 1, STEPS]), (first < count)[:, :, None]


@triton.jit
def load_one(at, mask, NATIVE: tl.constexpr):
    """One number a lane, zero where the mask is not set.

    The compiler's pass over ``tl.load`` and ``tl.store`` takes time that grows with their number times the kernel's
    size: half a minute here. It does not look into assembly.
    """
    if NATIVE and at.dtype.element_ty.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, 0; @p ld.global.nc.b16 $0, [$1];}",
            "=h,l,r", [at, mask.to(tl.int32)], at.dtype.element_ty, True, 1,
        )  # fmt: skip
    elif NATIVE:
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1];}",
            "=r,l,r", [at, mask.to(tl.int32)], at.dtype.element_ty, True, 1,
        )  # fmt: skip
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_one(at, value, mask, NATIVE: tl.constexpr):
    value = value.to(at.dtype.element_ty)
    if NATIVE and at.dtype.element_ty.primitive_bitwidth == 16:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0;}",
            "=r,l,h,r", [at.to(tl.int64), value, mask.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip
    elif NATIVE:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0;}",
            "=r,l,r,r", [at.to(tl.int64), value, mask.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def load_numbers(at, COUNT: tl.constexpr, AGAIN: tl.constexpr, NATIVE: tl.constexpr):
    """COUNT (1, 2, or a multiple of 4) neighbouring float32 a lane.

    AGAIN marks a second and last load of the same numbers: the compiler would merge it with the first and hold them in
    registers, were it not another instruction.
    """
    values = ()
    if NATIVE:
        LOAD: tl.constexpr = "ld.global.L1::evict_first" if AGAIN else "ld.global.nc"
        if COUNT == 1:
            values = (tl.inline_asm_elementwise(LOAD + ".f32 $0, [$1];", "=r,l", [at], tl.float32, True, 1),)
        elif COUNT == 2:
            values = tl.inline_asm_elementwise(
                LOAD + ".v2.f32 {$0, $1}, [$2];", "=r,=r,l", [at], (tl.float32, tl.float32), True, 1
            )
        else:
            for i in tl.static_range(COUNT // 4):
                values = values + tl.inline_asm_elementwise(
                    LOAD + ".v4.f32 {$0, $1, $2, $3}, [$4];",
                    "=r,=r,=r,=r,l", [at + 4 * i], (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
                )  # fmt: skip
    else:
        for i in tl.static_range(COUNT):
            values = values + (tl.load(at + i),)
    return values


@triton.constexpr_function
def touches(count):
    """How many times all lanes must touch to fetch so many neighbouring float32."""
    return (count + 255) // 256


@triton.jit
def touch(at):
    """Fetch the 32 bytes at each lane's address into the L1 cache; the number that comes is to be let go much later.

    NVIDIA's ``prefetch.global.L1`` would say so, and makes nothing faster on an H100, as far as was measured.
    """
    return tl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [at], tl.int32, False, 1)


@triton.jit
def touch_rows(rows, lane, T: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Touch COUNT numbers of B, and as many of C, WIDTH // 2 after them, of each of T rows."""
    SECTORS: tl.constexpr = (COUNT + 7) // 8
    touched = ()
    for i in tl.static_range(touches(T * 2 * COUNT)):
        sector = (i * 32 + lane) % (T * 2 * SECTORS)
        at = sector // (2 * SECTORS) * WIDTH + sector // SECTORS % 2 * (WIDTH // 2) + sector % SECTORS * 8
        touched = touched + (touch(rows + at),)
    return touched


@triton.jit
def stay_before():
    """Keep the compiler from moving loads to after this."""
    zero = tl.zeros([1, 32], tl.int32)
    tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,r", [zero], tl.int32, False, 1)


@triton.jit
def let_go(kept, touched, COUNT: tl.constexpr):
    """Take the numbers in, so that nothing waits for them before."""
    for i in tl.static_range(COUNT):
        kept ^= touched[i]
    return kept


@triton.jit
def keep_touched(kept, zero):
    """Make the compiler believe that what was touched matters; ``zero`` is one that it can't tell."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $1, 0; @p trap; mov.b32 $0, 0;}", "=r,r", [kept & zero], tl.int32, False, 1
    )


@triton.jit
def store_numbers(at, values, mask, COUNT: tl.constexpr, NATIVE: tl.constexpr):
    """Store COUNT neighbouring float32 a lane."""
    if NATIVE and COUNT >= 4:
        flag = mask.to(tl.int32)
        for i in tl.static_range(COUNT // 4):
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;}",
                "=r,l,r,r,r,r,r",
                [
                    (at + 4 * i).to(tl.int64), values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3],
                    flag,
                ],
                tl.int32, False, 1,
            )  # fmt: skip
    else:
        for i in tl.static_range(COUNT):
            store_one(at + i, values[i], mask, NATIVE)


@triton.jit
def _in_order(values, second, STRIDE: tl.constexpr, STEPS: tl.constexpr, ALIGNED: tl.constexpr, BOTH: tl.constexpr):
    """From the order of memory to that of the scan, or back: the same if not ALIGNED, but for a second direction."""
    turned = ()
    for i in tl.static_range(STEPS):
        if ALIGNED and STRIDE < 0:
            turned = turned + (values[STEPS - 1 - i],)
        elif BOTH and STEPS > 1:
            turned = turned + (tl.where(second, values[STEPS - 1 - i], values[i]),)
        else:
            turned = turned + (values[i],)
    return turned


@triton.jit
def load_steps(
    row,
    first,
    count,
    second,
    STRIDE: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """STEPS steps from ``first`` on of each lane's row, zero from step ``count`` on: as loaded, see ``take_steps``.

    ALIGNED: steps lie side by side, STEPS at a time in aligned words: each lane loads its own at once.

    Where BOTH directions share the launch (not ALIGNED, STRIDE positive), the second one's rows begin with the last of
    STEPS steps, see ``row_of``: so distances within them are constants in either direction.
    """
    if ALIGNED:
        at, mask = _tile(row, first, count, STRIDE, STEPS)
        return tl.load(at, mask=mask, other=0.0)
    else:
        values = ()
        start = row + first.to(tl.int64) * tl.where(second, -STRIDE, STRIDE)
        for i in tl.static_range(STEPS):
            step = first + tl.where(second, STEPS - 1 - i, i)
            values = values + (load_one(start + i * STRIDE, step < count, NATIVE),)
        return values


@triton.jit
def take_steps(loaded, second, STRIDE: tl.constexpr, STEPS: tl.constexpr, ALIGNED: tl.constexpr, BOTH: tl.constexpr):
    """What ``load_steps`` loaded, as a tuple of float32."""
    if ALIGNED:
        loaded = unstack(loaded, STEPS)
    loaded = _in_order(loaded, second, STRIDE, STEPS, ALIGNED, BOTH)
    values = ()
    for i in tl.static_range(STEPS):
        values = values + (loaded[i].to(tl.float32),)
    return values


@triton.jit
def store_steps(
    row,
    first,
    count,
    values,
    second,
    STRIDE: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BOTH: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Store a lane's STEPS values to its row, those before step ``count``; see ``load_steps``."""
    values = _in_order(values, second, STRIDE, STEPS, ALIGNED, BOTH)
    if ALIGNED:
        at, mask = _tile(row, first, count, STRIDE, STEPS)
        tl.store(at, stack(values, STEPS).to(row.dtype.element_ty), mask=mask)
    else:
        start = row + first.to(tl.int64) * tl.where(second, -STRIDE, STRIDE)
        for i in tl.static_range(STEPS):
            step = first + tl.where(second, STEPS - 1 - i, i)
            store_one(start + i * STRIDE, values[i], step < count, NATIVE)
