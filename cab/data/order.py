"""The order in which a run meets its images: fixed by a seed, the same for every arm, as long as the run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RunOrder(Sampler[int]):
    """Shuffled passes over ``images`` images, one after the other, ``length`` indices in all.

    A batch may reach over the end of a pass: a small subset ends a pass every few steps, and stopping there would leave
    short batches and short accumulations, and start the loading processes anew each time.
    """

    def __init__(self, images: int, length: int, seed: int) -> None:
        self.images = images
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.length
        while left > 0:
            yield from torch.randperm(self.images, generator=generator)[:left].tolist()
            left -= self.images
