"""Images for classification, in [0, 1]: teacher and student each normalise them with their own statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from cab.config import DataConfig, UserError
from cab.data.folder import Folder, scan
from cab.data.subset import class_balanced, read_index

DIGITS_SIZE = 8
DIGITS_TEST_FRACTION = 0.2


class Sample(TypedDict):
    """One image (3, height, width) in [0, 1], and its class."""

    images: Tensor
    labels: int


class Splits(NamedTuple):
    """The data of a run.

    Attributes:
        full: the whole training split, for a teacher that is trained on the spot.
        train: the student's part of it.
        test: what is evaluated.
        classes: names of the classes.
        names: of each image of ``full``.
        labels: of each image of ``full``.
        chosen: indices into ``full`` of the student's part.
        files: of a folder, all that are read.
    """

    full: Digits | Images
    train: Subset[Sample]
    test: Digits | Images
    classes: Sequence[str]
    names: Sequence[str]
    labels: Sequence[int]
    chosen: list[int]
    files: Sequence[str] = ()


def load(config: DataConfig) -> Splits:
    """The splits that the configuration describes.

    Raises:
        UserError: a folder, class or index file is missing or empty, or digits are asked for in another form.
    """
    if config.name == "digits":
        return _digits(config)
    return _folder(config) if config.name == "folder" else _dataset(config)


class Digits(Dataset[Sample]):
    """scikit-learn's handwritten digits: scans of 8 x 8 pixels, the grey value repeated in three channels."""

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"images": self.images[index], "labels": self.labels[index]}


def _digits(config: DataConfig) -> Splits:
    from sklearn.datasets import load_digits

    if config.image_size != DIGITS_SIZE:
        raise UserError(f"expected data.image_size={DIGITS_SIZE} for digits, got {config.image_size}")
    if config.augment != "none":
        raise UserError(f"expected data.augment=none for digits, got {config.augment!r}")
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    labels = [int(label) for label in digits.target]
    classes = [str(name) for name in digits.target_names]
    test = class_balanced(labels, classes, DIGITS_TEST_FRACTION, config.seed)
    train = sorted(set(range(len(labels))) - set(test))
    full = Digits(images[train], [labels[index] for index in train])
    names = [f"digit-{index:04d}" for index in train]
    chosen = _chosen(config, names, full.labels, classes)
    return Splits(
        full,
        Subset(full, chosen),
        Digits(images[test], [labels[index] for index in test]),
        classes,
        names,
        full.labels,
        chosen,
    )


class Images(Dataset[Sample]):
    """Images that are read and transformed one by one.

    Args:
        names: of each image, for who asks and for errors.
        labels: of each image.
        read: gives an image, 8-bit RGB, by its index.
        transform: makes a tensor of it.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int],
        read: Callable[[int], Image.Image],
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.names = names
        self.labels = labels
        self.read = read
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = self.read(index)
        except Exception as error:  # each decoder has errors of its own
            # Named and refused: taking the next image in its place would change the data without a word.
            raise UserError(f"expected an image that can be read, got {self.names[index]}: {error}") from error
        return {"images": self.transform(image), "labels": self.labels[index]}


class _Files:
    """Reads the images of a folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __call__(self, index: int) -> Image.Image:
        with Image.open(self.folder.root / self.folder.names[index]) as opened:
            return _rgb(opened)


class _Items:
    """Reads the images of a data set of (image, label) pairs."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __call__(self, index: int) -> Image.Image:
        if not hasattr(self.pairs, "reader"):
            return _rgb(self.pairs[index][0])
        with self.pairs.reader[index][0] as file:  # timm itself takes the next where an image cannot be read
            return _rgb(Image.open(file))


def _rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB; Pillow itself clips greys of 16 bits to white, and numbers between 0 and 1 to black.

    Raises:
        ValueError: numbers that are no shades of 16 bits.
    """
    if image.mode == "F":
        raise ValueError("an image of mode F, floating-point numbers of no known range")
    if image.mode.startswith("I"):  # greys of 16 bits, or of 32 with the same values
        pixels = np.asarray(image).astype(np.int64)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 65535:
            raise ValueError(f"an image of mode {image.mode} with numbers from {low} to {high}, not from 0 to 65535")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def _folder(config: DataConfig) -> Splits:
    root = Path(config.root or "")
    train, test = scan(root / "train"), scan(root / "val")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"expected the same classes in {train.root} and {test.root}, got '{odd[0]}' in one of them alone"
        )

    def images(folder: Folder, transform: Callable[[Image.Image], Tensor]) -> Images:
        names = [str(folder.root / name) for name in folder.names]
        return Images(names, folder.labels, _Files(folder), transform)

    full, tested = images(train, _transform(config)), images(test, _plain_transform(config))
    chosen, files = _chosen(config, train.names, train.labels, train.classes), (*full.names, *tested.names)
    return Splits(full, Subset(full, chosen), tested, train.classes, train.names, train.labels, chosen, files)


def _dataset(config: DataConfig) -> Splits:
    """A data set of timm's: torchvision's, or one of the Hugging Face hub or in its form on the disk."""
    from timm.data import create_dataset

    def images(split: str, transform: Callable[[Image.Image], Tensor]) -> tuple[Images, Sequence[str]]:
        try:
            pairs: Any = create_dataset(config.name, config.root, split=split)
        except Exception as error:  # each reader has errors of its own
            reason = " ".join(str(error).split())
            raise UserError(
                f"expected the split {split!r} of data set {config.name} in {config.root}, got: {reason}"
            ) from error
        labels, classes = _labels(config.name, pairs)
        names = [f"{split}-{index:08d}" for index in range(len(labels))]
        return Images(names, labels, _Items(pairs), transform), classes

    full, classes = images("train", _transform(config))
    tested, _ = images("validation", _plain_transform(config))
    chosen = _chosen(config, full.names, full.labels, classes)
    return Splits(full, Subset(full, chosen), tested, classes, full.names, full.labels, chosen)


def _labels(name: str, pairs: Any) -> tuple[Sequence[int], Sequence[str]]:
    """The label of each image, read without the images, and the names of the classes."""
    reader = getattr(pairs, "reader", None)
    found = getattr(pairs, "targets", getattr(pairs, "labels", None)) if reader is None else reader.iter_targets()
    if found is None:
        raise UserError(f"expected a data set whose labels can be read without its images, got {name}")
    labels = [int(label) for label in found]
    classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get) if reader else getattr(pairs, "classes", None)
    return labels, [str(label) for label in classes or range(max(labels) + 1)]


def _chosen(config: DataConfig, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> list[int]:
    if config.index is not None:
        return read_index(Path(config.index), names, classes)
    return class_balanced(labels, classes, config.fraction, config.seed)


# Mean 0 and deviation 1 leave the pixels in [0, 1].
_PIXELS = {"interpolation": "bicubic", "mean": (0.0,) * 3, "std": (1.0,) * 3}


def _plain_transform(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform

    return create_transform(config.image_size, **_PIXELS)


def _transform(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform

    if config.augment == "none":
        return _plain_transform(config)
    if config.augment == "crop":
        return create_transform(config.image_size, **_PIXELS, is_training=True, color_jitter=None)
    try:
        return create_transform(
            config.image_size,
            **_PIXELS,
            is_training=True,
            color_jitter=config.color_jitter,
            auto_augment=config.policy,
            re_prob=config.erasing,
        )
    except (AssertionError, ValueError) as error:  # everything else has been checked
        raise UserError(f"expected a policy of timm's for data.policy={config.policy!r}, got: {error}") from error
