"""Launches the selective scan's backward pass."""

import dataclasses
import itertools

import torch
import triton
from torch import Tensor

from cab_kernels.scan.backward_kernels import _selective_scan_bwd_kernel, _sum_parts_kernel, _sum_rows_kernel
from cab_kernels.scan.launch_kernels import (
    Call,
    contiguous,
    each_of,
    first_of,
    is_by_step,
    is_constant,
    on_device,
    padded,
    pointer_of,
    span_kept,
    strides_of,
    with_groups,
)
from cab_kernels.scan.states_kernels import _sweep_kernel
from cab_kernels.scan.tilings import BACKWARD, Tiling

FILL = 2048  # with fewer programs, backward is faster by spans
FEW_SUMS = 800  # programs that add up rows, six a multiprocessor: with fewer, each takes fewer steps
MOST_STATES = 64  # at a time: of more, a warp would sum dB and dC over too few channels


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
    call.span = span_kept(states, call.batch * call.length, call.sequences)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    run = _backward if call.N <= MOST_STATES else _backward_by_states
    run(call, dout, dlast_state, inputs, states, gradients)


def _backward_by_states(call: Call, dout, dlast_state, inputs, states, gradients) -> None:
    """Backward of MOST_STATES states after the other; what all of them give to is added up in float32."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    shared, totals = [du, ddelta, dz, ddelta_bias], []
    for first in range(0, call.dstate, MOST_STATES):
        size = min(MOST_STATES, call.dstate - first)
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
    """Backward of all states at once: see ``selective_scan_bwd``."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    A, D, delta_bias, dlast_state = map(contiguous, (A, D, delta_bias, dlast_state))
    dzs = dz
    tiling = BACKWARD.get(call.N) or call.tiling()
    split = call.length > call.span and call.blocks(tiling) * call.sequences < FILL
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
    while block > 4 and call.sequences * groups * triton.cdiv(call.length, block) < FEW_SUMS:
        block //= 2
    _sum_rows_kernel[(call.sequences * triton.cdiv(call.length, block), groups)](
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


def new_gradients(inputs: tuple, wanted: list[bool]) -> list:
    """Of activations in the layout of their inputs; of parameters, which have two axes or one, contiguous."""

    def new(given):
        if first_of(given).dim() > 2:
            return each_of(torch.empty_like, given)
        shape = (2, *given[0].shape) if isinstance(given, list) else given.shape
        return first_of(given).new_empty(shape)

    return [new(given) if given is not None and want else None for given, want in zip(inputs, wanted, strict=True)]
