"""Images for classification, in [0, 1]: teacher and student each normalise them with their own statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from PIL import Image, UnidentifiedImageError
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
    """

    full: Digits | FolderImages
    train: Subset[Sample]
    test: Digits | FolderImages
    classes: Sequence[str]
    names: Sequence[str]
    labels: Sequence[int]
    chosen: list[int]


def load(config: DataConfig) -> Splits:
    """The splits that the configuration describes.

    Raises:
        UserError: a folder, class or index file is missing or empty, or digits are asked for in another form.
    """
    return _digits(config) if config.name == "digits" else _folder(config)


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


class FolderImages(Dataset[Sample]):
    """The images of a folder, read and transformed one by one."""

    def __init__(self, folder: Folder, transform: Callable[[Image.Image], Tensor]) -> None:
        self.folder = folder
        self.transform = transform

    def __len__(self) -> int:
        return len(self.folder.names)

    def __getitem__(self, index: int) -> Sample:
        file = self.folder.root / self.folder.names[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            # Named and refused: taking the next image in its place would change the data without a word.
            raise UserError(f"expected an image that can be read, got {file}: {error}") from error
        return {"images": self.transform(image), "labels": self.folder.labels[index]}


def _folder(config: DataConfig) -> Splits:
    root = Path(config.root or "")
    train, test = scan(root / "train"), scan(root / "val")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"expected the same classes in {train.root} and {test.root}, got '{odd[0]}' in one of them alone"
        )
    plain = _transform(config.image_size, "none")
    images = FolderImages(train, _transform(config.image_size, config.augment))
    chosen = _chosen(config, train.names, train.labels, train.classes)
    return Splits(
        images, Subset(images, chosen), FolderImages(test, plain), train.classes, train.names, train.labels, chosen
    )


def _chosen(config: DataConfig, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> list[int]:
    if config.index is not None:
        return read_index(Path(config.index), names, classes)
    return class_balanced(labels, classes, config.fraction, config.seed)


def _transform(size: int, augment: str) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform

    # Mean 0 and deviation 1 leave the pixels in [0, 1].
    identity = {"input_size": size, "interpolation": "bicubic", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    if augment == "none":
        return create_transform(**identity)
    if augment == "crop":
        return create_transform(**identity, is_training=True, color_jitter=None)
    # DeiT's augmentation of single images (arXiv:2012.12877, table 9).
    return create_transform(
        **identity, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25
    )
