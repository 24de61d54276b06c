"""Launches the selective scan's kernels, and makes an op of them that differentiates and compiles."""

import dataclasses
import itertools

import torch
import triton
from torch import Tensor

from cab_kernels.scan.backward_kernels import _selective_scan_bwd_kernel, _sum_parts_kernel, _sum_rows_kernel
from cab_kernels.scan.forward_kernels import _selective_scan_fwd_kernel
from cab_kernels.scan.launch_kernels import (
    Call,
    Tiling,
    contiguous,
    each_of,
    first_of,
    is_by_step,
    is_constant,
    on_device,
    padded,
    pointer_of,
    span_of,
    strides_of,
    with_groups,
)
from cab_kernels.scan.states_kernels import _sweep_kernel

# By the number of states, a power of two; measured on an H100 and an H200, Triton 3.6, bf16: README.md has shapes,
# times and what else was tried.
TILINGS = {
    1: Tiling(1, 1, 1, 8, 1),
    2: Tiling(1, 1, 2, 8, 1),
    4: Tiling(1, 1, 4, 8, 1),
    8: Tiling(2, 2, 4, 8, 1),
    16: Tiling(4, 2, 4, 4, 2),
    32: Tiling(8, 2, 4, 2, 4),
    64: Tiling(16, 2, 4, 1, 8),
    128: Tiling(32, 2, 4, 1, 8),
    256: Tiling(32, 2, 8, 1, 8),
}
# Where steps lie side by side: of few states, more lanes share a channel, so that a load meets fewer rows of memory.
BY_STEP = TILINGS | {4: Tiling(4, 1, 1, 4, 4), 8: Tiling(4, 1, 2, 4, 4)}
IN_WORDS = BY_STEP | {4: Tiling(2, 1, 2, 8, 2)}  # eight of which a lane reads at once
# Forward of few programs: twice the warps, of half the channels each, which take twice the steps at a time. And forward
# of numbers whose steps lie side by side, of which a lane reads its four at once.
NARROW = Tiling(4, 1, 4, 4, 4, registers=128)
BACKWARD = {64: Tiling(8, 2, 8, 1, 4)}
MOST_BACKWARD = 64  # states at a time: of more, a warp would sum dB and dC over too few channels
FEW = 800  # programs of one warp: six a multiprocessor
FILL_FORWARD = 640  # with fewer programs, forward is faster in pieces, at nearly twice the exponentials
FILL_PIECES = 16384  # and then in about so many
FILL_BACKWARD = 2048  # with fewer programs, backward is faster by spans


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state, keep
):
    """Run the forward kernel; the last state is empty unless asked for.

    Of a bidirectional scan, all but z comes in pairs (lists), and the output is the sum over both directions.
    """
    out, last_state, states = new_results(u, A, cu_seqlens, return_last_state, keep)
    call = Call(u, A, B, C, cu_seqlens, delta_softplus, reverse)
    A, D, delta_bias, initial_state = map(contiguous, (A, D, delta_bias, initial_state))
    chunk = _chunk(call)
    tasks = call.sequences if chunk == call.length else call.tasks(chunk)
    tiling = _forward_tiling(call, tasks)
    turns = call.turns(call.blocks(tiling))
    with on_device(call.device):
        call.pack()
        starts = _starts(call, chunk, u, delta, A, delta_bias, initial_state) if chunk < call.length else None
        for turn, blocks in turns:
            before = out[0] if turn == 1 else None
            _selective_scan_fwd_kernel[(len(blocks) * tasks,)](
                **call.projections(),
                A_ptr=pointer_of(A, turn),
                delta_bias_ptr=pointer_of(delta_bias, turn),
                **call.activations({"u": u, "delta": delta, "z": z, "before": before, "out": out}, tiling, turn),
                D_ptr=pointer_of(D, turn),
                initial_ptr=initial_state,
                starts_ptr=starts,
                states_ptr=states if keep else None,
                last_ptr=last_state if return_last_state else None,
                chunk=chunk,
                blocks=len(blocks),
                first_block=blocks.start,
                SPLIT=chunk < call.length,
                size=call.span,
                **call.shared(tiling, turn),
            )
    if call.both:
        out = out[0].add_(out[1]) if len(turns) == 1 else out[1]
    return out, last_state, states


