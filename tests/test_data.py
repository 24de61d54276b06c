"""Subsets are balanced, seeded and nested; images come in [0, 1]; what is missing or broken is named."""

import json
import random
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cab.config import DataConfig, UserError
from cab.data.folder import scan
from cab.data.order import ByTurn, RunOrder, Turn
from cab.data.subset import class_balanced, read_classes, read_index, write_index
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
    assert read_classes(tmp_path / "i.json") == CLASSES
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


def test_the_policy_runs_at_its_largest_magnitude(folder: Path) -> None:
    """Which the noise on it reaches once in forty draws: an image library may refuse what timm asks for there."""
    transforms = load(DataConfig(root=str(folder), image_size=16, augment="rand")).full.transform.transforms
    (policy,) = (transform for transform in transforms if hasattr(transform, "ops"))
    names = [op.name for op in policy.ops]
    assert "PosterizeIncreasing" in names
    image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    for op in policy.ops:
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0.0
        assert op(image).size == image.size, op.name


@pytest.mark.parametrize("policy", ["junk", "rand-x9", "rand-n0.5", "augmix-x1"])
def test_refusal_of_a_policy(folder: Path, policy: str) -> None:
    with pytest.raises(UserError, match=rf"^expected a policy of timm's for data\.policy='{policy}', got: .+$"):
        load(DataConfig(root=str(folder), augment="rand", policy=policy))


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


def grey(pixels: list[list[int]], dtype: str) -> Image.Image:
    return Image.fromarray(np.array(pixels, dtype))


@pytest.mark.parametrize(
    ("file", "dtype", "mode"),
    [("0.png", "<u2", "I;16"), ("0.tif", "<u2", "I;16"), ("0.tiff", ">u2", "I;16B"), ("00.tif", "<i4", "I")],
)
def test_grey_images_of_16_bits_keep_their_shades(folder: Path, file: str, dtype: str, mode: str) -> None:
    path = folder / "val" / "blue" / file
    grey([[0, 257 * 64], [257 * 200 + 128, 65535]], dtype).save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
    splits = load(DataConfig(root=str(folder), image_size=2, augment="none"))
    sample = splits.test[splits.test.names.index(str(path))]
    splits.test.transform = np.asarray
    pixels = splits.test[splits.test.names.index(str(path))]["images"]
    assert pixels.shape == (2, 2, 3)
    assert pixels[..., 0].tolist() == pixels[..., 2].tolist() == [[0, 64], [200, 255]]
    assert sample["images"].max() <= 1


@pytest.mark.parametrize(
    ("dtype", "pixel", "got"),
    [
        ("<f4", 0.5, "an image of mode F, floating-point numbers of no known range"),
        ("<i4", 65536, "an image of mode I with numbers from 65536 to 65536, not from 0 to 65535"),
        ("<i4", -1, "an image of mode I with numbers from -1 to -1, not from 0 to 65535"),
    ],
)
def test_numbers_that_are_no_shades_are_refused(folder: Path, dtype: str, pixel: float, got: str) -> None:
    Image.fromarray(np.full((4, 4), pixel, dtype)).save(folder / "val" / "blue" / "0.tif")
    splits = load(DataConfig(root=str(folder), image_size=16))
    with pytest.raises(UserError, match=rf"^expected an image that can be read, got .*/val/blue/0\.tif: {got}$"):
        splits.test[splits.test.names.index(str(folder / "val" / "blue" / "0.tif"))]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("side", "rest", "error"),
    [
        (30_000, chunk(b"IDAT", b""), Image.DecompressionBombError),
        (2, chunk(b"IDAT", zlib.compress(bytes(14))[:5]) + bytes(16), SyntaxError),
    ],
    ids=["too large", "broken inside"],
)
def test_whatever_a_decoder_raises_the_image_is_named(
    folder: Path, side: int, rest: bytes, error: type[Exception]
) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (folder / "train" / "blue" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + rest)
    splits = load(DataConfig(root=str(folder), image_size=16))
    with pytest.raises(UserError, match=r"^expected an image that can be read, got .*/train/blue/1\.png: ") as refusal:
        splits.train[1]
    assert isinstance(refusal.value.__cause__, error)


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


def test_what_is_hidden_and_what_is_no_file_are_no_images(folder: Path) -> None:
    before = scan(folder / "train")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    for path in ("red/._0.png", "red/.ipynb_checkpoints/0.png", ".ipynb_checkpoints/0.png"):
        (folder / "train" / path).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "train" / "red" / "0.png", folder / "train" / path)
    (folder / "train" / "red" / "folder.png").mkdir()
    assert scan(folder / "train") == before
    shutil.copytree(folder / "train", folder / ".hidden" / "train")  # above the classes, a name may be any
    assert scan(folder / ".hidden" / "train").names == before.names
    (folder / "train" / "red" / "link.png").symlink_to("nothing")  # whoever reads it is told
    assert scan(folder / "train").names == (*before.names, "red/link.png")


