"""The order in which a run meets its data: fixed by a seed, the same for every arm, as long as the run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class Turn(NamedTuple):
    """The turn of one sample in a run: which one it is, and how many came before it."""

    sample: int
    number: int


class RunOrder(Sampler[Turn]):
    """Shuffled passes over ``samples`` samples, one after the other, ``length`` turns in all.

    A batch may reach over the end of a pass: a small subset ends a pass every few steps, and stopping there would leave
    short batches and short accumulations, and start the loading processes anew each time.

    Args:
        samples: there are.
        length: of the run.
        seed: of the order.
        repeats: times that a sample comes up in a row; a pass stays as long, and leaves samples out (arXiv:1901.09335).
    """

    def __init__(self, samples: int, length: int, seed: int, repeats: int = 1) -> None:
        self.samples = samples
        self.length = length
        self.seed = seed
        self.repeats = repeats

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Turn]:
        return (Turn(sample, number) for number, sample in enumerate(islice(self._indices(), self.length)))

    def batch(self, start: int, stop: int) -> list[int]:
        """The samples of some turns."""
        return list(islice(self._indices(), start, stop))

    def _indices(self) -> Iterator[int]:
        return chain.from_iterable(self._passes())

    def _passes(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(self.samples, generator=generator)
            yield order.repeat_interleave(self.repeats)[: self.samples].tolist()


class ByTurn(Dataset[Any]):
    """A data set asked by :class:`Turn`, whose samples depend on nothing but their turn.

    Random transforms draw from generators that are seeded for each turn, whichever process loads it and whatever that
    process has loaded before. So a resumed run sees the images that an uninterrupted one sees.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, turn: Turn) -> Any:
        with _seeded(f"{self.seed}/{turn.number}"):
            return self.dataset[turn.sample]


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Seed the generators that transforms draw from, and set them back: a training in this process draws from them."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reach for the GPU
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
