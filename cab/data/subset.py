"""Class-balanced subsets: a seeded choice of one fraction of every class, kept as an index file; no image is copied."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from cab.config import UserError

FORMAT = "cab-index-1"


def class_balanced(labels: Sequence[int], classes: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Choose ``fraction`` of the images of every class, and at least one.

    With one seed, a smaller fraction chooses a subset of what a larger one chooses; and what is chosen of a class does
    not depend on the other classes.

    Args:
        labels: the class of each image, an index into ``classes``.
        classes: names of the classes.
        fraction: in (0, 1].
        seed: of the choice.

    Returns:
        Indices into ``labels``, ascending.

    Raises:
        UserError: a fraction outside (0, 1], or a class without an image.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"expected a fraction above 0 and at most 1, got {fraction}")
    of_class: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        of_class[label].append(index)
    chosen: list[int] = []
    for name, indices in zip(classes, of_class, strict=True):
        if not indices:
            raise UserError(f"expected at least one image of class '{name}', got none")
        random.Random(f"{seed}/{name}").shuffle(indices)
        chosen += indices[: max(1, round(fraction * len(indices)))]
    return sorted(chosen)


def write_index(
    file: Path, names: Sequence[str], labels: Sequence[int], classes: Sequence[str], chosen: Sequence[int]
) -> None:
    """Write the names of the chosen images, by class, as JSON."""
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for index in chosen:
        by_class[classes[labels[index]]].append(names[index])
    file.write_text(json.dumps({"format": FORMAT, "images": len(chosen), "classes": by_class}, indent=1) + "\n")


def read_index(file: Path, names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The indices into ``names`` of the images that an index file lists, ascending.

    Raises:
        UserError: no such file, not an index file, a class missing or empty, or an image that ``names`` does not hold.
    """
    by_class = _read(file)
    for name in classes:
        if not by_class.get(name):
            raise UserError(f"expected at least one image of class '{name}' in {file}, got none")
    place = {name: index for index, name in enumerate(names)}
    listed = [image for images in by_class.values() for image in images]
    missing = [image for image in listed if image not in place]
    if missing:
        raise UserError(f"expected the images of {file} in the data, got {len(missing)} missing, first '{missing[0]}'")
    return sorted(place[image] for image in listed)


def read_classes(file: Path) -> list[str]:
    """The names of the classes of an index file, in their order.

    Raises:
        UserError: no such file, or not an index file.
    """
    return list(_read(file))


def _read(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        raise UserError(f"expected an index file, got no file {file}")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"expected an index file written by 'cab subset', got {file}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("classes"), dict):
        raise UserError(f"expected an index file of format {FORMAT!r}, got {file}")
    by_class: dict[str, list[str]] = content["classes"]
    return by_class
