"""Subsets are balanced, seeded and nested; images come in [0, 1]; what is missing or broken is named."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from cab.config import DataConfig, UserError
from cab.data.folder import scan
from cab.data.order import RunOrder
from cab.data.subset import class_balanced, read_index, write_index
from cab.data.vision import load

LABELS = [0] * 50 + [1] * 20 + [2] * 3
CLASSES = ["a", "b", "c"]


def test_each_class_gives_the_same_fraction_and_at_least_one_image() -> None:
    chosen = class_balanced(LABELS, CLASSES, 0.1, seed=0)
    assert Counter(LABELS[index] for index in chosen) == {0: 5, 1: 2, 2: 1}
    assert chosen == sorted(set(chosen))


def test_a_fraction_of_one_is_everything() -> None:
    assert class_balanced(LABELS, CLASSES, 1.0, seed=0) == list(range(len(LABELS)))


def test_subsets_are_seeded_and_nested() -> None:
    small, large = (class_balanced(LABELS, CLASSES, fraction, seed=0) for fraction in (0.1, 0.5))
    assert set(small) < set(large)
    assert small == class_balanced(LABELS, CLASSES, 0.1, seed=0)
    assert small != class_balanced(LABELS, CLASSES, 0.1, seed=1)


def test_the_choice_of_a_class_does_not_depend_on_the_others() -> None:
    shifted = [label - 1 for label in LABELS[50:]]
    alone = class_balanced(shifted, CLASSES[1:], 0.5, seed=0)
    assert [index + 50 for index in alone] == [i for i in class_balanced(LABELS, CLASSES, 0.5, seed=0) if i >= 50]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_refusal_of_a_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match=r"^expected a fraction above 0 and at most 1, got "):
        class_balanced(LABELS, CLASSES, fraction, seed=0)


def test_refusal_of_an_empty_class() -> None:
    with pytest.raises(UserError, match=r"^expected at least one image of class 'd', got none$"):
        class_balanced(LABELS, [*CLASSES, "d"], 0.5, seed=0)


def test_an_index_file_is_read_back(tmp_path: Path) -> None:
    names = [f"{CLASSES[label]}/{index}.jpg" for index, label in enumerate(LABELS)]
    chosen = class_balanced(LABELS, CLASSES, 0.1, seed=0)
    write_index(tmp_path / "i.json", names, LABELS, CLASSES, chosen)
    assert read_index(tmp_path / "i.json", names, CLASSES) == chosen
    with pytest.raises(UserError, match=r"got 8 missing, first 'a/\d+\.jpg'$"):
        read_index(tmp_path / "i.json", ["other.jpg"], CLASSES)
    with pytest.raises(UserError, match=r"^expected at least one image of class 'd' in .*i\.json, got none$"):
        read_index(tmp_path / "i.json", names, [*CLASSES, "d"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected an index file written by 'cab subset', got "),
        ("[]", "expected an index file of format 'cab-index-1', got "),
        (json.dumps({"format": "other"}), "expected an index file of format 'cab-index-1', got "),
        (json.dumps({"format": "cab-index-1"}), "expected an index file of format 'cab-index-1', got "),
        (None, "expected an index file, got no file "),
    ],
)
def test_refusal_of_an_index_file(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "i.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"^{message}"):
        read_index(file, [], CLASSES)


def test_digits_are_split_without_overlap_and_in_balance() -> None:
    splits = load(DataConfig(name="digits", image_size=8, augment="none", fraction=0.1))
    assert len(splits.full) + len(splits.test) == 1797
    assert set(Counter(splits.labels[index] for index in splits.chosen).values()) <= {14, 15}
    assert max(Counter(splits.test.labels).values()) - min(Counter(splits.test.labels).values()) <= 2
    whole = torch.cat([splits.full.images, splits.test.images])
    assert whole.min() == 0
    assert whole.max() == 1
    assert whole.shape == (1797, 3, 8, 8)
    assert len(whole.unique(dim=0)) == len(splits.full.images.unique(dim=0)) + len(splits.test.images.unique(dim=0))
    chosen = splits.chosen[3]
    assert torch.equal(splits.train[3]["images"], splits.full[chosen]["images"])
    assert splits.train[3]["labels"] == splits.labels[chosen]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16, "augment": "none"}, "expected data.image_size=8 for digits, got 16"),
        ({"image_size": 8, "augment": "crop"}, "expected data.augment=none for digits, got 'crop'"),
    ],
)
def test_refusal_of_digits_in_another_form(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        load(DataConfig(name="digits", **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 4 training and 2 test images each: red ones and blue ones, of odd sizes."""
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20 + index, 17), colour).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("augment", ["none", "crop", "rand"])
def test_images_of_a_folder_lie_between_0_and_1(folder: Path, augment: str) -> None:
    splits = load(DataConfig(root=str(folder), image_size=16, fraction=0.5, augment=augment))
    assert (len(splits.full), len(splits.train), len(splits.test)) == (8, 4, 4)
    for dataset in (splits.train, splits.test):
        for index in range(4):
            sample = dataset[index]
            assert sample["images"].shape == (3, 16, 16)
            assert sample["images"].min() >= 0
            assert sample["images"].max() <= 1
    red = splits.test[3]
    assert splits.classes[red["labels"]] == "red"
    assert torch.equal(red["images"], torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 16, 16))


def test_an_index_file_takes_the_place_of_the_fraction(folder: Path) -> None:
    listed = {"blue": ["blue/2.png"], "red": ["red/0.png", "red/3.png"]}
    (folder / "i.json").write_text(json.dumps({"format": "cab-index-1", "classes": listed}))
    splits = load(DataConfig(root=str(folder), index=str(folder / "i.json"), fraction=0.1))
    assert [splits.names[index] for index in splits.chosen] == ["blue/2.png", "red/0.png", "red/3.png"]


def test_a_broken_image_is_named_and_not_replaced(folder: Path) -> None:
    (folder / "train" / "blue" / "1.png").write_bytes(b"no image")
    splits = load(DataConfig(root=str(folder), image_size=16))
    with pytest.raises(UserError, match=r"^expected an image that can be read, got .*/train/blue/1\.png: "):
        splits.train[1]


def test_refusal_of_a_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^expected a folder .*/no/train with .*, got no such folder$"):
        load(DataConfig(root=str(folder / "no")))
    with pytest.raises(UserError, match=r"^expected one folder of images for each class in .*/blue, got no folder"):
        scan(folder / "train" / "blue")
    (folder / "train" / "green").mkdir()
    with pytest.raises(UserError, match=r"^expected at least one image of class 'green' in .*/green, got none$"):
        load(DataConfig(root=str(folder)))
    (folder / "train" / "green").rmdir()
    (folder / "val" / "red").rename(folder / "val" / "rot")
    with pytest.raises(UserError, match=r"^expected the same classes in .*train and .*val, got 'red' in one of them"):
        load(DataConfig(root=str(folder)))


def test_the_order_of_a_run_is_whole_passes_cut_at_its_length() -> None:
    order = list(RunOrder(images=5, length=12, seed=0))
    assert len(order) == len(RunOrder(5, 12, 0)) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert order == list(RunOrder(images=5, length=12, seed=0))
    assert order != list(RunOrder(images=5, length=12, seed=1))