def _starts(call: Call, chunk: int, u, delta, A, delta_bias, initial_state) -> Tensor:
    """The state before each piece of ``chunk`` steps, made from all pieces at once."""
    starts = call.new(call.numbered(chunk), call.dim, call.N)
    decays = torch.empty_like(starts)
    sweep = _tiling(call)
    tasks = call.tasks(chunk)
    _sweep_kernel[(call.blocks(sweep) * tasks,)](
        **call.projections(),
        A_ptr=pointer_of(A),
        delta_bias_ptr=pointer_of(delta_bias),
        **call.activations({"u": u, "delta": delta, "z": None, "dout": None}, sweep),
        states_ptr=starts,
        befores_ptr=None,
        decays_ptr=decays,
        adjoints_ptr=None,
        blocks=call.blocks(sweep),
        first_block=0,
        first_channel=0,
        befores_dim=0,
        size=chunk,
        LOCAL=True,
        ADJOINT=False,
        ORDERS=1,
        **call.shared(sweep),
    )
    call.chain(starts, decays, initial_state, False, (0, call.dim), chunk)
    return starts


def _chunk(call: Call) -> int:
    """How many steps forward takes at a time: all, unless programs are too few to fill a GPU, for many steps."""
    programs = max(1, call.blocks(_tiling(call)) * call.sequences)
    fill = min(FILL_FORWARD, call.length // 2 + 1)  # without pieces it takes time by the steps, with them by the states
    if call.cu_seqlens is not None or call.length <= 2 * call.span or programs >= fill:
        return call.length
    return max(1, call.length * programs // (FILL_PIECES * call.span)) * call.span


def _tiling(call: Call) -> Tiling:
    return (IN_WORDS if call.whole_words else BY_STEP if call.by_step else TILINGS)[call.N]


def _forward_tiling(call: Call, tasks: int) -> Tiling:
    """What is fastest, as README.md says."""
    tiling = _tiling(call)
    if call.N != 16:
        return tiling
    if call.by_step or call.blocks(tiling) * tasks < FEW:
        return NARROW
    return dataclasses.replace(tiling, registers=168 if call.element_size == 4 else 128)


def selective_scan_bwd(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, states, delta_softplus, reverse,
    gradients,
):  # fmt: skip
    """Run the backward kernels, which write the ``gradients`` of the nine tensors from u to initial_state, or None.

    ``new_gradients`` makes them; those of activations may as well be views of any strides. Of a bidirectional scan, all
    but dout and z comes in pairs of the same strides, and so do the gradients; those of parameters are one tensor,
    (2, ...).
    """
    call = Call(u, A, B, C, cu_seqlens, delta_softplus, reverse, N=states.shape[2])
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    run = _backward if call.N <= MOST_BACKWARD else _backward_by_states
    run(call, dout, dlast_state, inputs, states, gradients)


def _backward_by_states(call: Call, dout, dlast_state, inputs, states, gradients) -> None:
    """Backward of MOST_BACKWARD states after the other; what all of them give to is added up in float32."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    shared, totals = [du, ddelta, dz, ddelta_bias], []
    for first in range(0, call.dstate, MOST_BACKWARD):
        size = min(MOST_BACKWARD, call.dstate - first)
        N = padded(size, first_of(u))
        some = [_some_states(given, like, first, size) for given, like in ((A, A), (B, B), (C, C), (initial_state, A))]
        own = [_some_states(given, like, first, size) for given, like in ((dA, A), (dB, B), (dC, C))]
        own += [_some_states(dinitial_state, A, first, size)]
        dsome = [each_of(torch.empty_like, gradient) for gradient in own]  # contiguous, as they are to be
        parts = [each_of(lambda x: torch.empty_like(x, dtype=torch.float32), gradient) for gradient in shared]
        _backward(
            Call(u, *some[:3], call.cu_seqlens, call.softplus, call.reverse, N, call.span),
            dout,
            _some_states(dlast_state, A, first, size),
            (u, delta, *some[:3], None if first else D, z, delta_bias, some[3]),
            states[..., first : first + N].contiguous(),
            (*parts[:2], *dsome[:3], None if first else dD, *parts[2:], dsome[3]),
        )
        for gradient, part in zip(_flat(own), _flat(dsome), strict=True):
            gradient.copy_(part)
        if first == 0:
            totals = parts
        else:
            for total, part in zip(_flat(totals), _flat(parts), strict=True):
                total += part
    for gradient, total in zip(_flat(shared), _flat(totals), strict=True):
        gradient.copy_(total)


def _some_states(given, like, first: int, size: int):
    """Of a tensor, or a pair of them, whose states are where those of ``like`` are."""
    axis = -1 if is_constant(like) else -2
    return each_of(lambda tensor: tensor.narrow(axis, first, size), given)


def _flat(given: list) -> list[Tensor]:
    """The tensors that there are, pairs one by one."""
    return [tensor for one in given if one is not None for tensor in (one if isinstance(one, list) else [one])]


def _backward(call: Call, dout, dlast_state, inputs, states, gradients) -> None:
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    A, D, delta_bias, dlast_state = map(contiguous, (A, D, delta_bias, dlast_state))
    dzs = dz
    tiling = BACKWARD.get(call.N, _tiling(call))
    split = call.length > call.span and call.blocks(tiling) * call.sequences < FILL_BACKWARD
    sweep = dataclasses.replace(tiling, registers=128) if split and call.N == 16 else tiling
    blocks = call.blocks(tiling)
    tasks = call.tasks(call.span)
    main_tasks = tasks if split else call.sequences
    parameters = {"dA": dA, "dB": dB if is_constant(B) else None, "dC": dC if is_constant(C) else None}
    parameters |= {"dD": dD, "dbias": ddelta_bias}
    ends = list(itertools.accumulate(0 if x is None else x.numel() for x in parameters.values()))
    parts = call.new(main_tasks, ends[-1])  # what each task adds to the gradients of the parameters
    places = {
        f"{name}_ptr": None if gradient is None else parts.view(-1)[end - gradient.numel() :]
        for (name, gradient), end in zip(parameters.items(), ends, strict=True)
    }
    varying = [None if is_constant(matrix) else gradient for matrix, gradient in ((B, dB), (C, dC))]
    sum_rows = any(gradient is not None for gradient in varying)
    dinitial = None if dinitial_state is None else call.new(*dinitial_state.shape)
    decays = torch.empty_like(states) if split else None
    adjoints = torch.empty_like(states) if split else None
    first_channels = call.first_channels(tiling)
    turns = call.turns(blocks)
    if call.both and dz is not None:
        strides = torch.empty_like(dz).stride() if len(turns) > 1 else dz.stride()
        dzs = [torch.empty_strided(dz.shape, strides, dtype=dz.dtype, device=dz.device), dz]
    per_slice = min(_blocks_at_once(call, tiling, blocks), len(turns[0][1]))
    slices = [(turn, way[i : i + per_slice]) for turn, way in turns for i in range(0, len(way), per_slice)]
    drows = call.new(per_slice, call.total_rows, 2, call.N) if sum_rows else None
    straddle = per_slice < len(turns[0][1]) and per_slice % (blocks // call.groups)
    sums = call.new(call.groups, call.total_rows, 2, call.N) if sum_rows and straddle else None
    width = max(first_channels[slice_.stop] - first_channels[slice_.start] for _, slice_ in slices)
    befores = call.new(call.numbered(tiling.steps), width, call.N)
    given = {"u": u, "delta": delta, "z": z, "dout": dout}
    with on_device(call.device):
        call.pack(tiling.orders)
        for turn, slice_ in slices:
            channels = first_channels[slice_.start], first_channels[slice_.stop]
            common = call.projections() | {
                "A_ptr": pointer_of(A, turn),
                "delta_bias_ptr": pointer_of(delta_bias, turn),
                "befores_ptr": befores,
                "adjoints_ptr": adjoints,
                "blocks": len(slice_),
                "first_block": slice_.start,
                "first_channel": channels[0],
                "befores_dim": width,
                "ORDERS": tiling.orders,
            }
            _sweep_kernel[(len(slice_) * tasks,)](
                **common,
                **call.activations(given, sweep, turn),
                **call.shared(sweep, turn),
                states_ptr=states,
                decays_ptr=decays,
                size=call.span,
                LOCAL=False,
                ADJOINT=split,
            )
            if split:
                call.chain(adjoints, decays, dlast_state, True, channels, call.span)
            before = dzs[0] if turn == 1 and dz is not None else None
            results = {"before": before, "du": du, "ddelta": ddelta, "dz": dzs}
            _selective_scan_bwd_kernel[(len(slice_) * main_tasks,)](
                **common,
                **call.activations(given | results, tiling, turn),
                **call.shared(tiling, turn),
                D_ptr=pointer_of(D, turn),
                dlast_ptr=None if split else dlast_state,
                drows_ptr=drows,
                **places,
                parts_width=ends[-1],
                dinitial_ptr=dinitial,
                SPLIT=split,
                size=call.span,
            )
            if sum_rows:
                _sum_rows(call, drows, sums, *varying, blocks // call.groups, slice_)
        if ends[-1]:
            _sum_parts_kernel[(triton.cdiv(ends[-1], 32),)](
                parts_ptr=parts,
                **{f"{name}_ptr": gradient for name, gradient in parameters.items()},
                **{f"end_{name}": end for name, end in zip(parameters, ends, strict=True)},
                tasks=main_tasks,
                BLOCK=32,
                ROWS=32,
                num_warps=4,
                enable_fp_fusion=True,
            )
    if dinitial is not None:
        dinitial_state.copy_(dinitial)
    if isinstance(dzs, list) and len(turns) == 1:
        dz += dzs[0]


def _blocks_at_once(call: Call, tiling: Tiling, blocks: int) -> int:
    """How many blocks of channels take part at once.

    Their scratch is to be no larger than u, delta, z and out for states, and twice that for rows of dB and dC.
    """
    activations = 4 * call.batch * call.dim * call.length * call.element_size
    states = call.batch * call.length * call.dim * call.N * 4 // tiling.steps
    rows = blocks * call.batch * call.length * 2 * call.N * 4
    slices = triton.cdiv(max(states, rows // 2), max(1, activations))
    return max(1, triton.cdiv(blocks, max(1, slices)))


def _sum_rows(call: Call, drows, sums, dB, dC, blocks: int, slice_: range) -> None:
    """Add up what a slice of the blocks of channels, of which a group has so many, gave dB and dC."""
    dB, dC = each_of(with_groups, dB), each_of(with_groups, dC)
    block = at_once = max(4, min(32, 1024 // call.N))
    groups = triton.cdiv(slice_.stop, blocks) - slice_.start // blocks
    while block > 4 and call.sequences * groups * triton.cdiv(call.length, block) < FEW:
        block //= 2
    _sum_rows_kernel[(call.sequences, triton.cdiv(call.length, block), groups)](
        drows_ptr=drows,
        sums_ptr=sums,
        dB_ptr=pointer_of(dB),
        dC_ptr=pointer_of(dC),
        groups=call.groups,
        blocks=blocks,
        first_block=slice_.start,
        end_block=slice_.stop,
        strides_dB=strides_of(dB),
        strides_dC=strides_of(dC),
        dB_BY_STEP=is_by_step(dB),
        dC_BY_STEP=is_by_step(dC),
        BLOCK=block,
        ROWS=at_once // block,
        **call.of_rows(),
    )


def new_results(u, A, cu_seqlens, return_last_state, keep):
    out, channels = each_of(torch.empty_like, u), len(first_of(A)) * (len(A) if isinstance(A, list) else 1)
    u, A = first_of(u), first_of(A)
    sequences = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
    size = (sequences, *A.shape) if return_last_state else (0,)
    states = (0,)
    if keep:
        N = padded(A.shape[1], u)
        steps = len(u) * u.shape[2]
        states = (steps // span_of(channels * steps, N) + sequences, channels, N)
    last_state, kept = (torch.empty(shape, dtype=torch.float32, device=u.device) for shape in (size, states))
    return out, last_state, kept


def new_gradients(inputs: tuple, wanted: list[bool]) -> list:
    """Of activations in the layout of their inputs; of parameters, which have two axes or one, contiguous."""

    def new(given):
        if first_of(given).dim() > 2:
            return each_of(torch.empty_like, given)
        shape = (2, *given[0].shape) if isinstance(given, list) else given.shape
        return first_of(given).new_empty(shape)

    return [new(given) if given is not None and want else None for given, want in zip(inputs, wanted, strict=True)]


@torch.library.custom_op("cab_kernels::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    return_last_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``selective_scan_fn`` without its checks. The last state is empty unless asked for.

    Third, if ``keep``, a state in every ``span_of`` steps, for backward.
    """
    return selective_scan_fwd(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state, keep
    )


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, reverse, return_last_state, keep):
    return new_results(u, A, cu_seqlens, return_last_state, keep)


@torch.library.custom_op("cab_kernels::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients of ``selective_scan``, in the order of its arguments. It has none of its own."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    gradients = new_gradients(inputs, wanted)
    selective_scan_bwd(dout, dlast_state, *inputs, cu_seqlens, states, delta_softplus, reverse, gradients)
    return [gradient for gradient in gradients if gradient is not None]


@selective_scan_backward.register_fake
def _(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, states, softplus, reverse, wanted
):
    gradients = new_gradients((u, delta, A, B, C, D, z, delta_bias, initial_state), wanted)
    return [gradient for gradient in gradients if gradient is not None]


class SelectiveScan(torch.autograd.Function):
    """``(out, last_state)`` of ``selective_scan``, with their gradient.

    An ``autograd.Function`` costs Python a third of what a gradient registered with ``torch.library`` does, which lists
    the op's arguments anew for each of them.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.delta_softplus, ctx.reverse, ctx.return_last_state = arguments
        out, last_state, states = selective_scan(*arguments, True)
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        return out, last_state

    @staticmethod
    def backward(ctx, dout, dlast_state):
        tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:9])
        dout = torch.zeros_like(tensors[0]) if dout is None else dout
        dlast_state = dlast_state if ctx.return_last_state else None
        gradients = iter(selective_scan_backward(dout, dlast_state, *tensors, ctx.delta_softplus, ctx.reverse, wanted))
        return *(next(gradients) if want else None for want in wanted), None, None, None, None
