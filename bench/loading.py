#!/usr/bin/env python3
"""How fast images are read: images/s on one core, from JPEGs made for the purpose.

    python bench/loading.py                     # 256 JPEGs of 500 x 375 pixels, as ImageNet's are on average
    python bench/loading.py --images 1024 --size 640 480

The JPEGs are smoothed noise, of quality 90: about as many bytes a pixel as photographs have. Each line is one core that
reads, transforms to 224 x 224 as training does, and nothing else; the GPU needs its images/s from all cores together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _machine import describe_machine
from PIL import Image, ImageFilter

from cab.config import DataConfig
from cab.data.order import ByTurn, Turn
from cab.data.vision import load

ROUNDS = 5


def make_images(root: Path, count: int, size: tuple[int, int]) -> float:
    """Write ``count`` training images, and one for the test; return their mean size in bytes."""
    generator = torch.Generator().manual_seed(0)
    for split, images in (("train", count), ("val", 1)):
        folder = root / split / "noise"
        folder.mkdir(parents=True)
        for index in range(images):
            noise = torch.randint(0, 256, (size[1] // 4, size[0] // 4, 3), generator=generator, dtype=torch.uint8)
            image = Image.fromarray(noise.numpy()).resize(size).filter(ImageFilter.SMOOTH)
            image.save(folder / f"{index}.jpg", quality=90)
    return statistics.mean(file.stat().st_size for file in (root / "train" / "noise").iterdir())


def images_a_second(root: Path, augment: str) -> list[float]:
    """Of each round over all images."""
    splits = load(DataConfig(root=str(root), augment=augment, workers=0))
    dataset = ByTurn(splits.train, seed=0)
    rates = []
    for part in range(ROUNDS + 1):
        start = time.perf_counter()
        for sample in range(len(dataset)):
            dataset[Turn(sample, part * len(dataset) + sample)]
        rates.append(len(dataset) / (time.perf_counter() - start))
    return rates[1:]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=[500, 375], metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_machine()}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        size = make_images(Path(folder), args.images, tuple(args.size))
        print(f"\n{args.images} JPEGs of {args.size[0]} x {args.size[1]} pixels, {size / 1000:.0f} kB on average\n")
        print("| data.augment | images/s a core | spread |")
        print("|---|---|---|")
        for augment in ("none", "crop", "rand"):
            rates = images_a_second(Path(folder), augment)
            print(f"| {augment} | {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} |", flush=True)


if __name__ == "__main__":
    main()
