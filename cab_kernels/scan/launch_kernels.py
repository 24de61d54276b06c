"""What the launches of one scan share: its sizes, how tensors and pairs of them are passed, what packs and chains."""

import contextlib
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from cab_kernels._backend import interpreting
from cab_kernels.scan import tilings
from cab_kernels.scan.forward_kernels import _pack_kernel
from cab_kernels.scan.states_kernels import _chain_kernel
from cab_kernels.scan.tilings import Tiling

PAD = 32  # rows of zeros after each sequence: as many as any kernel reads beyond its end
SPANS = (32, 128)  # steps between the states that forward keeps, multiples of any iteration's
FEW_STATES = 2**19  # as many programs as fill a GPU work on so many states at a time
FEWEST_BY_STEP = 4  # states where steps lie side by side, so that lanes share a channel
FILL_DIRECTION = 2048  # with as many programs each, two directions are faster one after the other


def span_of(numbers: int, N: int) -> int:
    """How many steps lie between the states that forward keeps, of so many numbers u, of N states each.

    The longer, the less there is to put together; the shorter, the more programs share the steps.
    """
    shortest, span = SPANS
    while span > shortest and _surely(numbers * max(N, 2) < span * FEW_STATES):
        span //= 2
    return max(span, 2 * N)


def span_for(u, A) -> int:
    """``span_of`` a scan of u, or of a pair."""
    numbers = first_of(u).numel() * (len(A) if isinstance(A, list) else 1)
    return span_of(numbers, padded(first_of(A).shape[1], first_of(u)))


def span_kept(states: Tensor, steps: int, sequences: int) -> int:
    """Which span left so many states. Where there is a choice, a sequence is shorter than all that there are."""
    (shortest, span), N = SPANS, states.shape[2]
    while span > shortest and steps // max(span, 2 * N) + sequences != len(states):
        span //= 2
    return max(span, 2 * N)


