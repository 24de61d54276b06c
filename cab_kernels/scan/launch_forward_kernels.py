"""Launches the selective scan's forward pass."""

import dataclasses

import torch
from torch import Tensor

from cab_kernels.scan.forward_kernels import _selective_scan_fwd_kernel
from cab_kernels.scan.launch_kernels import (
    Call,
    contiguous,
    each_of,
    first_of,
    on_device,
    padded,
    pointer_of,
)
from cab_kernels.scan.states_kernels import _sweep_kernel
from cab_kernels.scan.tilings import NARROW, Tiling

FEW = 800  # programs of one warp: six a multiprocessor
FILL = 640  # with fewer programs, forward is faster in pieces, at nearly twice the exponentials
FILL_PIECES = 16384  # and then in about so many


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state, keep
):
    """Run the forward kernel; the last state is empty unless asked for. A state in ``keep`` steps is kept for backward.

    Of a bidirectional scan, all but z comes in pairs (lists), and the output is the sum over both directions.
    """
    out, last_state, states = new_results(u, A, cu_seqlens, return_last_state, keep)
    call = Call(u, A, B, C, cu_seqlens, delta_softplus, reverse, span=keep or None)
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
    sweep = call.tiling()
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
    programs = max(1, call.blocks(call.tiling()) * call.sequences)
    fill = min(FILL, call.length // 2 + 1)  # without pieces it takes time by the steps, with them by the states
    if call.cu_seqlens is not None or call.length <= 2 * call.span or programs >= fill:
        return call.length
    return max(1, call.length * programs // (FILL_PIECES * call.span)) * call.span


def _forward_tiling(call: Call, tasks: int) -> Tiling:
    """What is fastest, as README.md says."""
    tiling = call.tiling()
    if call.N != 16:
        return tiling
    if call.by_step or call.blocks(tiling) * tasks < FEW:
        return NARROW
    return dataclasses.replace(tiling, registers=168 if call.element_size == 4 else 128)


def new_results(u, A, cu_seqlens, return_last_state, keep):
    out, channels = each_of(torch.empty_like, u), len(first_of(A)) * (len(A) if isinstance(A, list) else 1)
    u, A = first_of(u), first_of(A)
    sequences = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
    size = (sequences, *A.shape) if return_last_state else (0,)
    states = (0,)
    if keep:
        states = (len(u) * u.shape[2] // keep + sequences, channels, padded(A.shape[1], u))
    last_state, kept = (torch.empty(shape, dtype=torch.float32, device=u.device) for shape in (size, states))
    return out, last_state, kept
