"""Launches the selective scan's kernels, and makes an op of them that differentiates and compiles."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from cab_kernels._backend import interpreting
from cab_kernels.scan.backward_kernels import _selective_scan_bwd_kernel, _sum_parts_kernel, _sum_rows_kernel
from cab_kernels.scan.forward_kernels import _pack_kernel, _selective_scan_fwd_kernel
from cab_kernels.scan.states_kernels import _chain_kernel, _sweep_kernel

PAD = 32  # rows of zeros after each sequence: as many as any kernel reads beyond its end


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a warp shares out the states: see ``forward_kernels.py``.

    ``S`` lanes a channel, ``R`` channels a lane, ``NT`` states a lane; ``PARTS`` x ``STEPS`` steps an iteration, of
    which a lane owns ``STEPS``; at most so many ``registers`` a thread, if not as many as the compiler likes. Ahead of
    their iteration, forward's rows of B and C come into registers if ``ahead``, and else into the L1 cache.
    """

    S: int
    R: int
    NT: int
    STEPS: int
    PARTS: int
    registers: int | None = None
    ahead: bool = False

    @property
    def channels(self) -> int:
        return 32 // self.S * self.R

    @property
    def steps(self) -> int:
        return self.STEPS * self.PARTS

    @property
    def orders(self) -> int:
        """In how many orders of states backward's lanes share out the sums over channels."""
        return min(self.NT, 32 // self.S)


# By the number of states, a power of two. On an H100 and an H200, Triton 3.6, bf16; README.md has shapes, times and
# what else was tried for 16 states, 64 were timed with this one and one other, the rest follow from these, untimed.
TILINGS = {
    1: Tiling(1, 1, 1, 8, 1),
    2: Tiling(1, 1, 2, 8, 1),
    4: Tiling(1, 1, 4, 8, 1),
    8: Tiling(2, 2, 4, 8, 1),
    16: Tiling(4, 2, 4, 4, 2),
    32: Tiling(8, 2, 4, 2, 4),
    64: Tiling(16, 2, 4, 1, 8),
    128: Tiling(32, 2, 4, 1, 8),
    256: Tiling(32, 1, 8, 1, 8),
}
# Forward of few programs, by the bytes of a number: more warps, of fewer channels each. Of two bytes, their rows of B
# and C are touched into the L1 cache, as everywhere else; of four, they come into registers ahead of time.
NARROW = {2: Tiling(8, 2, 2, 2, 4, registers=96), 4: Tiling(8, 2, 2, 2, 4, ahead=True)}
# Backward's two passes, the sweep and the walk back, which hold the same states in a lane: over whole sequences, and
# by spans.
WHOLE = {states: (tiling, tiling) for states, tiling in TILINGS.items()}
WHOLE |= {64: (Tiling(8, 2, 8, 1, 4), Tiling(8, 2, 8, 1, 4))}
BY_SPAN = WHOLE | {16: (dataclasses.replace(TILINGS[16], registers=128), TILINGS[16])}
SPAN = 128  # steps between the states that forward keeps
FEW = 800  # programs of one warp: six a multiprocessor
FILL_FORWARD = 640  # with fewer programs, forward is faster in pieces, at nearly twice the exponentials
FILL_PIECES = 16384  # and then in about so many
FILL_BACKWARD = 2048  # with fewer programs, backward is faster by spans
FILL_DIRECTION = 2048  # with as many programs each, two directions are faster one after the other


class _Call:
    """The sizes of a call, and what all of its launches share.

    A bidirectional scan comes with pairs for tensors, of the same strides, and has the channels and the groups of both
    directions.
    """

    def __init__(self, u, A, B, C, cu_seqlens, delta_softplus: bool, reverse: bool) -> None:
        self.both = isinstance(u, list)
        u, A = _first(u), _first(A)
        self.batch, self.dim, self.length = u.shape
        self.element_size = u.element_size()
        self.dstate = A.shape[1]
        self.N = triton.next_power_of_2(self.dstate)
        self.B, self.C = _each(_with_groups, B), _each(_with_groups, C)
        self.groups = next((matrix.shape[1] for matrix in map(_first, (self.B, self.C)) if matrix.dim() == 4), 1)
        if self.both:
            self.dim, self.groups = 2 * self.dim, 2 * self.groups
        self.cu_seqlens = _contiguous(cu_seqlens)
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.total_rows = self.batch * self.length + self.sequences * PAD
        self.span = max(SPAN, 2 * self.N)
        self.reverse, self.softplus = reverse, delta_softplus
        self.device = u.device
        self.native = u.is_cuda and not interpreting() and torch.version.hip is None
        self.rows: Tensor | None = None

    def new(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def blocks(self, tiling: Tiling) -> int:
        return self.groups * triton.cdiv(self.dim // self.groups, tiling.channels)

    def turns(self, blocks: int) -> list[tuple[int | None, range]]:
        """The directions that share the launches, or take turns: which one, None for all there are, and its blocks."""
        if not self.both or blocks * self.sequences < 2 * FILL_DIRECTION:
            return [(None, range(blocks))]
        return [(0, range(blocks // 2)), (1, range(blocks // 2, blocks))]

    def numbered(self, steps: int) -> int:
        """How many numbers pieces of ``steps`` steps have: see ``sequence_of``."""
        return self.batch * self.length // steps + self.sequences

    def tasks(self, steps: int) -> int:
        """How many tasks pieces of ``steps`` steps make."""
        if self.cu_seqlens is not None:
            return self.numbered(steps)
        return self.batch * max(1, triton.cdiv(self.length, steps))

    def activations(self, tensors: dict, tiling: Tiling, turn: int | None = None) -> dict[str, object]:
        """A kernel's arguments for (batch, dim, length) tensors, or pairs of them, or None."""
        arguments: dict[str, object] = {}
        for name, tensor in tensors.items():
            pointer, strides, stride, layout = None, None, 1, 0
            if tensor is not None:
                pointer = _pointer(tensor, turn)
                tensor = _first(tensor) if turn is None else pointer
                *strides, stride = tensor.stride()
                if stride == 1 and strides[1] != 1 and not self.both:
                    bytes_ = tensor.element_size()
                    aligned = (
                        self.cu_seqlens is None
                        and self.length % tiling.STEPS == 0
                        and not any(x * bytes_ % 16 for x in (*strides, tensor.data_ptr() // bytes_))
                    )
                    layout = 2 if aligned else 1
                strides = tuple(strides)
            arguments |= {
                f"{name}_ptr": pointer,
                f"strides_{name}": strides,
                f"STRIDE_{name.upper()}": -stride if self.reverse or turn == 1 else stride,
                f"LAYOUT_{name.upper()}": layout,
            }
        return arguments

    def projections(self) -> dict[str, object]:
        return {
            "B_ptr": self.B.contiguous() if _constant(self.B) else None,
            "C_ptr": self.C.contiguous() if _constant(self.C) else None,
            "rows_ptr": self.rows,
            "total_rows": self.total_rows,
        }

    def shared(self, tiling: Tiling, turn: int | None = None) -> dict[str, object]:
        return {
            "cu_seqlens_ptr": self.cu_seqlens,
            "length": self.length,
            "channels": self.dim // self.groups,
            "groups": self.groups,
            "dim": self.dim,
            "dstate": self.dstate,
            "sequences": self.sequences,
            "SOFTPLUS": self.softplus,
            "PAD": PAD,
            "BOTH": self.both and turn is None,
            "SECOND": turn == 1,
            "NATIVE": self.native,
            **{name: getattr(tiling, name) for name in ("S", "R", "NT", "STEPS", "PARTS")},
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": True,
            **({"maxnreg": tiling.registers} if self.native and tiling.registers else {}),
        }

    def pack(self, orders: int = 1) -> None:
        """Lay B and C out by step, in float32, in the order of the scan, and each in so many orders of its states."""
        B, C = (None if _constant(matrix) else matrix for matrix in (self.B, self.C))
        self.rows = self.new(self.groups * self.total_rows + PAD, 2, orders, self.N)
        if B is None and C is None:
            return
        block = max(16, min(64, 2048 // self.N))
        _pack_kernel[(self.sequences, triton.cdiv(self.length + PAD, block), self.groups)](
            B_ptr=_pointer(B),
            C_ptr=_pointer(C),
            rows_ptr=self.rows,
            cu_seqlens_ptr=self.cu_seqlens,
            length=self.length,
            total_rows=self.total_rows,
            dstate=self.dstate,
            strides_B=_strides(B),
            strides_C=_strides(C),
            N=self.N,
            ORDERS=orders,
            PAD=PAD,
            REVERSE=self.reverse,
            B_BY_STEP=_by_step(B),
            C_BY_STEP=_by_step(C),
            BOTH=self.both,
            NATIVE=self.native,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,
        )

    def chain(self, parts, decays, start, backward: bool, channels: tuple[int, int], size: int) -> None:
        """Turn what each span of ``size`` steps adds to the states into what it starts from."""
        block = 64
        _chain_kernel[(triton.cdiv((channels[1] - channels[0]) * self.N, block), self.sequences)](
            parts_ptr=parts,
            decays_ptr=decays,
            start_ptr=start,
            cu_seqlens_ptr=self.cu_seqlens,
            length=self.length,
            dim=self.dim,
            dstate=self.dstate,
            first_channel=channels[0],
            last_channel=channels[1],
            size=size,
            N=self.N,
            BACKWARD=backward,
            AT_ONCE=16,
            BLOCK=block,
            num_warps=1,
            enable_fp_fusion=True,
        )

    def first_channels(self, tiling: Tiling) -> list[int]:
        """The first channel of each block, and the end of the last one."""
        channels = self.dim // self.groups
        starts = [g * channels + c for g in range(self.groups) for c in range(0, channels, tiling.channels)]
        return [*starts, self.dim]


def _first(given):
    """The tensor itself, or the first of a pair."""
    return given[0] if isinstance(given, list) else given


def _each(function: Callable[[Tensor], Tensor], given):
    """The function of the tensor, or of both of a pair, or None of None."""
    if isinstance(given, list):
        return [function(tensor) for tensor in given]
    return None if given is None else function(given)


def _pointer(given, turn: int | None = None):
    """As a kernel takes it: of a pair, both, or the one whose turn it is."""
    if not isinstance(given, list):
        return given
    return tuple(given) if turn is None else given[turn]


def _with_groups(matrix: Tensor) -> Tensor:
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


def _constant(matrix) -> bool:
    return _first(matrix).dim() == 2


def _strides(given) -> tuple[int, ...] | None:
    return None if given is None else _first(given).stride()


def _by_step(given) -> bool:
    """Whether steps, and not states, lie side by side in memory."""
    return given is not None and _first(given).stride(3) == 1 and _first(given).stride(2) != 1


def _contiguous(given):
    return _each(Tensor.contiguous, given)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state, keep
):
    """Run the forward kernel; the last state is empty unless asked for.

    Of a bidirectional scan, all but z comes in pairs (lists), and the output is the sum over both directions.
    """
    out, last_state, states = new_results(u, A, cu_seqlens, return_last_state, keep)
    call = _Call(u, A, B, C, cu_seqlens, delta_softplus, reverse)
    A, D, delta_bias, initial_state = map(_contiguous, (A, D, delta_bias, initial_state))
    chunk = _chunk(call)
    tasks = call.sequences if chunk == call.length else call.tasks(chunk)
    tiling = _forward_tiling(call, tasks, by_step=_first(u).stride(2) == 1)
    turns = call.turns(call.blocks(tiling))
    with _on_device(call.device):
        call.pack()
        starts = _starts(call, chunk, u, delta, A, delta_bias, initial_state) if chunk < call.length else None
        for turn, blocks in turns:
            before = out[0] if turn == 1 else None
            _selective_scan_fwd_kernel[(len(blocks) * tasks,)](
                **call.projections(),
                A_ptr=_pointer(A, turn),
                delta_bias_ptr=_pointer(delta_bias, turn),
                **call.activations({"u": u, "delta": delta, "z": z, "before": before, "out": out}, tiling, turn),
                D_ptr=_pointer(D, turn),
                initial_ptr=initial_state,
                starts_ptr=starts,
                states_ptr=states if keep else None,
                last_ptr=last_state if return_last_state else None,
                chunk=chunk,
                blocks=len(blocks),
                first_block=blocks.start,
                SPLIT=chunk < call.length,
                SPAN=call.span,
                AHEAD=tiling.ahead,
                **call.shared(tiling, turn),
            )
    if call.both:
        out = out[0].add_(out[1]) if len(turns) == 1 else out[1]
    return out, last_state, states


def _starts(call: _Call, chunk: int, u, delta, A, delta_bias, initial_state) -> Tensor:
    """The state before each piece of ``chunk`` steps, made from all pieces at once."""
    starts = call.new(call.numbered(chunk), call.dim, call.N)
    decays = torch.empty_like(starts)
    sweep = TILINGS[call.N]
    tasks = call.tasks(chunk)
    _sweep_kernel[(call.blocks(sweep) * tasks,)](
        **call.projections(),
        A_ptr=_pointer(A),
        delta_bias_ptr=_pointer(delta_bias),
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
        EVERY=sweep.steps,
        ORDERS=1,
        **call.shared(sweep),
    )
    call.chain(starts, decays, initial_state, False, (0, call.dim), chunk)
    return starts


def _chunk(call: _Call) -> int:
    """How many steps forward takes at a time: all, unless programs are too few to fill a GPU."""
    programs = max(1, call.blocks(TILINGS[call.N]) * call.sequences)
    if call.cu_seqlens is not None or call.length <= 2 * call.span or programs >= FILL_FORWARD:
        return call.length
    return max(1, call.length * programs // (FILL_PIECES * call.span)) * call.span


def _forward_tiling(call: _Call, tasks: int, by_step: bool) -> Tiling:
    """What is fastest, as README.md says; by_step: whether steps, and not channels, lie side by side in memory."""
    tiling, wide = TILINGS[call.N], call.element_size == 4
    if call.N != 16:  # the others were not timed
        return tiling
    if call.blocks(tiling) * tasks < FEW or (wide and by_step):
        return NARROW[call.element_size]
    return dataclasses.replace(tiling, registers=168 if wide or by_step else 128)


def selective_scan_bwd(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, states, delta_softplus, reverse,
    gradients,
):  # fmt: skip
    """Run the backward kernels, which write the ``gradients`` of the nine tensors from u to initial_state, or None.

    ``new_gradients`` makes them; those of activations may as well be views of any strides. Of a bidirectional scan, all
    but dout and z comes in pairs of the same strides, and so do the gradients; those of parameters are one tensor,
    (2, ...).
    """
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    call = _Call(u, A, B, C, cu_seqlens, delta_softplus, reverse)
    A, D, delta_bias, dlast_state = map(_contiguous, (A, D, delta_bias, dlast_state))
    dzs = dz
    split = call.length > call.span and call.blocks(WHOLE[call.N][1]) * call.sequences < FILL_BACKWARD
    sweep, tiling = BY_SPAN[call.N] if split else WHOLE[call.N]
    blocks = call.blocks(tiling)
    tasks = call.tasks(call.span)
    main_tasks = tasks if split else call.sequences
    parameters = {"dA": dA, "dB": dB if _constant(B) else None, "dC": dC if _constant(C) else None}
    parameters |= {"dD": dD, "dbias": ddelta_bias}
    ends = list(itertools.accumulate(0 if x is None else x.numel() for x in parameters.values()))
    parts = call.new(main_tasks, ends[-1])  # what each task adds to the gradients of the parameters
    places = {
        f"{name}_ptr": None if gradient is None else parts.view(-1)[end - gradient.numel() :]
        for (name, gradient), end in zip(parameters.items(), ends, strict=True)
    }
    varying = [None if _constant(matrix) else gradient for matrix, gradient in ((B, dB), (C, dC))]
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
    with _on_device(call.device):
        call.pack(tiling.orders)
        for turn, slice_ in slices:
            channels = first_channels[slice_.start], first_channels[slice_.stop]
            common = call.projections() | {
                "A_ptr": _pointer(A, turn),
                "delta_bias_ptr": _pointer(delta_bias, turn),
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
                EVERY=tiling.steps,
            )
            if split:
                call.chain(adjoints, decays, dlast_state, True, channels, call.span)
            before = dzs[0] if turn == 1 and dz is not None else None
            results = {"before": before, "du": du, "ddelta": ddelta, "dz": dzs}
            _selective_scan_bwd_kernel[(len(slice_) * main_tasks,)](
                **common,
                **call.activations(given | results, tiling, turn),
                **call.shared(tiling, turn),
                D_ptr=_pointer(D, turn),
                dlast_ptr=None if split else dlast_state,
                drows_ptr=drows,
                **places,
                parts_width=ends[-1],
                dinitial_ptr=dinitial,
                SPLIT=split,
                SPAN=call.span,
            )
            if sum_rows:
                _sum_rows(call, drows, sums, *varying, blocks // call.groups, slice_)
        if ends[-1]:
            _sum_parts_kernel[(triton.cdiv(ends[-1], 32),)](
                parts_ptr=parts,
                **{f"{name}_ptr": gradient for name, gradient in parameters.items()},
                **{f"end_{name}": end for name, end in zip(parameters, ends, strict=True)},
                tasks=main_tasks,
                NATIVE=call.native,
                BLOCK=32,
                ROWS=32,
                num_warps=4,
                enable_fp_fusion=True,
            )
    if dinitial is not None:
        dinitial_state.copy_(dinitial)
    if isinstance(dzs, list) and len(turns) == 1:
        dz += dzs[0]


def _blocks_at_once(call: _Call, tiling: Tiling, blocks: int) -> int:
    """How many blocks of channels take part at once.

    Their scratch is to be no larger than u, delta, z and out for states, and twice that for rows of dB and dC.
    """
    activations = 4 * call.batch * call.dim * call.length * call.element_size
    states = triton.cdiv(call.batch * call.length, tiling.steps) * call.dim * call.N * 4
    rows = blocks * call.batch * call.length * 2 * call.N * 4
    slices = triton.cdiv(max(states, rows // 2), max(1, activations))
    return max(1, triton.cdiv(blocks, max(1, slices)))


def _sum_rows(call: _Call, drows, sums, dB, dC, blocks: int, slice_: range) -> None:
    """Add up what a slice of the blocks of channels, of which a group has so many, gave dB and dC."""
    dB, dC = _each(_with_groups, dB), _each(_with_groups, dC)
    block = at_once = max(4, min(32, 1024 // call.N))
    groups = triton.cdiv(slice_.stop, blocks) - slice_.start // blocks
    while block > 4 and call.sequences * groups * triton.cdiv(call.length, block) < FEW:
        block //= 2
    _sum_rows_kernel[(call.sequences, triton.cdiv(call.length, block), groups)](
        drows_ptr=drows,
        sums_ptr=sums,
        dB_ptr=_pointer(dB),
        dC_ptr=_pointer(dC),
        cu_seqlens_ptr=call.cu_seqlens,
        length=call.length,
        total_rows=call.total_rows,
        dstate=call.dstate,
        groups=call.groups,
        blocks=blocks,
        first_block=slice_.start,
        end_block=slice_.stop,
        strides_dB=_strides(dB),
        strides_dC=_strides(dC),
        N=call.N,
        PAD=PAD,
        REVERSE=call.reverse,
        dB_BY_STEP=_by_step(dB),
        dC_BY_STEP=_by_step(dC),
        BOTH=call.both,
        NATIVE=call.native,
        BLOCK=block,
        ROWS=at_once // block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def new_results(u, A, cu_seqlens, return_last_state, keep):
    out, channels = _each(torch.empty_like, u), len(_first(A)) * (len(A) if isinstance(A, list) else 1)
    u, A = _first(u), _first(A)
    sequences = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
    size = (sequences, *A.shape) if return_last_state else (0,)
    states = (0,)
    if keep:
        N = 1 << (A.shape[1] - 1).bit_length()
        states = (len(u) * u.shape[2] // max(SPAN, 2 * N) + sequences, channels, N)
    last_state, kept = (torch.empty(shape, dtype=torch.float32, device=u.device) for shape in (size, states))
    return out, last_state, kept


def new_gradients(inputs: tuple, wanted: list[bool]) -> list:
    """Of activations in the layout of their inputs; of parameters, which have two axes or one, contiguous."""

    def new(given):
        if _first(given).dim() > 2:
            return _each(torch.empty_like, given)
        shape = (2, *given[0].shape) if isinstance(given, list) else given.shape
        return _first(given).new_empty(shape)

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

    Third, if ``keep``, a state in every ``SPAN`` steps, for backward.
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