def _surely(condition: bool) -> bool:
    """Whether it holds; of sizes that only the data tell, which a compiler can't compare, no."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return condition


def padded(dstate: int, u: Tensor) -> int:
    """With how many states the kernels work, for so many of a scan of u."""
    N = triton.next_power_of_2(dstate)
    return N if N >= FEWEST_BY_STEP or not is_by_step(u) else FEWEST_BY_STEP


class Call:
    """The sizes of a call, and what all of its launches share.

    A bidirectional scan comes with pairs for tensors, of the same strides, and has the channels and the groups of both
    directions. A backward pass has ``N`` and ``span`` from the states that were kept for it.
    """

    def __init__(
        self,
        u,
        A,
        B,
        C,
        cu_seqlens,
        delta_softplus: bool,
        reverse: bool,
        N: int | None = None,
        span: int | None = None,
    ) -> None:
        self.both = isinstance(u, list)
        u, A = first_of(u), first_of(A)
        self.batch, self.dim, self.length = u.shape
        self.element_size = u.element_size()
        self.dstate = A.shape[1]
        self.N = N or padded(self.dstate, u)
        self.B, self.C = each_of(with_groups, B), each_of(with_groups, C)
        self.groups = next((matrix.shape[1] for matrix in map(first_of, (self.B, self.C)) if matrix.dim() == 4), 1)
        if self.both:
            self.dim, self.groups = 2 * self.dim, 2 * self.groups
        self.cu_seqlens = contiguous(cu_seqlens)
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.total_rows = self.batch * self.length + self.sequences * PAD
        self.span = span or span_of(self.batch * self.dim * self.length, self.N)
        self.by_step = is_by_step(u)
        self.whole_words = self.by_step and cu_seqlens is None and self.length % 8 == 0  # a lane's eight steps
        self.reverse, self.softplus = reverse, delta_softplus
        self.device = u.device
        self.native = u.is_cuda and not interpreting() and torch.version.hip is None
        self.rows: Tensor | None = None

    def new(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def tiling(self) -> Tiling:
        if self.whole_words:
            return tilings.IN_WORDS[self.N]
        return (tilings.BY_STEP if self.by_step else tilings.TILINGS)[self.N]

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
            pointer, strides, stride, aligned = None, None, 1, False
            if tensor is not None:
                pointer = pointer_of(tensor, turn)
                tensor = first_of(tensor) if turn is None else pointer
                *strides, stride = tensor.stride()
                if stride == 1 and strides[1] != 1 and not self.both:
                    bytes_ = tensor.element_size()
                    aligned = (
                        self.cu_seqlens is None
                        and self.length % tiling.STEPS == 0
                        and not any(x * bytes_ % 16 for x in (*strides, tensor.data_ptr() // bytes_))
                    )
                strides = tuple(strides)
            arguments |= {
                f"{name}_ptr": pointer,
                f"strides_{name}": strides,
                f"STRIDE_{name.upper()}": -stride if self.reverse or turn == 1 else stride,
                f"ALIGNED_{name.upper()}": aligned,
            }
        return arguments

    def projections(self) -> dict[str, object]:
        return {
            "B_ptr": self.B.contiguous() if is_constant(self.B) else None,
            "C_ptr": self.C.contiguous() if is_constant(self.C) else None,
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

    def of_rows(self) -> dict[str, object]:
        """What a kernel that owns steps of a sequence and group must know of rows of B and C, and where those are."""
        return {
            "cu_seqlens_ptr": self.cu_seqlens,
            "sequences": self.sequences,
            "length": self.length,
            "total_rows": self.total_rows,
            "dstate": self.dstate,
            "N": self.N,
            "PAD": PAD,
            "REVERSE": self.reverse,
            "BOTH": self.both,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }

    def pack(self, orders: int = 1) -> None:
        """Lay B and C out by step, in float32, in the order of the scan, and each in so many orders of its states."""
        B, C = (None if is_constant(matrix) else matrix for matrix in (self.B, self.C))
        self.rows = self.new(self.groups * self.total_rows + PAD, 2, orders, self.N)
        if B is None and C is None:
            return
        block = max(16, min(64, 2048 // self.N))
        _pack_kernel[(self.sequences * triton.cdiv(self.length + PAD, block), self.groups)](
            B_ptr=pointer_of(B),
            C_ptr=pointer_of(C),
            rows_ptr=self.rows,
            strides_B=strides_of(B),
            strides_C=strides_of(C),
            ORDERS=orders,
            B_BY_STEP=is_by_step(B),
            C_BY_STEP=is_by_step(C),
            BLOCK=block,
            **self.of_rows(),
        )

    def chain(self, parts, decays, start, backward: bool, channels: tuple[int, int], size: int) -> None:
        """Turn what each span of ``size`` steps adds to the states into what it starts from."""
        block = 64
        _chain_kernel[(self.sequences, triton.cdiv((channels[1] - channels[0]) * self.N, block))](
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


def first_of(given):
    """The tensor itself, or the first of a pair."""
    return given[0] if isinstance(given, list) else given


def each_of(function: Callable[[Tensor], Tensor], given):
    """The function of the tensor, or of both of a pair, or None of None."""
    if isinstance(given, list):
        return [function(tensor) for tensor in given]
    return None if given is None else function(given)


def pointer_of(given, turn: int | None = None):
    """As a kernel takes it: of a pair, both, or the one whose turn it is."""
    if not isinstance(given, list):
        return given
    return tuple(given) if turn is None else given[turn]


def with_groups(matrix: Tensor) -> Tensor:
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


def is_constant(matrix) -> bool:
    return first_of(matrix).dim() == 2


def strides_of(given) -> tuple[int, ...] | None:
    return None if given is None else first_of(given).stride()


def is_by_step(given) -> bool:
    """Whether steps, and not states or channels, lie side by side in memory."""
    return given is not None and first_of(given).stride(-1) == 1


def contiguous(given):
    return each_of(Tensor.contiguous, given)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
