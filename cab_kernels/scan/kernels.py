"""The selective scan in Triton, forward and backward.

Per channel, a state ``h`` of ``dstate`` numbers (Mamba, arXiv:2312.00752, where h, x, B, C, Delta, A are h, u, B, C,
delta and A here)::

    delta'_t = softplus(delta_t + delta_bias)
    a_t      = exp(delta'_t A)                         "decay"
    h_t      = a_t h_{t-1} + delta'_t u_t B_t          "state"
    y_t      = <C_t, h_t> + D u_t,   out_t = y_t silu(z_t)

Tiling: a program owns one sequence and a block of channels, which never straddles two groups, and walks over time
with the state in registers, (BLOCK_DIM, BLOCK_DSTATE) in float32. All products are on grid axis 0.

Forward keeps nothing for backward but its inputs. A backward program first runs the states again and writes down the
one before every chunk of ``CHUNK`` steps; then it takes the chunks from the last to the first: the states before each
of the chunk's steps go to a scratch of ``CHUNK`` tiles, and the steps are walked back with ``dh_t``, the gradient of
the state, in registers::

    dy_t = dout_t silu(z_t)        dh_t = C_t dy_t + a_{t+1} dh_{t+1}        w_t = dh_t a_t h_{t-1}
    d(delta'_t) = <w_t, A> + <dh_t, B_t> u_t             du_t = <dh_t, B_t> delta'_t + D dy_t
    dA = sum of w_t delta'_t       dB_t = sum over channels of dh_t delta'_t u_t      dC_t = likewise of h_t dy_t

What several programs add to goes to float32 buffers, one part a program (of a group's channels for dB and dC, of the
sequences for the rest), and is summed afterwards: the same bits in every run.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # steps between the states that backward writes down: scratch is least at sqrt(length), flat around it
STATE_TILE = 512  # numbers of state a program of one warp carries: 16 a lane


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to float32's precision at any x, and x beyond 20.

    With e = exp(-|x|), log(1 + e) = 2 atanh(e / (2 + e)), by its series; a logarithm of 1 + e would lose a small e.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17))
    series = 1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * series))
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * series))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * series)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _owned(length, dim, groups, cu_seqlens_ptr, BLOCK_DIM: tl.constexpr):
    """This program's sequence, its place in the batch, its first step and its end; group, block of the group, channels
    and their mask."""
    channels = dim // groups
    blocks = tl.cdiv(channels, BLOCK_DIM)
    pid = tl.program_id(0)
    sequence = (pid // (groups * blocks)).to(tl.int64)
    group = (pid % (groups * blocks) // blocks).to(tl.int64)
    block = pid % blocks
    if cu_seqlens_ptr is None:
        batch = sequence
        start = sequence * 0
        end = start + length
    else:
        batch = sequence * 0
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    offs = block * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    return sequence, batch, start, end, group, block, group * channels + offs, offs < channels


@triton.jit
def _load_or_zeros(ptr, offs, mask):
    """A parameter or a state; zeros where it is absent."""
    if ptr is None:
        values = tl.zeros(offs.shape, dtype=tl.float32)
    else:
        values = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _load_channels(ptr, strides, batch, offs_dim, mask_dim, t):
    """One step of a (batch, dim, length) tensor."""
    offs = batch * strides[0] + offs_dim * strides[1] + t * strides[2]
    return tl.load(ptr + offs, mask=mask_dim, other=0.0).to(tl.float32)


@triton.jit
def _store_channels(ptr, strides, batch, offs_dim, mask_dim, t, value):
    if ptr is not None:
        offs = batch * strides[0] + offs_dim * strides[1] + t * strides[2]
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask_dim)


@triton.jit
def _load_projection(
    ptr, strides, batch, group, offs_dim, mask_dim, t, dstate, CONSTANT: tl.constexpr, BLOCK_DSTATE: tl.constexpr
):
    """B or C of one step: (1, BLOCK_DSTATE), or (BLOCK_DIM, BLOCK_DSTATE) if constant."""
    offs_state = tl.arange(0, BLOCK_DSTATE)[None, :].to(tl.int64)
    mask = offs_state < dstate
    if CONSTANT:
        offs = offs_dim[:, None] * strides[0] + offs_state * strides[1]
        mask = mask & mask_dim[:, None]
    else:
        offs = batch * strides[0] + group * strides[1] + offs_state * strides[2] + t * strides[3]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus_or_not(x, DELTA_SOFTPLUS: tl.constexpr):
    return _softplus(x) if DELTA_SOFTPLUS else x


@triton.jit(do_not_specialize=["length"])
def _selective_scan_fwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, delta_bias_ptr, initial_state_ptr, cu_seqlens_ptr,
    out_ptr, last_state_ptr,
    strides_u, strides_delta, strides_B, strides_C, strides_z, strides_out,
    length, dim, dstate, groups,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_DSTATE: tl.constexpr,
):  # fmt: skip
    """Owns one sequence of a block of channels: reads its inputs once, writes its output and its last state."""
    sequence, batch, start, end, group, _, offs_dim, mask_dim = _owned(length, dim, groups, cu_seqlens_ptr, BLOCK_DIM)
    offs_state = tl.arange(0, BLOCK_DSTATE)[None, :]
    mask = mask_dim[:, None] & (offs_state < dstate)
    offs = (sequence * dim + offs_dim)[:, None] * dstate + offs_state
    A = _load_or_zeros(A_ptr, offs_dim[:, None] * dstate + offs_state, mask)
    D = _load_or_zeros(D_ptr, offs_dim, mask_dim)
    bias = _load_or_zeros(delta_bias_ptr, offs_dim, mask_dim)
    h = _load_or_zeros(initial_state_ptr, offs, mask)
    for i in range(start, end):
        t = start + end - 1 - i if REVERSE else i
        u = _load_channels(u_ptr, strides_u, batch, offs_dim, mask_dim, t)
        step = _load_channels(delta_ptr, strides_delta, batch, offs_dim, mask_dim, t) + bias
        step = _softplus_or_not(step, DELTA_SOFTPLUS)
        B = _load_projection(B_ptr, strides_B, batch, group, offs_dim, mask_dim, t, dstate, CONSTANT_B, BLOCK_DSTATE)
        C = _load_projection(C_ptr, strides_C, batch, group, offs_dim, mask_dim, t, dstate, CONSTANT_C, BLOCK_DSTATE)
        h = tl.exp(step[:, None] * A) * h + (step * u)[:, None] * B
        y = tl.sum(h * C, axis=1)
        if D_ptr is not None:
            y += D * u
        if z_ptr is not None:
            z = _load_channels(z_ptr, strides_z, batch, offs_dim, mask_dim, t)
            y *= z * _sigmoid(z)
        _store_channels(out_ptr, strides_out, batch, offs_dim, mask_dim, t, y)
    if last_state_ptr is not None:
        tl.store(last_state_ptr + offs, h, mask=mask)


@triton.jit
def _advance(
    h, A, bias, u_ptr, delta_ptr, B_ptr, strides_u, strides_delta, strides_B, batch, group, offs_dim, mask_dim, t,
    dstate, DELTA_SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr, BLOCK_DSTATE: tl.constexpr,
):  # fmt: skip
    """The state after step t."""
    u = _load_channels(u_ptr, strides_u, batch, offs_dim, mask_dim, t)
    step = _load_channels(delta_ptr, strides_delta, batch, offs_dim, mask_dim, t) + bias
    step = _softplus_or_not(step, DELTA_SOFTPLUS)
    B = _load_projection(B_ptr, strides_B, batch, group, offs_dim, mask_dim, t, dstate, CONSTANT_B, BLOCK_DSTATE)
    return tl.exp(step[:, None] * A) * h + (step * u)[:, None] * B


@triton.jit(do_not_specialize=["length", "befores"])
def _selective_scan_bwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, delta_bias_ptr, initial_state_ptr, cu_seqlens_ptr,
    dout_ptr, dlast_state_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, ddelta_bias_ptr, dinitial_state_ptr,
    befores_ptr, states_ptr,
    strides_u, strides_delta, strides_B, strides_C, strides_z, strides_dout, strides_du, strides_ddelta, strides_dz,
    length, dim, dstate, groups, befores,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DSTATE: tl.constexpr,
):  # fmt: skip
    """Owns one sequence of a block of channels: reads its inputs three times, writes its gradients and parts of sums.

    A gradient whose pointer is None is not wanted. Scratch: befores_ptr (blocks, befores, tile) for the state before
    each chunk, states_ptr (programs, CHUNK, tile) for the state before each step of the present chunk.
    """
    sequence, batch, start, end, group, block, offs_dim, mask_dim = _owned(
        length, dim, groups, cu_seqlens_ptr, BLOCK_DIM
    )
    offs_state = tl.arange(0, BLOCK_DSTATE)[None, :]
    mask = mask_dim[:, None] & (offs_state < dstate)
    offs = (sequence * dim + offs_dim)[:, None] * dstate + offs_state
    A = _load_or_zeros(A_ptr, offs_dim[:, None] * dstate + offs_state, mask)
    D = _load_or_zeros(D_ptr, offs_dim, mask_dim)
    bias = _load_or_zeros(delta_bias_ptr, offs_dim, mask_dim)

    # Of the steps of all sequences, one after the other, this one's are the first: as many chunks at most lie before.
    tile = tl.arange(0, BLOCK_DIM)[:, None] * BLOCK_DSTATE + offs_state
    first = start if cu_seqlens_ptr is not None else sequence * length
    blocks = tl.cdiv(dim // groups, BLOCK_DIM)
    befores_ptr += ((group * blocks + block) * befores + first // CHUNK + sequence) * (BLOCK_DIM * BLOCK_DSTATE) + tile
    states_ptr += tl.program_id(0).to(tl.int64) * (CHUNK * BLOCK_DIM * BLOCK_DSTATE) + tile
    h = _load_or_zeros(initial_state_ptr, offs, mask)
    for i in range(start, end):
        if (i - start) % CHUNK == 0:
            tl.store(befores_ptr + (i - start) // CHUNK * (BLOCK_DIM * BLOCK_DSTATE), h)
        t = start + end - 1 - i if REVERSE else i
        h = _advance(
            h, A, bias, u_ptr, delta_ptr, B_ptr, strides_u, strides_delta, strides_B, batch, group, offs_dim, mask_dim,
            t, dstate, DELTA_SOFTPLUS, CONSTANT_B, BLOCK_DSTATE,
        )  # fmt: skip

    dh = _load_or_zeros(dlast_state_ptr, offs, mask)
    dA = tl.zeros((BLOCK_DIM, BLOCK_DSTATE), dtype=tl.float32)
    dB = tl.zeros((BLOCK_DIM, BLOCK_DSTATE), dtype=tl.float32)
    dC = tl.zeros((BLOCK_DIM, BLOCK_DSTATE), dtype=tl.float32)
    dD = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    batch_group_block = (batch * groups + group) * blocks + block
    chunks = tl.cdiv(end - start, CHUNK)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        chunk_start = start + chunk * CHUNK
        chunk_end = tl.minimum(chunk_start + CHUNK, end)
        # Barriers: a thread may load what another one stored.
        tl.debug_barrier()
        h = tl.load(befores_ptr + chunk * (BLOCK_DIM * BLOCK_DSTATE))
        for i in range(chunk_start, chunk_end):
            tl.store(states_ptr + (i - chunk_start) * (BLOCK_DIM * BLOCK_DSTATE), h)
            t = start + end - 1 - i if REVERSE else i
            h = _advance(
                h, A, bias, u_ptr, delta_ptr, B_ptr, strides_u, strides_delta, strides_B, batch, group, offs_dim,
                mask_dim, t, dstate, DELTA_SOFTPLUS, CONSTANT_B, BLOCK_DSTATE,
            )  # fmt: skip
        tl.debug_barrier()
        # Sums over time are sums over chunks of sums over steps: one after the other, thousands of terms lose digits.
        dA_chunk = tl.zeros((BLOCK_DIM, BLOCK_DSTATE), dtype=tl.float32)
        dB_chunk = tl.zeros((BLOCK_DIM, BLOCK_DSTATE), dtype=tl.float32)
        dC_chunk = tl.zeros((BLOCK_DIM, BLOCK_DSTATE), dtype=tl.float32)
        dD_chunk = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        dbias_chunk = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        for forth in range(chunk_start, chunk_end):
            i = chunk_start + chunk_end - 1 - forth
            t = start + end - 1 - i if REVERSE else i
            u = _load_channels(u_ptr, strides_u, batch, offs_dim, mask_dim, t)
            biased = _load_channels(delta_ptr, strides_delta, batch, offs_dim, mask_dim, t) + bias
            step = _softplus_or_not(biased, DELTA_SOFTPLUS)
            B = _load_projection(
                B_ptr, strides_B, batch, group, offs_dim, mask_dim, t, dstate, CONSTANT_B, BLOCK_DSTATE
            )
            C = _load_projection(
                C_ptr, strides_C, batch, group, offs_dim, mask_dim, t, dstate, CONSTANT_C, BLOCK_DSTATE
            )
            decayed = tl.exp(step[:, None] * A) * tl.load(states_ptr + (i - chunk_start) * (BLOCK_DIM * BLOCK_DSTATE))
            h = decayed + (step * u)[:, None] * B
            dy = _load_channels(dout_ptr, strides_dout, batch, offs_dim, mask_dim, t)
            if z_ptr is not None:
                z = _load_channels(z_ptr, strides_z, batch, offs_dim, mask_dim, t)
                gate = _sigmoid(z)
                dz = dy * (tl.sum(h * C, axis=1) + D * u) * gate * (1.0 + z * (1.0 - gate))
                _store_channels(dz_ptr, strides_dz, batch, offs_dim, mask_dim, t, dz)
                dy *= z * gate

            dh += dy[:, None] * C
            dx = tl.sum(dh * B, axis=1)
            dexponent = dh * decayed
            dstep = tl.sum(dexponent * A, axis=1) + dx * u
            if DELTA_SOFTPLUS:
                dstep *= _sigmoid(biased)  # 1 in float32 long before 20, where softplus ends
            _store_channels(ddelta_ptr, strides_ddelta, batch, offs_dim, mask_dim, t, dstep)
            _store_channels(du_ptr, strides_du, batch, offs_dim, mask_dim, t, dx * step + dy * D)
            dA_chunk += dexponent * step[:, None]
            dD_chunk += dy * u
            dbias_chunk += dstep
            dB_t = dh * (step * u)[:, None]
            dC_t = h * dy[:, None]
            offs_sum = (batch_group_block * length + t) * dstate + offs_state
            if CONSTANT_B:
                dB_chunk += dB_t
            elif dB_ptr is not None:
                tl.store(dB_ptr + offs_sum, tl.sum(dB_t, axis=0)[None, :], mask=offs_state < dstate)
            if CONSTANT_C:
                dC_chunk += dC_t
            elif dC_ptr is not None:
                tl.store(dC_ptr + offs_sum, tl.sum(dC_t, axis=0)[None, :], mask=offs_state < dstate)
            dh *= tl.exp(step[:, None] * A)
        dA += dA_chunk
        dB += dB_chunk
        dC += dC_chunk
        dD += dD_chunk
        dbias += dbias_chunk

    if dA_ptr is not None:
        tl.store(dA_ptr + offs, dA, mask=mask)
    if CONSTANT_B and dB_ptr is not None:
        tl.store(dB_ptr + offs, dB, mask=mask)
    if CONSTANT_C and dC_ptr is not None:
        tl.store(dC_ptr + offs, dC, mask=mask)
    if dD_ptr is not None:
        tl.store(dD_ptr + sequence * dim + offs_dim, dD, mask=mask_dim)
    if ddelta_bias_ptr is not None:
        tl.store(ddelta_bias_ptr + sequence * dim + offs_dim, dbias, mask=mask_dim)
    if dinitial_state_ptr is not None:
        tl.store(dinitial_state_ptr + offs, dh, mask=mask)


class _Shape:
    """The sizes of a call, and the blocks that share its work."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.dim, self.length = u.shape
        self.dstate = A.shape[1]
        self.groups = next((matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4), 1)
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.block_dstate = triton.next_power_of_2(self.dstate)
        channels = self.dim // self.groups
        self.block_dim = max(1, min(triton.next_power_of_2(channels), 64, STATE_TILE // self.block_dstate))
        self.blocks = triton.cdiv(channels, self.block_dim)
        self.grid = (self.sequences * self.groups * self.blocks,)
        # A sequence of n steps has at most (n + CHUNK - 1) / CHUNK chunks; see where the kernel places them.
        self.befores = self.batch * self.length // CHUNK + self.sequences

    def arguments(self) -> dict[str, int]:
        return {"length": self.length, "dim": self.dim, "dstate": self.dstate, "groups": self.groups}

    def options(self) -> dict[str, int | bool]:
        return {
            "BLOCK_DIM": self.block_dim,
            "BLOCK_DSTATE": self.block_dstate,
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _with_groups(matrix: Tensor) -> Tensor:
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


def selective_scan_fwd(
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
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; the last state is empty unless asked for."""
    out, last_state = _new_results(u, A, cu_seqlens, return_last_state)
    B, C = _with_groups(B), _with_groups(C)
    shape = _Shape(u, A, B, C, cu_seqlens)
    with _on_device(u):
        _selective_scan_fwd_kernel[shape.grid](
            u_ptr=u,
            delta_ptr=delta,
            A_ptr=A.contiguous(),
            B_ptr=B,
            C_ptr=C,
            D_ptr=_contiguous(D),
            z_ptr=z,
            delta_bias_ptr=_contiguous(delta_bias),
            initial_state_ptr=_contiguous(initial_state),
            cu_seqlens_ptr=_contiguous(cu_seqlens),
            out_ptr=out,
            last_state_ptr=last_state if return_last_state else None,
            strides_u=u.stride(),
            strides_delta=delta.stride(),
            strides_B=B.stride(),
            strides_C=C.stride(),
            strides_z=_strides(z),
            strides_out=out.stride(),
            DELTA_SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            CONSTANT_B=B.dim() == 2,
            CONSTANT_C=C.dim() == 2,
            **shape.arguments(),
            **shape.options(),
        )
    return out, last_state


def selective_scan_bwd(
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
    delta_softplus: bool,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """Run the backward kernel; ``wanted`` says which of the nine tensors from u to initial_state get a gradient."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    gradients = [torch.empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    B, C = _with_groups(B), _with_groups(C)
    shape = _Shape(u, A, B, C, cu_seqlens)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=u.device)

    def parts(gradient: Tensor | None) -> Tensor | None:
        """Room for what each program adds: (sequences, ...), or (batch, groups, blocks, length, dstate)."""
        if gradient is None:
            return None
        if gradient.dim() <= 2:
            return new(shape.sequences, *gradient.shape)
        return new(shape.batch, shape.groups, shape.blocks, shape.length, shape.dstate)

    sums = {"dA": dA, "dB": dB, "dC": dC, "dD": dD, "ddelta_bias": ddelta_bias}
    parts_of = {name: parts(gradient) for name, gradient in sums.items()}
    dinitial = None if dinitial_state is None else new(*dinitial_state.shape)
    tile = (shape.block_dim, shape.block_dstate)
    with _on_device(u):
        _selective_scan_bwd_kernel[shape.grid](
            u_ptr=u,
            delta_ptr=delta,
            A_ptr=A.contiguous(),
            B_ptr=B,
            C_ptr=C,
            D_ptr=_contiguous(D),
            z_ptr=z,
            delta_bias_ptr=_contiguous(delta_bias),
            initial_state_ptr=_contiguous(initial_state),
            cu_seqlens_ptr=_contiguous(cu_seqlens),
            dout_ptr=dout,
            dlast_state_ptr=_contiguous(dlast_state),
            du_ptr=du,
            ddelta_ptr=ddelta,
            dz_ptr=dz,
            dinitial_state_ptr=dinitial,
            **{f"{name}_ptr": buffer for name, buffer in parts_of.items()},
            befores_ptr=new(shape.groups * shape.blocks, shape.befores, *tile),
            states_ptr=new(shape.grid[0], CHUNK, *tile),
            strides_u=u.stride(),
            strides_delta=delta.stride(),
            strides_B=B.stride(),
            strides_C=C.stride(),
            strides_z=_strides(z),
            strides_dout=dout.stride(),
            strides_du=_strides(du),
            strides_ddelta=_strides(ddelta),
            strides_dz=_strides(dz),
            befores=shape.befores,
            DELTA_SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            CONSTANT_B=B.dim() == 2,
            CONSTANT_C=C.dim() == 2,
            CHUNK=CHUNK,
            **shape.arguments(),
            **shape.options(),
        )
    for name, gradient in sums.items():
        if gradient is not None:
            _add_up(parts_of[name], gradient)
    if dinitial is not None:
        dinitial_state.copy_(dinitial)
    return [gradient for gradient in gradients if gradient is not None]


def _add_up(parts: Tensor, gradient: Tensor) -> None:
    """Sum what the programs have added, in a fixed order, in float32, and round once."""
    if gradient.dim() <= 2:
        gradient.copy_(parts.sum(0))
    else:
        gradient.copy_(parts.sum(2).mT.view(gradient.shape))


def _new_results(u: Tensor, A: Tensor, cu_seqlens: Tensor | None, return_last_state: bool) -> tuple[Tensor, Tensor]:
    sequences = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
    size = (sequences, *A.shape) if return_last_state else (0,)
    return torch.empty_like(u), torch.empty(size, dtype=torch.float32, device=u.device)


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
) -> tuple[Tensor, Tensor]:
    """``selective_scan_fn`` without its checks; the last state is empty unless asked for."""
    return selective_scan_fwd(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state
    )


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state):
    return _new_results(u, A, cu_seqlens, return_last_state)


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
    delta_softplus: bool,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients of ``selective_scan``, in the order of its arguments. It has none of its own."""
    return selective_scan_bwd(
        dout,
        dlast_state,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        cu_seqlens,
        delta_softplus,
        reverse,
        wanted,
    )


@selective_scan_backward.register_fake
def _(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, reverse, wanted):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [torch.empty_like(x) for x, want in zip(inputs, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.return_last_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast_state):
    tensors = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:9])
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    dlast_state = dlast_state if ctx.return_last_state else None
    gradients = iter(selective_scan_backward(dout, dlast_state, *tensors, ctx.delta_softplus, ctx.reverse, wanted))
    return *(next(gradients) if want else None for want in wanted), None, None, None, None


selective_scan.register_autograd(_backward, setup_context=_setup_context)
