"""How the scan's kernels share out their work, by the number of states: what was fastest."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a warp shares out the states: see ``forward_kernels.py``.

    ``S`` lanes a channel, ``R`` channels a lane, ``NT`` states a lane; ``PARTS`` x ``STEPS`` steps an iteration, of
    which a lane owns ``STEPS``; at most so many ``registers`` a thread, if not as many as the compiler likes.
    """

    S: int
    R: int
    NT: int
    STEPS: int
    PARTS: int
    registers: int | None = None

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
# Backward's two passes, where these are not forward's.
BACKWARD = {64: Tiling(8, 2, 8, 1, 4)}