def samples(order: RunOrder) -> list[int]:
    return [turn.sample for turn in order]


def test_the_order_of_a_run_is_whole_passes_cut_at_its_length() -> None:
    order = samples(RunOrder(samples=5, length=12, seed=0))
    assert len(order) == len(RunOrder(5, 12, 0)) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert order == samples(RunOrder(samples=5, length=12, seed=0))
    assert order != samples(RunOrder(samples=5, length=12, seed=1))
    assert [turn.number for turn in RunOrder(5, 12, 0)] == list(range(12))
    assert RunOrder(5, 12, 0).batch(3, 7) == order[3:7]


def test_repeated_augmentation_brings_an_image_up_again_and_again_in_passes_of_the_same_length() -> None:
    order = samples(RunOrder(samples=7, length=14, seed=0, repeats=3))
    for one in (order[:7], order[7:]):
        assert one[0] == one[1] == one[2] != one[3] == one[4] == one[5] != one[6]
        assert len(set(one)) == 3


class Drawn(torch.utils.data.Dataset):
    """Its samples are what the three generators say."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_sample_depends_on_its_turn_alone() -> None:
    data, turn = ByTurn(Drawn(), seed=0), Turn(2, 17)
    first = data[turn]
    random.random(), np.random.rand(), torch.rand(())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert data[turn] == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    others = [data[Turn(2, 18)], ByTurn(Drawn(), seed=1)[turn]]
    assert all(other[1:] != first[1:] and other[0] == 2 for other in others)
    assert len(data) == 3


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """torchvision's MNIST as it lies on the disk: 20 training and 10 test images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = bytes(range(10)) * (count * 784 // 10)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        labels = bytes(range(10)) * (count // 10)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    return tmp_path


def test_a_data_set_of_torchvision(mnist: Path) -> None:
    splits = load(DataConfig(name="torch/mnist", root=str(mnist), image_size=16, fraction=0.5, augment="rand"))
    assert (len(splits.full), len(splits.train), len(splits.test)) == (20, 10, 10)
    assert splits.classes[:2] == ["0 - zero", "1 - one"]
    assert [splits.train[index]["labels"] for index in range(10)] == [splits.labels[i] for i in splits.chosen]
    assert sorted(splits.train[index]["labels"] for index in range(10)) == list(range(10))
    assert splits.test[3]["images"].shape == (3, 16, 16)


def test_a_data_set_in_the_form_of_hugging_face(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("rows")  # the reader takes a "test" in a path for a split
    datasets = pytest.importorskip("datasets")
    for split, count in (("train", 4), ("validation", 2)):
        images = [Image.new("RGB", (20, 17), ((255, 0, 0), (0, 0, 255))[index % 2]) for index in range(count)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])})
        table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (count // 2)}, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    splits = load(DataConfig(name=f"hfds/{tmp_path}", root=str(tmp_path / "cache"), image_size=16, augment="none"))
    assert (len(splits.full), len(splits.test)) == (4, 2)
    assert splits.classes == ["red", "blue"]
    blue = splits.test[1]
    assert blue["labels"] == 1
    assert torch.equal(blue["images"][:, 0, 0], torch.tensor([0.0, 0.0, 1.0]))


def test_a_data_set_in_the_form_of_hugging_face_is_read_as_a_folder_is(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp_path = tmp_path_factory.mktemp("rows")
    datasets = pytest.importorskip("datasets")
    grey([[257 * 64]], "<u2").save(tmp_path / "grey.png")
    contents = [(tmp_path / "grey.png").read_bytes(), b"no image"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0, 1]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    splits = load(DataConfig(name=f"hfds/{tmp_path}", root=str(tmp_path / "cache"), image_size=1, augment="none"))
    assert torch.equal(splits.test[0]["images"], torch.full((3, 1, 1), 64 / 255))
    with pytest.raises(UserError, match=r"^expected an image that can be read, got validation-00000001: "):
        splits.test[1]


def test_refusal_of_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^expected the split 'train' of data set torch/mnist in .*, got: Dataset not found"
    ):
        load(DataConfig(name="torch/mnist", root=str(tmp_path)))
    with pytest.raises(
        UserError, match=r"^expected the split 'train' of data set torch/nothing in None, got: Unknown "
    ):
        load(DataConfig(name="torch/nothing"))
