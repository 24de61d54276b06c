"""A folder of images, one folder a class: which files it holds, in an order that does not depend on the file system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cab.config import UserError

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Folder:
    """The images of one split.

    Attributes:
        root: the folder that holds the classes.
        classes: names of the classes, sorted; a label is an index into them.
        names: of each image, its path below ``root`` with forward slashes.
        labels: of each image, its class.
    """

    root: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]


def scan(root: Path) -> Folder:
    """List the images below ``root/CLASS``, classes and files sorted by name; what is hidden is none of them.

    Raises:
        UserError: no such folder, no class in it, or a class without an image.
    """
    if not root.is_dir():
        raise UserError(f"expected a folder {root} with one folder of images for each class, got no such folder")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"expected one folder of images for each class in {root}, got no folder in it")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(file for file in (root / name).rglob("*") if _is_image(file, root))
        if not files:
            raise UserError(f"expected at least one image of class '{name}' in {root / name}, got none")
        names += (file.relative_to(root).as_posix() for file in files)
        labels += [label] * len(files)
    return Folder(root, tuple(classes), tuple(names), tuple(labels))


def is_hidden(file: Path, root: Path) -> bool:
    """Whether a file below ``root``, or a folder between the two, has a name that begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _is_image(file: Path, root: Path) -> bool:
    """By its name; a link to nothing is one, which is refused when it is read."""
    known = file.suffix.lower() in EXTENSIONS and not is_hidden(file, root)
    return known and (file.is_file() or not file.exists())
